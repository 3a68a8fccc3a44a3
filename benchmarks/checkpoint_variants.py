"""The ways to save a checkpoint that `checkpoint.py` compares, each as its users call it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.utils._pytree import tree_map_only

from windlass.checkpoint import Checkpointer
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh

logging.disable(logging.WARNING)  # here, as the process that `dcp-process` starts imports this and logs each request


NEVER = 1_000_000_001  # no step is a multiple of it
POLL_S = 0.005
FINISH_S = 60.0


class Variant(Protocol):
    """One way to save. All ranks call the same methods at the same places of their steps."""

    on_disk: bool
    """Whether each checkpoint is on the disk, not only in memory."""
    waits_for_previous: bool
    """Whether a `save` waits until the checkpoint before is done."""

    def save(self, step: int) -> None:
        """At the border of a step; returns when training may go on."""
        ...

    def wait_staged(self) -> None:
        """Before weights change."""
        ...

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a checkpoint is still being copied, coded or written."""
        ...

    def finish(self) -> None:
        """Waits until nothing is under way."""
        ...

    @property
    def num_skipped(self) -> int:
        """Checkpoints that were due and not taken, because the one before was not done. So far."""
        ...

    def delete(self) -> None:
        """Removes what was written, for room. Nothing is in flight."""
        ...

    def close(self) -> None: ...


class NoCheckpoint:
    """Trains and saves nothing. Also what the synchronous ways have in common: nothing is left to wait for."""

    on_disk = False
    waits_for_previous = True

    @property
    def busy(self) -> bool:
        return False

    @property
    def num_skipped(self) -> int:
        return 0

    def save(self, step: int) -> None:
        pass

    def wait_staged(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def delete(self) -> None:
        pass

    def close(self) -> None:
        pass


class InFolders(NoCheckpoint):
    """A folder a checkpoint. Old ones are deleted between the blocks, so that no peer pays for it."""

    on_disk = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, mesh: Mesh) -> None:
        self.model, self.optimizer, self.directory, self.mesh = model, optimizer, directory, mesh

    def folder(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def delete(self) -> None:
        if self.mesh.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


class TorchSave(InFolders):
    """Each rank writes its own part of all tensors into one file. Nothing waits for the disk."""

    def save(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.folder(step).mkdir(parents=True, exist_ok=True)
        torch.save(tree_map_only(torch.Tensor, local_tensor, state), self.folder(step) / f"rank{self.mesh.rank}.pt")


class Dcp(InFolders):
    """`torch.distributed.checkpoint.save`: returns when the files are synced."""

    def save(self, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=self.folder(step))

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }


class DcpAsync(Dcp):
    """`async_save`: training waits for the copy in memory, and for the checkpoint before where it is not yet written.

    Its collectives have a group of their own, as they run beside those of training, and the copy's memory is kept from
    one checkpoint to the next: without that each copy takes new pages from the kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: Path,
        mesh: Mesh,
        kind: AsyncCheckpointerType,
    ) -> None:
        super().__init__(model, optimizer, directory, mesh)
        self.kind = kind
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
        self.group = group
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,  # for CUDA, as the last two
                use_shared_memory=kind == AsyncCheckpointerType.PROCESS,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self.written: Future[Any] | None = None

    def save(self, step: int) -> None:
        self.finish()
        response = dcp.async_save(
            self.state(),
            checkpoint_id=self.folder(step),
            process_group=self.group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        self.written = response.upload_completion if isinstance(response, AsyncSaveResponse) else response

    @property
    def busy(self) -> bool:
        return self.written is not None and not self.written.done()

    def finish(self) -> None:
        if self.written is not None:
            self.written.result()
            self.written = None

    def close(self) -> None:
        self.finish()
        self.stager.close()


class WindlassDurable(NoCheckpoint):
    """`checkpoint=durable`: returns when the checkpoint is on the disk and committed; keeps two, deletes older ones."""

    on_disk = True

    def __init__(self, objects: Mapping[str, Any], directory: Path, mesh: Mesh) -> None:
        self.checkpointer = Checkpointer(objects, directory, mesh)

    def save(self, step: int) -> None:
        self.checkpointer.save(step)


class WindlassBehind(NoCheckpoint):
    """`checkpoint=lazy` or `erasure`: the copy runs behind forward and backward passes, the rest in snapshot agents.

    Nothing waits for the checkpoint before: one that is not done when the next is due makes that one be skipped.
    `lazy` writes each to the disk, from one agent. With `erasure` each rank is a node of its own and keeps parity for
    the others; nothing is written.
    """

    waits_for_previous = False

    def __init__(self, objects: Mapping[str, Any], directory: Path, mesh: Mesh, kind: str, every: int) -> None:
        self.on_disk = kind == "lazy"
        self.checkpointer = Checkpointer(
            objects,
            directory,
            mesh,
            kind=kind,
            snapshot_every=every,
            persist_every=every if self.on_disk else NEVER,
            num_parity_shards=0 if self.on_disk else 1,
            failure_domain="node" if self.on_disk else "rank",
            lease_s=60.0,  # the agents of a run that was killed end soon
        )
        self.num_due = self.num_done = self.num_lost = 0

    def save(self, step: int) -> None:
        self.num_due += 1
        self.checkpointer.snapshot(step)

    def wait_staged(self) -> None:
        self.checkpointer.wait_staged()

    @property
    def busy(self) -> bool:
        for event in self.checkpointer.poll():
            self.num_done += event["kind"] == ("persisted" if self.on_disk else "snapshot_committed")
            self.num_lost += event["kind"] in ("snapshot_skipped", "snapshot_given_up", "persist_failed")
        return self.num_done + self.num_lost < self.num_due

    @property
    def num_skipped(self) -> int:
        return self.num_lost

    def finish(self) -> None:
        give_up = time.monotonic() + FINISH_S
        while self.busy:
            if time.monotonic() > give_up:
                raise RuntimeError(f"of {self.num_due} checkpoints {self.num_done} are done, {self.num_lost} skipped")
            time.sleep(POLL_S)

    def close(self) -> None:
        self.checkpointer.close()


def local_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What a checkpoint must hold of this rank: weights and optimizer state."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return [local_tensor(tensor).detach() for tensor in (*model.parameters(), *state)]


class CopyLimit:
    """The least that any copy of the state costs: its memory read once and written once, by one thread a rank."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.copies = [tensor.clone() for tensor in tensors]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @torch.no_grad()
    def measure(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        for copy, tensor in zip(self.copies, self.tensors, strict=True):
            copy.copy_(tensor)
        return time.perf_counter() - begin


def build_variant(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, mesh: Mesh, every: int
) -> Variant:
    """The way called `name`, with `directory` for itself and a checkpoint after `every` steps. Collective."""
    objects = {"model": model, "optimizer": optimizer}
    makers: dict[str, Callable[[], Variant]] = {
        "none": NoCheckpoint,
        "torch.save": lambda: TorchSave(model, optimizer, directory, mesh),
        "dcp": lambda: Dcp(model, optimizer, directory, mesh),
        "dcp-thread": lambda: DcpAsync(model, optimizer, directory, mesh, AsyncCheckpointerType.THREAD),
        "dcp-process": lambda: DcpAsync(model, optimizer, directory, mesh, AsyncCheckpointerType.PROCESS),
        "durable": lambda: WindlassDurable(objects, directory, mesh),
        "lazy": lambda: WindlassBehind(objects, directory, mesh, "lazy", every),
        "erasure": lambda: WindlassBehind(objects, directory, mesh, "erasure", every),
    }
    return makers[name]()
