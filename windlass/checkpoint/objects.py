"""The objects that a checkpoint is of, as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from windlass.checkpoint.durable.manifest import Manifest
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.exchange.folder import PARTIAL
from windlass.checkpoint.optimizer_state import OptimizerState
from windlass.checkpoint.rng import capture_rng, restore_rng
from windlass.errors import IncompatibleCheckpoint
from windlass.parallel.fragment import Fragment, ReplicaShare, fragment_of, local_tensor
from windlass.parallel.mesh import Mesh

RNG_PREFIX = "rng"


@runtime_checkable
class Stateful(Protocol):
    """Small state that is not tensors: `state_dict` returns what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """A block that this rank has to say, and the local tensor that holds it."""

    fragment: Fragment
    tensor: torch.Tensor
    owner: nn.Parameter | torch.Tensor | None
    """The parameter that it is, or whose state it is: only the optimizer's step changes it. None: anything may."""


class CheckpointedObjects:
    """Args:
    objects: name -> `nn.Module`, `torch.optim.Optimizer` (of parameters of those modules), or `Stateful`.
    mesh: the ranks that hold them together.
    info: JSON to keep beside the state.
    restore_hyperparameters: whether a restored optimizer takes those of the checkpoint, or keeps its own.
    """

    def __init__(
        self,
        objects: Mapping[str, nn.Module | torch.optim.Optimizer | Stateful],
        mesh: Mesh,
        info: dict[str, Any],
        restore_hyperparameters: bool,
    ) -> None:
        self.mesh, self.info = mesh, info
        self.modules = {name: value for name, value in objects.items() if isinstance(value, nn.Module)}
        named: dict[torch.Tensor, str] = {
            parameter: f"{module_name}.{name}"
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizers = {
            name: OptimizerState(name, value, named, restore_hyperparameters)
            for name, value in objects.items()
            if isinstance(value, torch.optim.Optimizer)
        }
        self.others = {
            name: value
            for name, value in objects.items()
            if name not in self.modules and name not in self.optimizers and isinstance(value, Stateful)
        }
        unknown = objects.keys() - self.modules.keys() - self.optimizers.keys() - self.others.keys()
        if unknown:
            raise ValueError(f"{sorted(unknown)} have no state_dict and load_state_dict")
        if reserved := objects.keys() & {RNG_PREFIX, "info"}:
            raise ValueError(f"{sorted(reserved)} are names that the checkpoint itself uses")

    def pieces(self) -> Iterator[Piece]:
        """What this rank has to say: its share of the blocks that several ranks hold alike, and all others it holds."""
        share = ReplicaShare(self.mesh.rank, self.mesh.world_size)
        for module_name, module in self.modules.items():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for name, tensor in module.state_dict().items():
                if share.includes(tensor):
                    fragment = fragment_of(f"{module_name}.{name}", tensor)
                    yield Piece(fragment, local_tensor(tensor), parameters.get(name))
        for state in self.optimizers.values():
            for name, parameter, tensor in state.tensors():
                if share.includes(tensor):
                    yield Piece(fragment_of(name, tensor), local_tensor(tensor), parameter)
        for name, tensor in capture_rng(self.mesh.device).items():
            yield Piece(fragment_of(f"{RNG_PREFIX}.{self.mesh.rank}.{name}", tensor), tensor, None)

    def json_state(self) -> dict[str, Any]:
        objects: dict[str, Any] = {name: value.state_dict() for name, value in self.others.items()}
        objects |= {name: state.hyperparameters() for name, state in self.optimizers.items()}
        return {**objects, "info": self.info}

    @torch.no_grad()
    def read(self, reader: CheckpointReader) -> None:
        """Restores everything; `check_compatible` must have passed."""
        # First what may still refuse, such as a loader of other data, while nothing is overwritten.
        for name, value in self.others.items():
            if not _begins_anew(name, reader.manifest):
                value.load_state_dict(reader.manifest.objects[name])
        for module_name, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                reader.read(fragment_of(f"{module_name}.{name}", tensor), local_tensor(tensor))
        for state in self.optimizers.values():
            if not _begins_anew(state.name, reader.manifest):
                state.restore(reader)
        if reader.manifest.world_size == self.mesh.world_size:
            prefix = f"{RNG_PREFIX}.{self.mesh.rank}."
            states = {
                name.removeprefix(prefix): reader.read_whole(name)
                for name in reader.manifest.tensors
                if name.startswith(prefix)
            }
            restore_rng(states, self.mesh.device)

    def check_compatible(self, reader: CheckpointReader) -> None:
        """Raises IncompatibleCheckpoint if the checkpoint is of another model or optimizer."""
        stored = reader.manifest.tensors
        differences: list[str] = []
        for module_name, module in self.modules.items():
            own = module.state_dict()
            for name, tensor in own.items():
                entry = stored.get(f"{module_name}.{name}")
                if entry is None:
                    differences.append(f"it has no {module_name}.{name}")
                elif entry.shape != tuple(tensor.shape):
                    differences.append(
                        f"{module_name}.{name} is {list(entry.shape)} there and {list(tensor.shape)} here"
                    )
                elif f"torch.{entry.dtype}" != str(tensor.dtype):
                    differences.append(f"{module_name}.{name} is {entry.dtype} there and {tensor.dtype} here")
            names_there = (name for name in stored if name.startswith(f"{module_name}."))
            differences += [
                f"it has {name} too" for name in names_there if name.removeprefix(f"{module_name}.") not in own
            ]
        restored = [name for name in (*self.optimizers, *self.others) if not _begins_anew(name, reader.manifest)]
        for name in restored:
            if name not in reader.manifest.objects:
                differences.append(f"it has no state of {name}")
            elif name in self.optimizers:
                differences += self.optimizers[name].differences(reader.manifest)
        if differences:
            more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
            raise IncompatibleCheckpoint(
                "resume",
                reader.source.describe(),
                f"is a checkpoint of another model or optimizer: {'; '.join(differences[:3])}{more}",
                "use the configuration it was saved with (config.yaml beside it), or another run_dir",
            )


def _begins_anew(name: str, manifest: Manifest) -> bool:
    """Whether an object stays as it is: only a checkpoint that was imported, and says so, may lack its state."""
    return name not in manifest.objects and manifest.objects.get("info", {}).get(PARTIAL) is True
