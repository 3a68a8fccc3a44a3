"""Moves what autograd saves for the backward pass out of the device's memory until it is needed.

A forward pass saves tensors in one order, and the backward pass needs them in about the opposite one. So what was saved
last stays where it is, and what was saved first moves out: from a GPU to host memory, from there to the disk, written
behind the forward pass. In backward it comes back ahead of its use. On a CPU tensors are in host memory from the start,
and only the disk is below. Not a bit changes.

MEMO: Fine-grained Tensor Management For Ultra-long Context LLM Training, 2024.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.offload.arena import Arena, Buffer
from windlass.offload.malloc import free_to_system
from windlass.offload.saved import Cast, Pack, Packer, SavedStorage, View, storage_bytes
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFile, TierFolder

MIN_BYTES = 1 << 20
"""Smaller tensors stay: there is little to gain, and a transfer has its fixed cost."""


@dataclass
class ActivationFigures:
    """The bytes that have been moved so far, and the wait for them."""

    host_bytes: int = 0
    """From a GPU to host memory."""
    write_bytes: int = 0
    """To the disk."""
    read_bytes: int = 0
    """From the disk."""
    stall_s: float = 0.0
    """Seconds that the training has waited for transfers."""
    peak_near_bytes: int = 0
    """The most that was saved and had not moved, or was back."""


class ActivationOffload:
    """Moves what autograd saves in forward passes under `offloaded`.

        with activations.offloaded():
            loss = model(batch)
        loss.backward()

    Each storage is moved once, however many views of it are saved. Parameters and views of them stay, and so do tensors
    of other devices and subclasses. A parameter's copy in another dtype (as of float32 weights in a bfloat16 pass) is
    neither kept nor moved, but made again. A tensor larger than the arena stays too.

    On a CPU the process's malloc gives back to the system what is freed from now on, or moving would not make it any
    smaller: see `free_to_system`.

    As with autograd itself, a saved tensor must not be written to before the backward pass has used it.

    Args:
        device: of the tensors to move; others stay.
        near_bytes: what may stay where it is. On a CPU this is the budget of host memory but for the arena; on a GPU it
            is device memory, and as much comes back ahead of its use.
        arena: buffers for transfers, pinned for a GPU. On a GPU what is not on the disk lies here.
        folder: on the disk. None: what no longer fits the arena stays on the device.
        min_bytes: storages below this size stay.
    """

    def __init__(
        self,
        device: torch.device,
        near_bytes: int,
        arena: Arena,
        folder: TierFolder | None = None,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        assert folder is not None or device.type != "cpu", "on a CPU there is nothing but the disk to move to"
        self.figures = ActivationFigures()
        self._device, self._near_limit = device, near_bytes
        self._packer = Packer(device, min_bytes)
        self._arena, self._folder = arena, folder
        if device.type == "cpu":
            free_to_system(min_bytes)
        self._staging = Staging(device)
        # On a CPU the arena holds only what is on its way to the disk, or back.
        self._unwritten_limit = arena.num_bytes // 2 if device.type != "cpu" else 0
        self._lock = threading.RLock()  # a GPU's part of a backward pass runs in a thread of its own
        self._near: dict[SavedStorage, None] = {}
        self._near_bytes = 0
        self._unwritten: dict[SavedStorage, None] = {}
        """In the arena alone."""
        self._unwritten_bytes = 0
        self._moved: dict[SavedStorage, None] = {}
        """In the order of moving, which is that of saving."""
        self._ending: list[SavedStorage] = []
        """Dead, with transfers under way."""
        self._spare_files: defaultdict[int, list[TierFile]] = defaultdict(list)

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Lets autograd's saved tensors move while it lasts.

        Raises:
            OffloadError: an earlier write failed.
            DoesNotFit: the disk is full.
        """
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        with self._lock:
            self._read_ahead()

    def close(self) -> None:
        """Waits for what is under way. Nothing that was saved may be needed any more."""
        with self._lock:
            self._clean_up()
            for storage in self._ending:
                storage.settle()
            self._clean_up()

    def _pack(self, tensor: Tensor) -> Pack:
        with self._lock:
            self._clean_up()
            packed, new_storage = self._packer.pack(tensor)
            if new_storage is not None:
                self._add_near(new_storage)
                self._move_out()
            return packed

    def _unpack(self, packed: Pack) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, Cast):
            return packed.make()
        assert isinstance(packed, View)
        with self._lock:
            self._clean_up()
            storage = packed.saved.storage
            tensor = packed.of(self._bring(storage))
            self._read_ahead()
            return tensor

    def _add_near(self, storage: SavedStorage) -> None:
        self._near[storage] = None
        self._near_bytes += storage.num_bytes
        self.figures.peak_near_bytes = max(self.figures.peak_near_bytes, self._near_bytes)

    def _remove_near(self, storage: SavedStorage) -> None:
        if storage in self._near:
            del self._near[storage]
            self._near_bytes -= storage.num_bytes
        storage.tensor = None

    # ---- out ----

    def _move_out(self) -> None:
        """Moves what was saved first, until no more than the limit is left."""
        for storage in list(self._near) if self._near_bytes > self._near_limit else ():
            tensor = storage.tensor  # a storage may die at any time
            if tensor is None or storage.num_bytes > self._arena.num_bytes:
                continue
            storage.check_unchanged(tensor)
            if not storage.is_elsewhere and not self._copy_out(storage, tensor):
                return
            self._remove_near(storage)
            if self._near_bytes <= self._near_limit:
                return

    def _copy_out(self, storage: SavedStorage, tensor: Tensor) -> bool:
        """Begins to copy a storage into the arena, and on to the disk. False if there is no room."""
        buffer = self._find_buffer(storage, may_wait=True)
        if buffer is None:
            return False
        if self._device.type == "cpu":
            buffer.data.copy_(storage_bytes(tensor))
        else:
            storage.copying = self._staging.to_host(storage_bytes(tensor), buffer.data)
            self.figures.host_bytes += storage.num_bytes
        storage.buffer = buffer
        self._moved[storage] = self._unwritten[storage] = None
        self._unwritten_bytes += storage.num_bytes
        while self._folder is not None and self._unwritten_bytes > self._unwritten_limit:
            self._write(next(iter(self._unwritten)))
        return True

    def _write(self, storage: SavedStorage) -> None:
        """Begins to write a storage of the arena to the disk."""
        assert storage.buffer is not None and self._folder is not None
        if storage.copying is not None:
            self._wait(storage.copying.synchronize)
        spares = self._spare_files[storage.num_bytes]
        storage.file = spares.pop() if spares else self._folder.create(storage.num_bytes)
        storage.moving = storage.file.write(storage.buffer.data)
        self.figures.write_bytes += storage.num_bytes
        self._forget_unwritten(storage)

    def _forget_unwritten(self, storage: SavedStorage) -> None:
        if storage in self._unwritten:
            del self._unwritten[storage]
            self._unwritten_bytes -= storage.num_bytes

    # ---- back ----

    def _bring(self, storage: SavedStorage) -> Tensor:
        """A tensor of the storage, for computations that follow."""
        if storage.tensor is None:
            if storage.buffer is None:
                self._read(storage, may_wait=True)
            self._copy_back(storage)
        tensor = storage.tensor
        assert tensor is not None
        storage.check_unchanged(tensor)
        self._staging.wait(tensor, storage.arriving)
        return tensor

    def _read(self, storage: SavedStorage, may_wait: bool) -> bool:
        """Begins to read a storage into the arena. False if there is no room."""
        assert storage.file is not None
        buffer = self._find_buffer(storage, may_wait)
        if buffer is None:
            assert not may_wait, "the storage has been in the arena before"
            return False
        try:
            storage.moving = storage.file.read(buffer.data)
        except BaseException:
            buffer.release()
            raise
        storage.buffer, storage.is_reading = buffer, True
        self.figures.read_bytes += storage.num_bytes
        return True

    def _copy_back(self, storage: SavedStorage) -> None:
        """Begins to copy a storage from its buffer to the device."""
        assert storage.buffer is not None
        if storage.is_reading:
            assert storage.moving is not None
            self._wait(storage.moving.wait)
        if self._device.type == "cpu":
            storage.set_copy(storage.buffer.data.clone(), None)
        else:
            storage.set_copy(*self._staging.to_device(storage.buffer.data))
        self._add_near(storage)

    def _read_ahead(self) -> None:
        """Begins to bring what has moved, what was saved last first, as far as there is room."""
        may_copy = self._device.type != "cpu"
        for storage in reversed(list(self._moved)):
            if storage.tensor is not None or storage not in self._moved:
                continue
            if storage.buffer is None and not self._read(storage, may_wait=False):
                return
            may_copy = may_copy and self._near_bytes + storage.num_bytes <= self._near_limit
            if may_copy and not (storage.is_reading and not storage.is_settled):
                self._copy_back(storage)

    # ---- room ----

    def _find_buffer(self, wanted: SavedStorage, may_wait: bool) -> Buffer | None:
        """Room for `wanted` in the arena; if need be that of a storage that is needed later and is on the disk."""
        while (buffer := self._arena.try_allocate(wanted.num_bytes)) is None:
            if not self._make_room(wanted, may_wait):
                return None
        return buffer

    def _make_room(self, wanted: SavedStorage, may_wait: bool) -> bool:
        """Frees a buffer. False if none can be: without waiting, and of what is needed later than `wanted`."""
        if self._clean_up():
            return True
        holders = [storage for storage in self._moved if storage.buffer is not None]  # in the order of saving
        for storage in holders:
            if storage.tensor is not None and storage.is_settled:
                self._drop_buffer(storage)  # it is back
                return True
        for storage in holders:
            if (may_wait or storage.index < wanted.index) and storage.file is not None and storage.is_settled:
                self._drop_buffer(storage)
                return True
        if not may_wait:
            return False
        for storage in [*self._ending, *holders]:
            if storage.file is None and self._folder is not None:
                self._write(storage)
            if storage.file is not None:
                self._wait(storage.settle)
                return True
        return False

    def _drop_buffer(self, storage: SavedStorage) -> None:
        """Gives back the buffer of a storage that is elsewhere too. Raises OffloadError if its writing failed."""
        assert storage.buffer is not None
        if storage.moving is not None and not storage.is_reading:
            storage.moving.wait()
        storage.buffer.release()
        storage.buffer, storage.is_reading = None, False
        if storage.file is None:
            self._forget_unwritten(storage)
            del self._moved[storage]

    def _clean_up(self) -> bool:
        """Gives back what dead storages hold; True if a buffer was among it."""
        while self._packer.dead:
            storage = self._packer.dead.popleft()
            self._packer.forget(storage)
            self._remove_near(storage)
            self._moved.pop(storage, None)
            self._forget_unwritten(storage)
            self._ending.append(storage)
        gave_buffer = False
        still: list[SavedStorage] = []
        for storage in self._ending:
            if not storage.is_settled:
                still.append(storage)
                continue
            if storage.buffer is not None:
                storage.buffer.release()
                gave_buffer = True
            if storage.file is not None:
                self._spare_files[storage.num_bytes].append(storage.file)
        self._ending = still
        return gave_buffer

    def _wait(self, wait: Callable[[], None]) -> None:
        begin = time.perf_counter()
        wait()
        self.figures.stall_s += time.perf_counter() - begin
