"""Checkpoints of state on a disk: its files are pinned as they are, and read, named and committed behind the training.

Nothing of them is copied where they can be linked: the next step writes to other files. What has to be read is read for
its SHA-256, which is a chunk's name and says later that its bytes are those that were written. Where a step's updates
are put off until the next forward pass, so are the pins: until just before the step after it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from windlass.checkpoint.durable.chunk_file import preamble_of_length
from windlass.checkpoint.durable.stage import spec_of
from windlass.checkpoint.durable.store import DurableStore, WrittenChunk
from windlass.checkpoint.image import Entry
from windlass.checkpoint.objects import CheckpointedObjects
from windlass.checkpoint.pieces import PieceGroup, put_groups
from windlass.errors import RunFolderError
from windlass.out_of_core import Pin, PinnableFile
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass
class _Save:
    """A checkpoint that is under way, on this rank."""

    step: int
    generation: int
    keep: int
    objects: dict[str, Any]
    copies: dict[str, torch.Tensor]
    """Copies, by name, of tensors that not only the optimizer's step changes."""
    began: float
    is_put_off: bool
    pins: list[tuple[Pin, tuple[Entry, ...]]] = field(default_factory=list)
    deferred: list[PieceGroup] = field(default_factory=list)
    """The groups in memory that are written behind the training."""
    written: list[WrittenChunk] = field(default_factory=list)


class PinnedSaver:
    """One checkpoint at a time. Collective unless said otherwise.

    Args:
        is_lazy: also what is in memory is written behind the training, `wait_staged` must be called before weights
            change, a snapshot is skipped while the one before is under way, and a failure is told and ends nothing.
            Else what is in memory is written while training waits, and a failure is raised by the next call.
    """

    def __init__(self, store: DurableStore, objects: CheckpointedObjects, mesh: Mesh, is_lazy: bool) -> None:
        self.store, self.objects, self.mesh, self.is_lazy = store, objects, mesh, is_lazy
        self.committed_step: int | None = None
        """The newest that was committed here."""
        self._background_mesh: Mesh | None = None
        self._thread: threading.Thread | None = None
        self._is_running = False
        """The thread has something to do yet, and to tell."""
        self._put_off: _Save | None = None
        self._under_way: int | None = None
        self._failure: Exception | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._events: list[dict[str, Any]] = []
        for optimizer in objects.out_of_core:
            optimizer.before_step.append(self.wait_staged)

    def take(self, step: int, generation: int, keep: int) -> bool:
        """Begins a checkpoint of `step`; False where `is_lazy` and the one before is under way.

        Raises:
            RunFolderError: a disk is full or refuses; earlier checkpoints are intact.
        """
        if self.is_lazy and any(all_gather_object(self.is_busy, self.mesh.world)):
            self._events.append({"kind": "snapshot_skipped", "step": step})
            return False
        self.finish()
        self._take(step, generation, keep)
        return True

    def save(self, step: int, generation: int, keep: int) -> None:
        """Makes a checkpoint of `step` and returns when it is committed.

        Raises:
            RunFolderError: as `take`.
        """
        is_under_way = self._under_way == step
        self.finish()
        if not (is_under_way and self.committed_step == step):
            self._take(step, generation, keep)
            self._join()
            self._raise_failure()

    def finish(self) -> None:
        """Waits for what is under way.

        Raises:
            RunFolderError: it failed, and not `is_lazy`.
        """
        self._join()
        if self.is_lazy:
            self._failure = None  # `poll` tells of it
        self._raise_failure()

    def wait_staged(self) -> None:
        """Returns when weights may change."""
        self._begin_put_off()
        self._staged.wait()

    def poll(self) -> list[dict[str, Any]]:
        """As `Checkpointer.poll`. Not collective."""
        events, self._events = self._events, []
        return events

    @property
    def is_busy(self) -> bool:
        return self._put_off is not None or self._is_running

    def forget(self) -> None:
        """Forgets what was committed: another state was restored, and is in memory now."""
        self.committed_step = None

    def close(self) -> None:
        """As `finish`, for good."""
        try:
            self.finish()
        finally:
            for optimizer in self.objects.out_of_core:
                if self.wait_staged in optimizer.before_step:
                    optimizer.before_step.remove(self.wait_staged)

    def _join(self) -> None:
        self._begin_put_off()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._under_way = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _take(self, step: int, generation: int, keep: int) -> None:
        has_pending = [optimizer.has_pending for optimizer in self.objects.out_of_core]
        is_put_off = any(all_gather_object(any(has_pending), self.mesh.world))
        objects = copy.deepcopy(self.objects.json_state())  # it is written while what it is of goes on
        copies = self.objects.clone_ownerless()
        save = _Save(step, generation, keep, objects, copies, time.perf_counter(), is_put_off)
        self._under_way = step
        if is_put_off:
            self._put_off = save
        else:
            self._begin(save)

    def _begin_put_off(self) -> None:
        save, self._put_off = self._put_off, None
        if save is not None:
            self._begin(save)

    def _begin(self, save: _Save) -> None:
        if self._background_mesh is None:
            # Training's collectives and these must not meet in one group.
            self._background_mesh = self.mesh
            if self.mesh.world is not None:
                group = dist.new_group(backend="gloo")
                assert isinstance(group, dist.ProcessGroup), "every rank is in it"
                self._background_mesh = replace(self.mesh, world=group)
        self.objects.settle()
        self.objects.refresh_numbers(save.objects)
        try:
            self.mesh.agree(lambda: self._prepare(save))
        except BaseException as error:
            _release(save)
            self._under_way = None
            self._remove_leftovers()
            if not (self.is_lazy and isinstance(error, Exception)):
                raise
            self._events.append(self._fail(save, error))
            return
        if save.deferred and not save.is_put_off:
            self._staged.clear()
        # A program that ends waits for it, so that no checkpoint is lost that was begun.
        self._thread = threading.Thread(target=self._run, args=(save,), name="windlass-checkpoint")
        self._is_running = True
        self._thread.start()

    def _prepare(self, save: _Save) -> None:
        """Pins what can be, and writes, or leaves for later, the rest."""
        groups = [_with_copies(group, save.copies) for group in self.objects.groups()]
        _check_space([group.in_file.file for group in groups if group.in_file is not None])
        rest = []
        for group in groups:
            found = pinned(group)
            if found is None:
                rest.append(group)
            else:
                save.pins.append(found)
        in_memory = [group for group in rest if group.load is None]
        now = [group for group in rest if group.load is not None]
        if not self.is_lazy:
            now = in_memory + now
        elif save.is_put_off:  # the step comes at once
            save.deferred = [_copied(group) for group in in_memory]
        else:
            save.deferred = in_memory
        save.written = put_groups(self.store, now)

    def _run(self, save: _Save) -> None:
        assert self._background_mesh is not None
        mesh, events = self._background_mesh, list[dict[str, Any]]()
        try:
            of_ranks = all_gather_object(mesh.agree(lambda: self._put(save)), mesh.world)
            written = [chunk for rank in of_ranks for chunk in rank]
            mesh.decide(lambda: self._commit(save, written))
            self.committed_step = save.step
            events.append(_persisted(save, written))
            mesh.decide(lambda: self.store.retain(save.keep))
        except Exception as error:  # told or raised in the thread that trains
            self._remove_leftovers()
            events.append(self._fail(save, error))
        finally:
            self._staged.set()
            _release(save)
            self._is_running = False
            self._events += events  # last: whoever hears of it may begin the next

    def _remove_leftovers(self) -> None:
        if self.mesh.rank == 0:
            with contextlib.suppress(RunFolderError):  # the error before says more
                self.store.remove_leftovers()

    def _fail(self, save: _Save, error: Exception) -> dict[str, Any]:
        """Keeps the error for whoever is to raise it; returns the event."""
        logger.warning("the checkpoint of step %d failed: %s", save.step, error)
        self._failure = error
        return {"kind": "persist_failed", "step": save.step, "reason": str(error)}

    def _put(self, save: _Save) -> list[WrittenChunk]:
        if self.mesh.device.type == "cuda":
            torch.cuda.set_device(self.mesh.device)
        try:
            save.written += put_groups(self.store, save.deferred)
        finally:
            save.deferred.clear()
            self._staged.set()
        for pin, entries in save.pins:
            save.written.append(self.store.put_file(pin.path, pin.read, entries))
        return save.written

    def _commit(self, save: _Save, written: list[WrittenChunk]) -> None:
        self.store.commit(save.step, save.generation, self.mesh.world_size, save.objects, written)


