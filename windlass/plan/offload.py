"""The tiers of a run that is only planned: everything that decides is the run's own, and nothing is read or written.

Buckets, layouts, hooks, the order of reading ahead and what comes and goes are `windlass.offload`'s, on fake tensors.
What is exchanged is its lowest layer: files say to the recorder what would be moved, and buffers are of memory that is
not there, which tells how many of its pages would be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from windlass.offload.arena import Arena
from windlass.offload.config import OffloadConfig, OffloadKind, WeightsPlace
from windlass.offload.conveyor import Conveyor, Load
from windlass.offload.direct_io import Transfer, round_to_pages
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFile, TierFolder, file_bytes
from windlass.offload.tiers import STREAMED_MIN_BYTES, Tiers
from windlass.offload.unit_hooks import parameters_by_unit
from windlass.offload.weights import Weights, most_bytes
from windlass.plan.recorder import Recorder

HUGE_PAGE_BYTES = 2 << 20
"""Buffers ask for pages of this size, so that much is used from the first byte on."""


class _Transfer(Transfer):
    """Ends when somebody waits for it, and not before: so nobody goes on because it happened to be over."""

    def __init__(self, recorder: Recorder, num_bytes: int, is_write: bool) -> None:
        super().__init__(0)
        self._recorder = recorder
        self._number = recorder.transfer(num_bytes, is_write=is_write)
        self._is_done = is_write  # what waits for room waits for the reading that comes after the write

    @property
    def is_done(self) -> bool:
        return self._is_done

    def wait(self) -> None:
        if not self._is_done:
            self._is_done = True
            self._recorder.wait(self._number)

    def settle(self) -> None:
        """Nothing is under way."""


class _File(TierFile):
    """Says what would be read and written."""

    def __init__(self, recorder: Recorder, arenas: dict[int, _Pages], num_bytes: int) -> None:
        self.num_bytes, self.has_data = num_bytes, False
        self._recorder, self._arenas = recorder, arenas

    def write(self, data: Tensor) -> Transfer:
        self.has_data = True
        return self._transfer(data, is_write=True)

    def read(self, into: Tensor) -> Transfer:
        return self._transfer(into, is_write=False)

    def _transfer(self, data: Tensor, is_write: bool) -> Transfer:
        self._arenas[id(data.untyped_storage())].use(int(data.storage_offset()), data.nbytes)
        return _Transfer(self._recorder, round_to_pages(data.nbytes), is_write)


class _Folder(TierFolder):
    """A folder of files that are not there."""

    def __init__(self, recorder: Recorder, arenas: dict[int, _Pages]) -> None:
        self._recorder, self._arenas = recorder, arenas
        self.num_bytes = 0
        """The size of all files' data."""
        self.file_bytes = 0
        """The room that the files take."""

    def reserve(self, num_bytes: int) -> None:
        """The plan says whether there is room."""

    def create(self, num_bytes: int) -> TierFile:
        self.num_bytes += num_bytes
        self.file_bytes += file_bytes(num_bytes)
        return _File(self._recorder, self._arenas, num_bytes)

    def close(self) -> None:
        """Nothing was made."""


class _Pages:
    """The pages of an arena that have been used."""

    def __init__(self, recorder: Recorder, num_bytes: int) -> None:
        self._recorder, self._num_bytes = recorder, num_bytes
        self._is_used = bytearray(-(-num_bytes // HUGE_PAGE_BYTES))

    @property
    def used_bytes(self) -> int:
        return min(self._num_bytes, HUGE_PAGE_BYTES * sum(self._is_used))

    def use(self, begin: int, num_bytes: int) -> None:
        before = self.used_bytes
        for page in range(begin // HUGE_PAGE_BYTES, -(-(begin + num_bytes) // HUGE_PAGE_BYTES)):
            self._is_used[page] = True
        if self.used_bytes > before:
            self._recorder.touch(self.used_bytes - before)


class _Conveyor(Conveyor):
    """Knows when what it has brought is being used."""

    def __init__(self, arena: Arena, staging: Staging) -> None:
        super().__init__(arena, staging)
        self.in_use: set[Load] = set()

    def bring(self, load: Load) -> Tensor:
        data = super().bring(load)
        self.in_use.add(load)
        return data

    def blank(self, loads: Sequence[Load]) -> list[Tensor]:
        blanks = super().blank(loads)
        self.in_use.update(loads)
        return blanks

    def take_back(self, load: Load) -> None:
        self.in_use.discard(load)
        super().take_back(load)

    def drop(self, load: Load) -> None:
        self.in_use.discard(load)
        super().drop(load)


class PlannedTiers(Tiers):
    """The tiers of a rank of a run, without a disk and without memory. To be closed.

    Args:
        config: of a run whose activations stay in memory.
    """

    def __init__(self, config: OffloadConfig, recorder: Recorder, *, computes_in_bfloat16: bool) -> None:
        self._recorder = recorder
        self._pages: dict[int, _Pages] = {}  # by id of the arena's storage
        self._conveyors: list[_Conveyor] = []
        super().__init__(
            replace(config, max_activation_bytes=None),
            None,
            0,
            torch.device("cpu"),
            computes_in_bfloat16=computes_in_bfloat16,
            is_checkpointed=False,
        )
        self.give_back_free_memory = recorder.trim
        self._files = _Folder(recorder, self._pages)
        if config.name == OffloadKind.ssd:
            self.folder = self._files
            self._host_bytes_left = config.max_host_bytes or 0
        recorder.is_moving = lambda: any(conveyor.in_use for conveyor in self._conveyors)

    def _arena(self, num_bytes: int) -> Arena:
        arena = Arena(num_bytes)  # maps addresses: no page of it is ever used
        arena._memory = self._recorder.map(arena.num_bytes)
        self._pages[id(arena._memory.untyped_storage())] = _Pages(self._recorder, arena.num_bytes)
        return arena

    def _conveyor(self, num_bytes: int) -> Conveyor:
        self._conveyors.append(_Conveyor(self._arena(num_bytes), Staging(self.device)))
        return self._conveyors[-1]

    def stream_weights(self, model: nn.Module, units: Sequence[Sequence[nn.Module]]) -> Weights | None:
        # Not the parent's, which would change the malloc of the process that plans.
        if self.config.weights == WeightsPlace.streamed:
            self._recorder.trace.mmap_threshold = STREAMED_MIN_BYTES
            conveyor = self._conveyor(max(self.config.buffer_bytes // 3, most_bytes(parameters_by_unit(model, units))))
            self.weights = Weights(conveyor, self._make_home, self._in_halves)
        return self.weights

    def reserve(self) -> None:
        """Makes places for the optimizer's state."""
        optimizer, trace = self.optimizer, self._recorder.trace
        assert optimizer is not None
        trace.disk_weights_bytes = self._files.num_bytes
        optimizer.reserve()
        trace.disk_optimizer_bytes = self._files.num_bytes - trace.disk_weights_bytes
        trace.disk_file_bytes = self._files.file_bytes
        store = optimizer.store
        assert store.conveyor is not None
        store.conveyor = self._conveyor(store.conveyor._arena.num_bytes)

    @property
    def buffer_bytes(self) -> int:
        """The host memory that transfers have used."""
        return sum(pages.used_bytes for pages in self._pages.values())
