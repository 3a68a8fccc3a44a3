"""The objects that a checkpoint is of, as named tensors and JSON, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from windlass.checkpoint.durable.manifest import PARTIAL, RNG_PREFIX, Manifest
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.optimizer_state import OptimizerState
from windlass.checkpoint.pieces import Piece, PieceGroup, WeightGroups, state_groups
from windlass.checkpoint.rng import capture_rng, restore_rng
from windlass.errors import IncompatibleCheckpoint
from windlass.out_of_core import OutOfCore
from windlass.parallel.fragment import ReplicaShare, fragment_of, local_tensor
from windlass.parallel.mesh import Mesh


@runtime_checkable
class Stateful(Protocol):
    """Small state that is not tensors: `state_dict` returns what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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

    @property
    def out_of_core(self) -> list[OutOfCore]:
        """The optimizers that keep something outside of memory."""
        return [state.out_of_core for state in self.optimizers.values() if state.out_of_core is not None]

    def _device_mesh(self) -> DeviceMesh | None:
        """torch's mesh of all ranks, of a parameter where the loop made torch's process group; None if none has it."""
        if self.mesh.device_mesh is not None:
            return self.mesh.device_mesh
        parameters = (parameter for module in self.modules.values() for parameter in module.parameters())
        meshes = (parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor))
        return next((mesh for mesh in meshes if mesh.size() == self.mesh.world_size), None)

    def settle(self) -> None:
        """Makes every update that was put off; to be called before anything is said or restored. Collective."""
        for optimizer in self.out_of_core:
            optimizer.settle()

    def groups(self) -> Iterator[PieceGroup]:
        """Yields what this rank saves: its share of fragments that several ranks hold alike, and all others it holds.

        First what is in memory, and then, in an order that reads it once, what is not.
        """
        share = ReplicaShare(self.mesh.rank, self.mesh.world_size, self._device_mesh())
        weights = WeightGroups(self.out_of_core)
        in_memory: list[Piece] = []
        elsewhere: list[PieceGroup] = []
        for module_name, module in self.modules.items():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for name, tensor in module.state_dict().items():
                if share.includes(tensor):
                    parameter = parameters.get(name)
                    piece = Piece(fragment_of(f"{module_name}.{name}", tensor), local_tensor(tensor), parameter)
                    if not weights.takes(piece):
                        in_memory.append(piece)
        for state in self.optimizers.values():
            found, groups = state_groups(state, share)
            in_memory += found
            elsewhere += groups
        for name, tensor in capture_rng(self.mesh.device).items():
            in_memory.append(Piece(fragment_of(f"{RNG_PREFIX}.{self.mesh.rank}.{name}", tensor), tensor, None))
        yield PieceGroup(in_memory)
        yield from weights.groups()
        yield from elsewhere

    def pieces(self) -> Iterator[Piece]:
        """Yields every piece that this rank saves; the tensors of what is not in memory hold nothing."""
        for group in self.groups():
            yield from group.pieces

    def json_state(self) -> dict[str, Any]:
        objects: dict[str, Any] = {name: value.state_dict() for name, value in self.others.items()}
        objects |= {name: state.hyperparameters() for name, state in self.optimizers.items()}
        return {**objects, "info": dict(self.info)}

    def refresh_numbers(self, objects: dict[str, Any]) -> None:
        """Brings the numbers in a `json_state` up to date with updates that were made after it."""
        for name, state in self.optimizers.items():
            objects[name]["numbers"] = state.numbers()

    def clone_ownerless(self) -> dict[str, torch.Tensor]:
        """Copies, by name, of what not only the optimizer's step changes."""
        return {
            piece.fragment.name: piece.tensor.clone()
            for group in self.groups()
            for piece in group.pieces
            if piece.owner is None
        }

    @torch.no_grad()
    def read(self, reader: CheckpointReader) -> None:
        """Restores everything; `check_compatible` must have passed."""
        # First what may still refuse, such as a loader of other data, while nothing is overwritten.
        for name, value in self.others.items():
            if not _begins_anew(name, reader.manifest):
                with _understood(reader, name):
                    value.load_state_dict(reader.manifest.objects[name])
        weights = WeightGroups(self.out_of_core)
        for module_name, module in self.modules.items():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for name, tensor in module.state_dict().items():
                piece = Piece(fragment_of(f"{module_name}.{name}", tensor), local_tensor(tensor), parameters.get(name))
                if not weights.takes(piece):
                    reader.read(piece.fragment, piece.tensor)
        for group in weights.groups(write=True):
            with group.loaded() as tensors:
                for piece, tensor in zip(group.pieces, tensors, strict=True):
                    reader.read(piece.fragment, tensor)
        for state in self.optimizers.values():
            if not _begins_anew(state.name, reader.manifest):
                with _understood(reader, state.name):
                    state.restore(reader)
        if reader.manifest.world_size == self.mesh.world_size:
            prefix = f"{RNG_PREFIX}.{self.mesh.rank}."
            states = {
                name.removeprefix(prefix): reader.read_whole(name)
                for name in reader.manifest.tensors
                if name.startswith(prefix)
            }
            with _understood(reader, RNG_PREFIX):
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


@contextlib.contextmanager
def _understood(reader: CheckpointReader, name: str) -> Iterator[None]:
    """Raises IncompatibleCheckpoint where an object cannot make anything of what is stored for it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise IncompatibleCheckpoint(
            "resume",
            reader.source.describe(),
            f"has a state of {name} that cannot be used ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "resume from another checkpoint (`windlass ckpt list` names them; resume=PATH)",
        ) from error


def _begins_anew(name: str, manifest: Manifest) -> bool:
    """True if an object stays as it is: only a checkpoint that was imported, and says so, may lack its state."""
    info = manifest.objects.get("info")
    return name not in manifest.objects and isinstance(info, dict) and info.get(PARTIAL) is True