def pinned(group: PieceGroup) -> tuple[Pin, tuple[Entry, ...]] | None:
    """The group's file as a chunk that stays as it is, with the blocks in it; None where that cannot be."""
    if group.in_file is None:
        return None
    file = group.in_file.file
    found = zip(group.pieces, group.in_file.begins, strict=True)
    entries = sorted((Entry(spec_of(piece.fragment), begin) for piece, begin in found), key=lambda entry: entry.begin)
    header = preamble_of_length(entries, file.file_bytes - file.header_bytes, file.header_bytes)
    if header is None:
        return None  # so many small tensors that their names do not fit
    try:
        pin = file.pin(header)
    except ValueError:
        return None  # another checkpoint has it under other names
    return pin, tuple(replace(entry, begin=entry.begin + file.header_bytes) for entry in entries)


def _check_space(files: Sequence[PinnableFile]) -> None:
    """The steps to come write to other files: want of room for them is better said now."""
    for folder in {file.folder for file in files}:
        needed = sum(file.more_bytes for file in files if file.folder == folder)
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if needed > free:
            raise RunFolderError(
                "offload.dir",
                folder,
                f"the next step needs {needed:,} bytes more there while a checkpoint keeps what is there now, and "
                f"{free:,} are free",
                "free space there, or lower checkpoint.keep; the checkpoints that are there are intact, and the same "
                "command resumes from the newest",
            )


def _with_copies(group: PieceGroup, copies: dict[str, torch.Tensor]) -> PieceGroup:
    return replace(
        group,
        pieces=[replace(piece, tensor=copies.get(piece.fragment.name, piece.tensor)) for piece in group.pieces],
    )


def _copied(group: PieceGroup) -> PieceGroup:
    return replace(group, pieces=[replace(piece, tensor=piece.tensor.clone()) for piece in group.pieces])


def _persisted(save: _Save, written: list[WrittenChunk]) -> dict[str, Any]:
    return {
        "kind": "persisted",
        "step": save.step,
        "seconds": time.perf_counter() - save.began,
        "bytes": sum({chunk.sha256: chunk.size for chunk in written}.values()),
        "written_bytes": sum(chunk.size for chunk in written if chunk.written),
        "ended": time.time(),
    }


def _release(save: _Save) -> None:
    while save.pins:
        save.pins.pop()[0].release()
