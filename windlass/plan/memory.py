"""Replays the C library's heap: from what is taken and given back to what the process holds.

A process keeps memory that it has given back where the heap is cut up, and takes large pieces from the system and
returns them at once. Both are decided by glibc's malloc, whose rules are few, so the replay finds the high-water mark
that the kernel will report.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from windlass.plan.recorder import MMAP_THRESHOLD_MAX, MemoryEvent, MemoryKind

PAGE_BYTES = 4096
_HEADER_BYTES = 16
_ALIGNMENT = 64
"""The alignment of tensors, which torch asks for."""
_MMAP_THRESHOLD = 128 * 1024
_TOP_PAD = 128 * 1024
_SLIVER_BYTES = 96
"""The bytes that an aligned request asks for besides: a piece that is cut off again and holds small objects."""
SMALL_OBJECTS = 0.6
"""The slivers that are taken for each tensor that lives. Small objects (autograd's nodes, torch's handles of tensors)
keep holes from growing together; measured on whole runs of 1.6M to 134M parameters."""
STREAMED_SMALL_OBJECTS = 0.75
"""The same where weights come and go; of runs of 58M to 368M parameters, that came out between 0.4 and 1.0, the most
where the optimizer steps in the backward pass."""


class Heap:
    """glibc's main arena: best fit, neighbours that are free are one, the free end is given back when it is long.

    Pieces from `mmap_threshold` on that no hole takes are mapped one by one; the threshold rises to the largest such
    piece that was given back, up to 32 MiB.

    Args:
        mmap_threshold: a threshold that stays, as `windlass.offload.malloc` sets it in a process that has given back
            a large piece before.
    """

    def __init__(self, small_objects: float = SMALL_OBJECTS, mmap_threshold: int | None = None) -> None:
        self._is_fixed = mmap_threshold is not None
        self.mmap_threshold = mmap_threshold or _MMAP_THRESHOLD
        self._trim_threshold = 2 * (MMAP_THRESHOLD_MAX if self._is_fixed else _MMAP_THRESHOLD)
        self.end = 0
        """The end of what the heap has taken from the system."""
        self.top = 0
        """The begin of its free end."""
        self.mapped_bytes = 0
        self.high_water_bytes = 0
        self._small_objects = small_objects
        self._slivers: deque[int] = deque()  # addresses
        self._placed: dict[int, tuple[int, int]] = {}  # block -> (address, or -1 for a mapped one; bytes)
        self._holes: list[tuple[int, int]] = []  # (bytes, address), sorted
        self._hole_at: dict[int, int] = {}  # address -> bytes
        self._hole_ending_at: dict[int, int] = {}  # end -> address
        self._released: dict[int, int] = {}  # address of a hole -> bytes of it that the system has
        self._released_top = 0
        self._num_released = 0

    @property
    def held_bytes(self) -> int:
        return self.end + self.mapped_bytes - self._num_released

    def take(self, block: int, num_bytes: int) -> None:
        size = -(-(num_bytes + _HEADER_BYTES) // _ALIGNMENT) * _ALIGNMENT
        address = self._find(size + _SLIVER_BYTES)
        if address == -1:
            size = -(-size // PAGE_BYTES) * PAGE_BYTES
            self.mapped_bytes += size
        else:
            self._slivers.append(address + size)
        self._placed[block] = address, size
        while len(self._slivers) > self._small_objects * len(self._placed):
            self._give_back(self._slivers.popleft(), _SLIVER_BYTES)
        self.high_water_bytes = max(self.high_water_bytes, self.held_bytes)

    def map(self, num_bytes: int) -> None:
        """Pages of a mapping that is not malloc's, and stays."""
        self.mapped_bytes += num_bytes
        self.high_water_bytes = max(self.high_water_bytes, self.held_bytes)

    def trim(self) -> None:
        """Gives the system all whole pages that are free, as `malloc_trim` does."""
        for size, address in self._holes:
            begin, end = -(-address // PAGE_BYTES) * PAGE_BYTES, (address + size) // PAGE_BYTES * PAGE_BYTES
            self._release(address, max(0, end - begin))
        self.end = -(-self.top // PAGE_BYTES) * PAGE_BYTES
        self._num_released -= self._released_top
        self._released_top = 0

    def _release(self, address: int, num_bytes: int) -> None:
        """So many bytes of the hole at `address` are the system's from now on."""
        self._num_released += num_bytes - self._released.pop(address, 0)
        if num_bytes:
            self._released[address] = num_bytes

    def _find(self, size: int) -> int:
        """The address of `size` bytes that are taken from now on; -1 where they are mapped on their own."""
        index = bisect_left(self._holes, (size, -1))
        if index < len(self._holes):
            hole_size, address = self._holes[index]
            released = self._remove_hole(address, hole_size)
            if hole_size > size:
                self._add_hole(address + size, hole_size - size, max(0, released - size))
            return address
        if self.end - self.top < size:
            if size >= self.mmap_threshold:
                return -1
            self.end = self.top + size + _TOP_PAD
        self.top += size
        again = min(size, self._released_top)
        self._released_top -= again
        self._num_released -= again
        return self.top - size

    def free(self, block: int) -> None:
        address, size = self._placed.pop(block)
        if address >= 0:
            self._give_back(address, size)
            return
        self.mapped_bytes -= size
        if self.mmap_threshold < size <= MMAP_THRESHOLD_MAX and not self._is_fixed:
            self.mmap_threshold, self._trim_threshold = size, 2 * size

    def _give_back(self, address: int, size: int) -> None:
        released = 0
        if address in self._hole_ending_at:
            before = self._hole_ending_at[address]
            size += self._hole_at[before]
            address = before
            released += self._remove_hole(before, self._hole_at[before])
        if address + size in self._hole_at:
            after = address + size
            size += self._hole_at[after]
            released += self._remove_hole(after, self._hole_at[after])
        if address + size != self.top:
            self._add_hole(address, size, released)
            return
        self.top = address
        self._released_top += released
        self._num_released += released
        if self.end - self.top >= self._trim_threshold:
            self.end = self.top + _TOP_PAD
            self._num_released -= self._released_top
            self._released_top = 0

    def _add_hole(self, address: int, size: int, released: int) -> None:
        insort(self._holes, (size, address))
        self._hole_at[address] = size
        self._hole_ending_at[address + size] = address
        self._release(address, released)

    def _remove_hole(self, address: int, size: int) -> int:
        """Returns how many of its bytes are the system's: they are to be counted again, or are used from now on."""
        del self._holes[bisect_left(self._holes, (size, address))]
        del self._hole_at[address]
        del self._hole_ending_at[address + size]
        released = self._released.get(address, 0)
        self._release(address, 0)
        return released


def replay(
    events: Iterable[MemoryEvent], small_objects: float = SMALL_OBJECTS, mmap_threshold: int | None = None
) -> Heap:
    """The heap after `events`."""
    heap = Heap(small_objects, mmap_threshold)
    for event in events:
        match event.kind:
            case MemoryKind.take:
                heap.take(event.block, event.num_bytes)
            case MemoryKind.free:
                heap.free(event.block)
            case MemoryKind.map:
                heap.map(event.num_bytes)
            case MemoryKind.trim:
                heap.trim()
    return heap


def live_peak(events: Iterable[MemoryEvent]) -> int:
    """The most bytes of tensors that are alive at a time."""
    live = peak = 0
    for event in events:
        live += -event.num_bytes if event.kind == MemoryKind.free else event.num_bytes
        peak = max(peak, live)
    return peak
