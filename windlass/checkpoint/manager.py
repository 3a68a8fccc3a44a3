"""`Checkpointer`: what a training loop talks to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from windlass.checkpoint.durable import DurableStore, WrittenChunk
from windlass.checkpoint.exchange import PARTIAL
from windlass.checkpoint.manifest import Manifest, step_folder
from windlass.checkpoint.optimizer_state import OptimizerState
from windlass.checkpoint.reader import CheckpointReader, open_checkpoint
from windlass.checkpoint.rng import capture_rng, restore_rng
from windlass.checkpoint.stage import stage_chunks
from windlass.checkpoint.storage import Location, is_same_place, join, resolved, split
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError
from windlass.parallel.collectives import all_gather_object
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
    folder: Location
    set_aside: list[Location] = field(default_factory=list)
    """Newer checkpoints that were moved aside, damaged or superseded, where they are now."""


class Checkpointer:
    """Saves and restores a set of named objects, sharded or not, to the bit.

    Args:
        objects: name -> `nn.Module`, `torch.optim.Optimizer` (of parameters of those modules), or `Stateful`.
        dir: the folder of the checkpoints, the same one for all ranks, made if it is missing; or a URL of fsspec's.
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
        dir: Location,
        mesh: Mesh | None = None,
        *,
        persist_every: int = 100,
        keep: int = 2,
        info: dict[str, Any] | None = None,
        restore_hyperparameters: bool = True,
    ) -> None:
        self.mesh = mesh = mesh or Mesh.of_process_group()
        self.persist_every, self.keep = persist_every, keep
        self.store = DurableStore(dir)
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
        self.generation = 0
        """How often the run has been started again, for the manifests; a store that was fenced refuses lower ones."""

    def due(self, step: int) -> bool:
        return step % self.persist_every == 0

    def save(self, step: int) -> Location:
        """Writes a durable checkpoint and returns when it is committed. Collective.

        The step that was saved or restored last is not written again. An older timeline's checkpoint of this step is
        renamed to `.superseded`.

        Raises:
            RunFolderError: the disk is full or refuses; earlier checkpoints are intact.
        """
        exists = self.mesh.decide(lambda: step in self.store.steps())
        if not exists or step != self.current_step:
            objects = self._objects()
            try:
                of_ranks = all_gather_object(self.mesh.agree(self._put_chunks), self.mesh.group)
                self.mesh.decide(lambda: self._commit(step, objects, [chunk for rank in of_ranks for chunk in rank]))
            except Exception:
                if self.mesh.rank == 0:
                    with contextlib.suppress(RunFolderError):  # the first error says more
                        self.store.remove_leftovers()
                raise
            self.mesh.decide(lambda: self.store.retain(self.keep))
        self.current_step = step
        return step_folder(self.store.location, step)

    def _put_chunks(self) -> list[WrittenChunk]:
        """Writes what this rank has to say, a chunk at a time."""
        return [self.store.put_chunk(chunk, data) for chunk, data in stage_chunks(self._fragments())]

    def _objects(self) -> dict[str, Any]:
        objects: dict[str, Any] = {name: value.state_dict() for name, value in self.others.items()}
        objects |= {name: state.hyperparameters() for name, state in self.optimizers.items()}
        return {**objects, "info": self.info}

    def _commit(self, step: int, objects: dict[str, Any], written: list[WrittenChunk]) -> None:
        self.store.commit(step, self.generation, self.mesh.world_size, objects, written)

    def restore_latest(self) -> Restored | None:
        """Restores the newest checkpoint that is sound, or returns None where there is none. Collective.

        A damaged one is moved aside (`.damaged`) and the one before it is used.

        Raises:
            CorruptCheckpoint: there are checkpoints and none is sound.
            IncompatibleCheckpoint: as `restore`.
        """
        steps = self.mesh.decide(self.store.restorable_steps)
        damaged: list[Location] = []
        for step in reversed(steps):
            folder = step_folder(self.store.location, step)
            try:
                return Restored(self.restore(folder), folder, damaged)
            except CorruptCheckpoint:
                if step == steps[0]:
                    raise
                self._set_damaged_chunks_aside(step)
                damaged.append(self._set_aside(step, "damaged"))
        return None

    def restore(self, folder: Location) -> int:
        """Restores every object from one checkpoint, of whatever world size and cut. Collective.

        The generators of random numbers are restored if the world size is the one that saved; a rank of another
        world size keeps those it has. So do the objects, other than modules, that an imported checkpoint lacks.

        Returns:
            The step that was saved.

        Raises:
            CorruptCheckpoint: its bytes are not those that were written; the objects are partly overwritten.
            IncompatibleCheckpoint: it is of another model or optimizer; the objects are as they were.
        """
        reader = self.mesh.agree(lambda: open_checkpoint(folder))
        try:
            self.mesh.agree(lambda: self._check_compatible(reader))
            self.mesh.agree(lambda: self._read(reader))
        finally:
            reader.close()
        is_own = self.owns(folder)
        self.current_step = reader.manifest.step if is_own else None
        return reader.manifest.step

    @torch.no_grad()
    def _read(self, reader: CheckpointReader) -> None:
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

    def has_any(self) -> bool:
        """Whether the folder holds a committed checkpoint. Collective."""
        return self.mesh.decide(lambda: bool(self.store.steps()))

    def owns(self, folder: Location) -> bool:
        """Whether `folder` is a checkpoint of this run."""
        return is_same_place(split(resolved(folder))[0], self.store.location)

    def set_newer_aside(self, step: int) -> list[Location]:
        """Renames checkpoints after `step` to `.superseded`, for a run that goes on from `step`. Collective."""
        steps = self.mesh.decide(self.store.steps)
        return [self._set_aside(newer, "superseded") for newer in steps if newer > step]

    def _set_aside(self, step: int, why: str) -> Location:
        return join(self.store.location, self.mesh.decide(lambda: self.store.set_aside(step, why)))

    def _set_damaged_chunks_aside(self, step: int) -> None:
        """Each rank reads its part of them."""
        rank, world_size = self.mesh.rank, self.mesh.world_size
        self.mesh.agree(lambda: self.store.set_damaged_chunks_aside(step, rank, world_size))


def _begins_anew(name: str, manifest: Manifest) -> bool:
    """Whether an object stays as it is: only a checkpoint that was imported, and says so, may lack its state."""
    return name not in manifest.objects and manifest.objects.get("info", {}).get(PARTIAL) is True
