"""The conveyor: brings the bytes of buckets into buffers ahead of their use, and takes them back behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.offload.arena import Arena, Buffer
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFile, Transfer


class Load:
    """Bytes that are moved as one, and where they are when nobody uses them: a file, or host memory.

    Args:
        home: host memory must be pinned where a GPU is to copy from it.
    """

    def __init__(self, home: TierFile | Tensor) -> None:
        self.home = home

    @property
    def num_bytes(self) -> int:
        return self.home.num_bytes if isinstance(self.home, TierFile) else self.home.nbytes


@dataclass
class _Held:
    """A load that is here, or on its way."""

    buffer: Buffer | None
    """None for what has its home in host memory."""
    reading: Transfer | None
    copy: Tensor | None = None
    """On the device; the host memory itself on a CPU."""
    arrived: torch.cuda.Event | None = None
    is_used: bool = False
    """True if it was asked for, and not only brought ahead."""


@dataclass
class _Leaving:
    """A load on its way back."""

    load: Load
    buffer: Buffer
    arrived: torch.cuda.Event | None
    writing: Transfer | None = None


class Conveyor:
    """Args:
    arena: for loads whose home is a file; the largest of them must fit in.
    """

    def __init__(self, arena: Arena, staging: Staging) -> None:
        self._arena, self._staging = arena, staging
        self._held: dict[Load, _Held] = {}  # in the order in which they were asked for
        self._leaving: deque[_Leaving] = deque()
        self._fading: deque[tuple[Buffer, torch.cuda.Event | None]] = deque()
        """Buffers that are wanted no more, but that a device may still be copying from."""
        self.stall_s = 0.0
        """Seconds that the training has waited here so far."""

    def bring(self, load: Load) -> Tensor:
        """The bytes of `load` (uint8) on the device, as soon as they are there; zeros or anything if it has none yet.

        Raises:
            OffloadError: they cannot be read, or are not those that were written; or an earlier write failed.
        """
        begin = time.perf_counter()
        while not self._fetch(load):
            self._make_room(load)
        held = self._held[load]
        if held.reading is not None:
            held.reading.wait()
        self._stage(load)
        assert held.copy is not None
        held.is_used = True
        self._staging.wait(held.copy, held.arrived)
        self.stall_s += time.perf_counter() - begin
        return held.copy

    def blank(self, loads: Sequence[Load]) -> list[Tensor]:
        """Memory on the device to make the next bytes of each of `loads` in, whatever is there; for `take_back`.

        Raises:
            OffloadError: an earlier write failed.
        """
        begin = time.perf_counter()
        assert not any(load in self._held for load in loads), "what is brought is changed where it is"
        while (blocked := next((load for load in loads if not self._fetch(load, reads=False)), None)) is not None:
            for load in loads:  # where they are they may cut the room in two
                if load in self._held:
                    self.drop(load)
            self._make_room(blocked)
        found = []
        for load in loads:
            held = self._held[load]
            host = load.home if held.buffer is None else held.buffer.data
            assert isinstance(host, Tensor)
            held.copy, held.is_used = self._staging.blank_like(host), True
            found.append(held.copy)
        self.stall_s += time.perf_counter() - begin
        return found

    def look_ahead(self, loads: Iterable[Load], spare: Mapping[Load, int] | None = None) -> None:
        """Begins to bring `loads`, the first first, as far as there is room.

        Args:
            spare: bytes that must stay free beside a load, for what is made before that load is used: it would have to
                be let go for them, and read again.
        """
        self._advance()
        for number, load in enumerate(loads):
            if isinstance(load.home, TierFile) and not load.home.has_data:
                continue
            if not self._fetch(load, spare_bytes=0 if spare is None else spare[load]):
                return
            if number == 0 and (reading := self._held[load].reading) is not None and reading.is_done:
                reading.wait()
                self._stage(load)

    def take_back(self, load: Load) -> None:
        """Begins to bring home what `bring` returned and the computations so far have made of it."""
        held = self._held.pop(load)
        assert held.copy is not None
        if held.buffer is None:
            assert isinstance(load.home, Tensor)
            self._staging.to_host(held.copy, load.home)  # the next copy to the device comes after it
            return
        self._leaving.append(_Leaving(load, held.buffer, self._staging.to_host(held.copy, held.buffer.data)))
        self._advance()

    def drop(self, load: Load) -> None:
        """Lets go of what `bring` returned: it has not been changed, or is not wanted."""
        held = self._held.pop(load)
        if held.reading is not None:
            held.reading.settle()
        if held.buffer is not None:
            self._fading.append((held.buffer, held.arrived))
            self._release_faded()

    def begin_writes(self) -> None:
        """Begins to write everything that was taken back, and waits for the device if need be.

        What has its home in host memory is there then.
        """
        self._staging.synchronize()
        for leaving in self._leaving:
            if leaving.writing is None:
                assert leaving.arrived is not None
                leaving.arrived.synchronize()
                self._begin_write(leaving)

    def drain(self) -> None:
        """Returns when everything that was taken back is home.

        Raises:
            OffloadError: a write failed.
        """
        self._staging.synchronize()
        while self._leaving:
            self._end_oldest()

    def abandon(self) -> None:
        """Waits for what is under way, whatever comes of it, and lets go of everything."""
        for load in list(self._held):
            self.drop(load)
        for leaving in self._leaving:
            if leaving.writing is not None:
                leaving.writing.settle()
            leaving.buffer.release()
        self._leaving.clear()
        while self._fading:
            self._release_faded(wait=True)

    def _fetch(self, load: Load, reads: bool = True, spare_bytes: int = 0) -> bool:
        """Gets `load` a buffer and begins to read it; False if there is no room, or it is still on its way back."""
        if load in self._held:
            return True
        if isinstance(load.home, Tensor):
            self._held[load] = _Held(None, None)
            return True
        if any(leaving.load is load for leaving in self._leaving):
            return False
        buffer = self._arena.try_allocate(load.num_bytes, spare_bytes)
        if buffer is None:
            return False
        reading = load.home.read(buffer.data) if reads and load.home.has_data else None
        self._held[load] = _Held(buffer, reading)
        return True

    def _stage(self, load: Load) -> None:
        held = self._held[load]
        if held.copy is None:
            host = load.home if held.buffer is None else held.buffer.data
            assert isinstance(host, Tensor)
            held.copy, held.arrived = self._staging.to_device(host)

    def _make_room(self, load: Load) -> None:
        """Waits for what leaves, or lets go of what was brought too early."""
        if self._fading:
            self._release_faded(wait=True)
            return
        if self._leaving:
            self._end_oldest()
            return
        early = next((other for other in reversed(self._held) if not self._held[other].is_used), None)
        assert early is not None, f"the arena has no room for {load.num_bytes} bytes beside what is in use"
        self.drop(early)

    def _release_faded(self, wait: bool = False) -> None:
        """Frees the buffers that the device has read; with `wait` at least one, if there is any."""
        while self._fading:
            buffer, arrived = self._fading[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            buffer.release()
            self._fading.popleft()
            wait = False

    def _advance(self) -> None:
        """Does what can be done for those that leave without waiting."""
        self._release_faded()
        for leaving in self._leaving:
            if leaving.writing is None and (leaving.arrived is None or leaving.arrived.query()):
                self._begin_write(leaving)
        while self._leaving and (writing := self._leaving[0].writing) is not None and writing.is_done:
            self._end_oldest()

    def _begin_write(self, leaving: _Leaving) -> None:
        assert isinstance(leaving.load.home, TierFile)
        leaving.writing = leaving.load.home.write(leaving.buffer.data)

    def _end_oldest(self) -> None:
        leaving = self._leaving.popleft()
        try:
            if leaving.writing is None:
                assert leaving.arrived is not None
                leaving.arrived.synchronize()
                self._begin_write(leaving)
            assert leaving.writing is not None
            leaving.writing.wait()
        finally:
            leaving.buffer.release()
