"""The lazy copy: state goes into a slot behind the training, while nothing changes it.

Weights and optimizer state stay as they are from the end of one optimizer step to the next (DataStates-LLM, Maurya et
al. 2024). A thread copies them during the forward and backward passes in between; `wait` ends the copy, or waits for
some tensors only, before they change. From a GPU a stream of its own copies into a ring of pinned memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.image import Chunk
from windlass.checksum import crc32c
from windlass.parallel.fragment import local_tensor

RING_BYTES = 32 << 20
"""The size of each of the two pinned buffers."""


@dataclass(frozen=True)
class CopyItem:
    """A contiguous tensor and where its bytes go, from the start of the region."""

    source: torch.Tensor
    begin: int


class Copy:
    """One snapshot's way into its region.

    Args:
        region: this rank's part of the slot, from a multiple of `BLOCK_BYTES`.
        head: what goes before the items; copied at once.
        items: in the order of their places.
        owners: by `id`, where in the region the last byte of a parameter and of its state is; for `wait`.
        finished: called in the copying thread with a CRC32C a block, or with the error that ended the copy.
    """

    def __init__(
        self,
        region: memoryview,
        head: bytes,
        items: list[CopyItem],
        owners: dict[int, int],
        finished: Callable[[np.ndarray, Exception | None], None],
    ) -> None:
        self._region, self._items, self._owners, self._finished = region, items, owners, finished
        self._checksums = np.zeros(-(-len(region) // BLOCK_BYTES), np.uint32)
        self._progress = threading.Condition()
        self._copied = 0  # bytes of the region; all before them are in place
        self._is_done = False
        self._blocks = 0
        region[: len(head)] = head
        self._ready: torch.cuda.Event | None = None
        if any(item.source.is_cuda for item in items):
            self._ready = torch.cuda.Event()
            self._ready.record()  # after whatever is still computing what is to be copied
        threading.Thread(target=self._run, name="windlass-snapshot", daemon=True).start()

    def wait(self, tensors: Iterable[torch.Tensor] | None = None) -> None:
        """Returns when `tensors` and their state may change; all of them for None."""
        if tensors is None:
            with self._progress:
                self._progress.wait_for(lambda: self._is_done)
            return
        end = max((self._owners.get(id(tensor), 0) for tensor in tensors), default=0)
        with self._progress:
            self._progress.wait_for(lambda: self._copied >= end or self._is_done)

    @property
    def is_done(self) -> bool:
        return self._is_done

    @torch.no_grad()
    def _run(self) -> None:
        error: Exception | None = None
        try:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._region))
            for source, nbytes, begin in self._host_items():
                self._copy(source, nbytes, address, begin)
            self._sum_blocks(len(self._region))
        except Exception as caught:  # told to who waits for the snapshot; training goes on
            error = caught
        self._items.clear()
        with self._progress:
            self._is_done = True
            self._progress.notify_all()
        self._finished(self._checksums, error)

    def _copy(self, source: int, nbytes: int, address: int, begin: int) -> None:
        """Copies and sums a block at a time, so that it is still in a cache when it is summed."""
        done = 0
        while done < nbytes:
            place = begin + done
            count = min(nbytes - done, BLOCK_BYTES - place % BLOCK_BYTES)
            ctypes.memmove(address + place, source + done, count)
            done += count
            self._sum_blocks(place + count)
        with self._progress:
            self._copied = begin + nbytes
            self._progress.notify_all()

    def _sum_blocks(self, end: int) -> None:
        """The checksums of blocks that end at or before `end`, which is whole now; of the last one if it is the end."""
        num_whole = -(-end // BLOCK_BYTES) if end == len(self._region) else end // BLOCK_BYTES
        for number in range(self._blocks, num_whole):
            self._checksums[number] = crc32c(self._region[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        self._blocks = max(self._blocks, num_whole)

    def _host_items(self) -> Iterator[tuple[int, int, int]]:
        """(address, bytes, place) of each item, in memory that stays as it is until the next is asked for."""
        if self._ready is None:
            for item in self._items:
                yield item.source.data_ptr(), item.source.nbytes, item.begin
            return
        yield from self._through_ring(self._ready)

    def _through_ring(self, ready: torch.cuda.Event) -> Iterator[tuple[int, int, int]]:
        """Copies from a GPU: while one buffer's bytes go on into the slot, the other is filled."""
        device = next(item.source.device for item in self._items if item.source.is_cuda)
        stream = torch.cuda.Stream(device)
        stream.wait_event(ready)
        ring = [torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        in_flight: list[tuple[torch.cuda.Event, int, int, int]] = []
        for number, (part, begin) in enumerate(_parts(self._items, RING_BYTES)):
            buffer = ring[number % 2]
            with torch.cuda.stream(stream):
                buffer[: part.numel()].copy_(part, non_blocking=True)
                event = torch.cuda.Event()
                event.record(stream)
            in_flight.append((event, buffer.data_ptr(), part.numel(), begin))
            if len(in_flight) == 2:
                yield _arrived(in_flight.pop(0))
        for waiting in in_flight:
            yield _arrived(waiting)


def _arrived(waiting: tuple[torch.cuda.Event, int, int, int]) -> tuple[int, int, int]:
    event, *place = waiting
    event.synchronize()
    source, nbytes, begin = place
    return source, nbytes, begin


def _parts(items: Iterable[CopyItem], max_bytes: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The bytes of the items, at most `max_bytes` at a time, and their places."""
    for item in items:
        data = item.source.reshape(-1).view(torch.uint8)
        for start in range(0, data.numel(), max_bytes):
            yield data[start : start + max_bytes], item.begin + start


def copy_items(chunks: Iterable[Chunk], image_begin: int, tensors: dict[str, torch.Tensor]) -> list[CopyItem]:
    """The parts of local `tensors`, by name, and where they go in a region whose image begins at `image_begin`.

    A part that is not contiguous in memory is copied here and now.
    """
    items = []
    taken: dict[str, int] = {}  # elements: the parts of a tensor come in order
    for chunk in chunks:
        for entry in chunk.entries:
            local = tensors[entry.spec.name]
            flat = local_tensor(local).contiguous().reshape(-1)
            start = taken.get(entry.spec.name, 0)
            count = entry.spec.nbytes // flat.element_size()
            taken[entry.spec.name] = start + count
            if count:
                items.append(CopyItem(flat[start : start + count], image_begin + entry.begin))
    return items
