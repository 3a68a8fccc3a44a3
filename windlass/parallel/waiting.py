"""How long this rank has waited for other ranks.

All ranks of a step take equally long: the slow one makes the others wait in collectives. What tells them apart is the
time that each did not wait. With gloo the host waits, in the collective's call or in that of `Work.wait`. With NCCL the
host goes on at once and a stream of the GPU waits: so two events are recorded around each such wait, and read when they
have passed, without a sync. What a collective takes to move its bytes counts as waiting, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


class Lap:
    """The time that a rank has waited between two calls of `WaitClock.lap`."""

    def __init__(self, host_s: float, on_stream: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self._host_s, self._on_stream = host_s, on_stream

    @property
    def seconds(self) -> float:
        """The time of the host or of the GPU's stream, whichever waited longer: mostly they wait for one rank at once.

        Events that have not passed yet are left out: where the host has since waited for the GPU, there are none.
        """
        passed = [(begin, end) for begin, end in self._on_stream if end.query()]
        return max(self._host_s, sum(begin.elapsed_time(end) for begin, end in passed) / 1000)


class WaitClock:
    """Counts waits of this process's main thread: others save behind the training and hold nobody up."""

    def __init__(self) -> None:
        self._host_s = 0.0
        self._on_stream: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._has_laps = False

    @contextmanager
    def host(self) -> Iterator[None]:
        """Around what makes the host wait for other ranks."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - begin)

    def add(self, seconds: float) -> None:
        """Counts a wait of the host that has been."""
        if threading.current_thread() is threading.main_thread():
            self._host_s += seconds

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around what makes the current CUDA stream wait for other ranks."""
        if not self._has_laps:  # nobody would ever take the events away
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._on_stream.append((begin, end))

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Around a collective on tensors of `device` that the calling thread or its stream waits for."""
        return self.stream() if device.type == "cuda" else self.host()

    def lap(self) -> Lap:
        """Returns what was waited since the last call, and begins anew."""
        lap = Lap(self._host_s, self._on_stream)
        self._host_s, self._on_stream, self._has_laps = 0.0, [], True
        return lap


WAITED = WaitClock()
"""This process's. One a process, as torch's process groups are."""
