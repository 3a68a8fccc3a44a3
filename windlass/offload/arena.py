"""One piece of host memory from which buffers of exact size are cut, so that what offloading takes is known at once.

Buffers begin at pages and are whole pages long, which direct I/O needs; nothing is rounded to powers of two, which
costs DeepSpeed up to half of its buffers. Memory of the arena is never returned in between: a step reuses it.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
from typing import Any

import torch

from windlass.errors import DoesNotFit
from windlass.offload.direct_io import round_to_pages

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all devices of the process."""


class Buffer:
    """Part of an arena; `data` has exactly the bytes that were asked for, and begins at a page."""

    def __init__(self, arena: Arena, begin: int, num_bytes: int) -> None:
        self.data: torch.Tensor = arena._memory[begin : begin + num_bytes]
        self._arena, self._begin, self._num_bytes = arena, begin, num_bytes
        self._is_held = True

    def release(self) -> None:
        """Gives the memory back. Nothing may use `data` any more."""
        assert self._is_held, "a buffer is released once"
        self._is_held = False
        self._arena._free(self._begin, round_to_pages(self._num_bytes))


class Arena:
    """Host memory for buffers. Pages that no buffer has touched take no memory yet.

    Args:
        num_bytes: of all buffers together, each rounded up to pages; rounded up likewise.
        pin: lock it in memory for the device's copies; needs CUDA.

    Raises:
        ValueError: there is no CUDA device to pin for.
        DoesNotFit: the system does not give so much memory, or does not pin it.
    """

    def __init__(self, num_bytes: int, pin: bool = False) -> None:
        if pin and not torch.cuda.is_available():
            raise ValueError("memory is pinned for CUDA devices, and there is none")
        if num_bytes < 1:
            raise ValueError(f"an arena has at least one byte, not {num_bytes}")
        self.num_bytes = round_to_pages(num_bytes)
        self._memory = _map(self.num_bytes)
        self._is_pinned = False
        self._is_closed = False
        self._has_room = threading.Condition()
        self._holes: list[tuple[int, int]] = [(0, self.num_bytes)]
        """(begin, end) of what is free, in order, no two adjacent."""
        if pin:
            _pin(self._memory)
            self._is_pinned = True

    @property
    def free_bytes(self) -> int:
        with self._has_room:
            return sum(end - begin for begin, end in self._holes)

    def allocate(self, num_bytes: int) -> Buffer:
        """A buffer, as soon as there is room for it.

        Raises:
            ValueError: it is larger than the arena.
            RuntimeError: the arena is closed.
        """
        if round_to_pages(num_bytes) > self.num_bytes:
            raise ValueError(f"a buffer of {num_bytes} bytes does not fit an arena of {self.num_bytes}")
        with self._has_room:
            while (buffer := self._take(num_bytes)) is None:
                self._has_room.wait()
        return buffer

    def try_allocate(self, num_bytes: int, spare_bytes: int = 0) -> Buffer | None:
        """A buffer if there is room for it now, and beside it for another one of `spare_bytes`.

        Raises:
            RuntimeError: the arena is closed.
        """
        with self._has_room:
            buffer = self._take(num_bytes)
            largest = max((end - begin for begin, end in self._holes), default=0)
        if buffer is not None and largest < round_to_pages(spare_bytes):
            buffer.release()
            return None
        return buffer

    def close(self) -> None:
        """Gives the memory back to the system, when the last tensor on it is gone."""
        with self._has_room:
            if self._is_closed:
                return
            self._is_closed = True
            self._has_room.notify_all()
        if self._is_pinned:
            _call_cuda("cudaHostUnregister", self._memory.data_ptr())
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _take(self, num_bytes: int) -> Buffer | None:
        if self._is_closed:
            raise RuntimeError("the arena is closed")
        length = round_to_pages(num_bytes)
        fitting = [hole for hole in self._holes if hole[1] - hole[0] >= length]
        if not fitting:
            return None
        begin, end = min(fitting, key=lambda hole: hole[1] - hole[0])  # leaves large holes whole
        place = self._holes.index((begin, end))
        self._holes[place : place + 1] = [(begin + length, end)] if begin + length < end else []
        return Buffer(self, begin, num_bytes)

    def _free(self, begin: int, length: int) -> None:
        end = begin + length
        if length == 0:
            return
        with self._has_room:
            place = bisect.bisect(self._holes, (begin, end))
            first, last = place, place
            if place > 0 and self._holes[place - 1][1] == begin:
                first, begin = place - 1, self._holes[place - 1][0]
            if place < len(self._holes) and self._holes[place][0] == end:
                last, end = place + 1, self._holes[place][1]
            self._holes[first:last] = [(begin, end)]
            self._has_room.notify_all()


def _map(num_bytes: int) -> torch.Tensor:
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise DoesNotFit(
            "offload.max_host_bytes", num_bytes, f"the system does not give so much memory: {error}", "lower it"
        ) from error
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        # Forked data loaders would have each page copied at its next write, and a disk that writes to the old page
        # would write to theirs. Large pages make direct I/O cheaper, which looks up each page of a transfer.
        with contextlib.suppress(AttributeError, OSError):  # advice that this system does not take
            memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pin(memory: torch.Tensor) -> None:
    try:
        _call_cuda("cudaHostRegister", memory.data_ptr(), memory.nbytes, _PORTABLE)
    except RuntimeError as error:
        raise DoesNotFit(
            "offload.max_host_bytes", memory.nbytes, f"so much memory cannot be pinned: {error}", "lower it"
        ) from error


def _call_cuda(name: str, *arguments: int) -> None:
    """Calls a function of the CUDA runtime. Raises RuntimeError if it fails."""
    runtime: Any = torch.cuda.cudart()
    code = int(getattr(runtime, name)(*arguments))
    if code != 0:
        raise torch.cuda.CudaError(code)
