"""`Checkpointer`: what a training loop talks to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import yaml
from torch import nn

from windlass.checkpoint.durable import CheckpointReader, DurableStore
from windlass.checkpoint.manifest import MANIFEST, committed_steps, step_folder
from windlass.checkpoint.optimizer_state import OptimizerState
from windlass.checkpoint.rng import capture_rng, restore_rng
from windlass.errors import ConfigError, CorruptCheckpoint, IncompatibleCheckpoint
from windlass.parallel.fragment import Fragment, fragment_of, is_first_replica, local_tensor
from windlass.parallel.mesh import Mesh

RNG_PREFIX = "rng"


@runtime_checkable
class Stateful(Protocol):
    """Small state that is not tensors: `state_dict` returns what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Restored:
    step: int
    folder: Path
    set_aside: list[Path] = field(default_factory=list)
    """Newer checkpoints that were moved aside, damaged or superseded, where they are now."""


class Checkpointer:
    """Saves and restores a set of named objects, sharded or not, to the bit.

    Args:
        objects: name -> `nn.Module`, `torch.optim.Optimizer` (of parameters of those modules), or `Stateful`.
        dir: the folder of the checkpoints, the same one for all ranks; made if it is missing.
        mesh: the ranks that save together; None is torch's process group, or this process where there is none.
        persist_every: steps between checkpoints, for `due`.
        keep: newest checkpoints to keep; 0 keeps all.
        info: JSON to write beside the state, e.g. the configuration.
        restore_hyperparameters: whether a restored optimizer takes its learning rate, betas and so on from the
            checkpoint, or keeps those that it was made with.
    """

    def __init__(
        self,
        objects: Mapping[str, nn.Module | torch.optim.Optimizer | Stateful],
        dir: Path | str,
        mesh: Mesh | None = None,
        *,
        persist_every: int = 100,
        keep: int = 2,
        info: dict[str, Any] | None = None,
        restore_hyperparameters: bool = True,
    ) -> None:
        self.mesh = mesh = mesh or Mesh.of_process_group()
        self.persist_every, self.keep = persist_every, keep
        self.store = DurableStore(Path(dir), mesh)
        self.info = info or {}
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
        self.current_step: int | None = None
        """The step that was saved or restored last: what is on disk for it is what is in memory."""

    def due(self, step: int) -> bool:
        return step % self.persist_every == 0

    def save(self, step: int) -> Path:
        """Writes a durable checkpoint and returns when it is committed. Collective.

        The step that was saved or restored last is not written again. An older timeline's checkpoint of this step is
        renamed to `.superseded`.

        Raises:
            RunFolderError: the disk is full or refuses; earlier checkpoints are intact.
        """
        folder = step_folder(self.store.directory, step)
        exists = self.mesh.decide(lambda: step in committed_steps(self.store.directory))
        if not exists or step != self.current_step:
            if exists:
                self.mesh.decide(lambda: self._set_aside(folder, "superseded"))
            objects: dict[str, Any] = {name: value.state_dict() for name, value in self.others.items()}
            objects |= {name: state.hyperparameters() for name, state in self.optimizers.items()}
            self.store.write(step, self._fragments(), {**objects, "info": self.info})
            self.store.retain(self.keep)
        self.current_step = step
        return folder

    def restore_latest(self) -> Restored | None:
        """Restores the newest checkpoint that is sound, or returns None where there is none. Collective.

        A damaged one is moved aside (`.damaged`) and the one before it is used.

        Raises:
            CorruptCheckpoint: there are checkpoints and none is sound.
            IncompatibleCheckpoint: as `restore`.
        """
        steps = self.mesh.decide(lambda: committed_steps(self.store.directory))
        damaged: list[Path] = []
        for step in reversed(steps):
            folder = step_folder(self.store.directory, step)
            try:
                return Restored(self.restore(folder), folder, damaged)
            except CorruptCheckpoint:
                if step == steps[0]:
                    raise
                damaged.append(self.mesh.decide(lambda folder=folder: self._set_aside(folder, "damaged")))
        return None

    def restore(self, folder: Path) -> int:
        """Restores every object from one checkpoint, of whatever world size and cut. Collective.

        The generators of random numbers are restored if the world size is the one that saved; a rank of another
        world size keeps those it has.

        Returns:
            The step that was saved.

        Raises:
            CorruptCheckpoint: its bytes are not those that were written; the objects are partly overwritten.
            IncompatibleCheckpoint: it is of another model or optimizer; the objects are as they were.
        """
        reader = self.mesh.agree(lambda: CheckpointReader(folder))
        try:
            self.mesh.agree(lambda: self._check_compatible(reader))
            self.mesh.agree(lambda: self._read(reader))
        finally:
            reader.close()
        is_own = folder.resolve().parent == self.store.directory.resolve()
        self.current_step = reader.manifest.step if is_own else None
        return reader.manifest.step

    @torch.no_grad()
    def _read(self, reader: CheckpointReader) -> None:
        # First what may still refuse, such as a loader of other data, while nothing is overwritten.
        for name, value in self.others.items():
            value.load_state_dict(reader.manifest.objects[name])
        for module_name, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                reader.read(fragment_of(f"{module_name}.{name}", tensor), local_tensor(tensor))
        for state in self.optimizers.values():
            state.restore(reader)
        if reader.manifest.world_size == self.mesh.world_size:
            prefix = f"{RNG_PREFIX}.{self.mesh.rank}."
            states = {
                name.removeprefix(prefix): reader.read_whole(name)
                for name in reader.manifest.tensors
                if name.startswith(prefix)
            }
            restore_rng(states, self.mesh.device)

    def _fragments(self) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """What this rank has to say: the blocks it is the first replica of."""
        for module_name, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                if is_first_replica(tensor, self.mesh.rank):
                    yield fragment_of(f"{module_name}.{name}", tensor), local_tensor(tensor)
        for state in self.optimizers.values():
            for name, tensor in state.tensors():
                if is_first_replica(tensor, self.mesh.rank):
                    yield fragment_of(name, tensor), local_tensor(tensor)
        for name, tensor in capture_rng(self.mesh.device).items():
            yield fragment_of(f"{RNG_PREFIX}.{self.mesh.rank}.{name}", tensor), tensor

    def _check_compatible(self, reader: CheckpointReader) -> None:
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
        for name in (*self.optimizers, *self.others):
            if name not in reader.manifest.objects:
                differences.append(f"it has no state of {name}")
        for state in self.optimizers.values():
            differences += state.differences(reader.manifest)
        if differences:
            more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
            raise IncompatibleCheckpoint(
                "resume",
                reader.folder,
                f"is a checkpoint of another model or optimizer: {'; '.join(differences[:3])}{more}",
                "use the configuration it was saved with (config.yaml beside it), or another run_dir",
            )

    def has_any(self) -> bool:
        """Whether the folder holds a committed checkpoint. Collective."""
        return self.mesh.decide(lambda: bool(committed_steps(self.store.directory)))

    def set_newer_aside(self, step: int) -> list[Path]:
        """Renames checkpoints after `step` to `.superseded`, for a run that goes on from `step`. Collective."""
        steps = self.mesh.decide(lambda: committed_steps(self.store.directory))
        newer = [step_folder(self.store.directory, n) for n in steps if n > step]
        return [self.mesh.decide(lambda folder=folder: self._set_aside(folder, "superseded")) for folder in newer]

    def _set_aside(self, folder: Path, why: str) -> Path:
        number, target = 1, folder.with_name(f"{folder.name}.{why}")
        while target.exists():
            number += 1
            target = folder.with_name(f"{folder.name}.{why}{number}")
        folder.rename(target)
        return target


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `resume=PATH` names: itself, or the newest of a run's or a `checkpoints/` folder.

    Raises:
        ConfigError: there is none.
    """
    for directory in (path, path / "checkpoints", *_configured_folder(path)):
        steps = committed_steps(directory)
        if steps:
            return step_folder(directory, steps[-1])
    if (path / MANIFEST).is_file():
        return path
    raise ConfigError(
        "resume",
        path,
        "is neither a checkpoint nor a folder that holds some",
        "name a step-* folder or a run folder; `windlass ckpt list RUN_DIR` lists them",
    )


def _configured_folder(run_dir: Path) -> list[Path]:
    """The `checkpoint.dir` of the run in `run_dir`, where its config.yaml names one."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        directory = config["checkpoint"]["dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [Path(directory)] if directory else []
