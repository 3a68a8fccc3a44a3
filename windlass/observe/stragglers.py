"""Names the ranks that hold the others up.

All ranks of a step take equally long. What differs is the work: a step's seconds less those that a rank has waited for
others (`windlass.parallel.waiting`). The agreement of the next step carries it. After MegaScale (Jiang et al., 2024).
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from windlass.observe.console import Console
from windlass.observe.metrics import Metrics
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh
from windlass.parallel.waiting import WAITED, Lap

LATE_FRACTION = 0.2
LATE_S = 0.05
"""A rank is late in a step whose work takes so much longer than the median rank's, as a fraction and in seconds."""
WINDOW_STEPS = 5
NUM_LATE_STEPS = 3
"""A rank is named that was late in so many of the last `WINDOW_STEPS`. It has recovered when it was late in none."""


class StepClock:
    """Times steps, and how much of them was work. What is between an end and a begin, such as a save, is in neither."""

    def __init__(self) -> None:
        self._begin = self._step_s = 0.0
        self._waits: Lap | None = None

    def begin(self) -> None:
        self._begin = time.perf_counter()
        WAITED.lap()

    def end(self) -> float:
        """Ends the step; returns its seconds."""
        self._step_s, self._waits = time.perf_counter() - self._begin, WAITED.lap()
        return self._step_s

    @property
    def work_s(self) -> float | None:
        """Seconds of the step that ended last in which this rank did not wait; None before the first."""
        return None if self._waits is None else max(0.0, self._step_s - self._waits.seconds)


@dataclass(frozen=True)
class Straggler:
    rank: int
    seconds: float
    """By which its work was longer than the median rank's: the mean of the steps in which it was late."""
    median_s: float
    """The median rank's work of the newest step."""


class LateRanks:
    """Keeps by how much ranks were late in the last steps. Pure: no clock, no I/O."""

    def __init__(self) -> None:
        self._window: deque[dict[int, float]] = deque(maxlen=WINDOW_STEPS)
        self._named: set[int] = set()

    def add(self, work_s: Sequence[float]) -> tuple[list[Straggler], list[int]]:
        """Takes in a step.

        Args:
            work_s: the work of each rank in it, in rank order.

        Returns:
            Ranks that are named now, and ranks that were and have recovered.
        """
        # The lower one of two: with two ranks, or half of them slow, the faster ones are the measure.
        median_s = statistics.median_low(work_s)
        limit_s = median_s + max(LATE_S, LATE_FRACTION * median_s)
        self._window.append({rank: work - median_s for rank, work in enumerate(work_s) if work > limit_s})
        by_rank: dict[int, list[float]] = {}
        for late in self._window:
            for rank, excess_s in late.items():
                by_rank.setdefault(rank, []).append(excess_s)
        found = [
            Straggler(rank, statistics.fmean(excesses), median_s)
            for rank, excesses in sorted(by_rank.items())
            if len(excesses) >= NUM_LATE_STEPS and rank not in self._named
        ]
        recovered = sorted(self._named - by_rank.keys())
        self._named = self._named.union(straggler.rank for straggler in found).difference(recovered)
        return found, recovered


class StragglerWatch:
    """Names stragglers in the events and on the console. Making it is collective; the rest is rank 0's."""

    def __init__(self, mesh: Mesh, metrics: Metrics, console: Console) -> None:
        self._mesh, self._metrics, self._console = mesh, metrics, console
        self._hosts: list[str] = all_gather_object(socket.gethostname(), mesh.world)
        self._late = LateRanks()

    def look(self, step: int, work_s: Sequence[float] | None) -> None:
        """Takes in what the ranks' work in `step` took; None: it was not measured."""
        if work_s is None or self._mesh.rank != 0:
            return
        found, recovered = self._late.add(work_s)
        for straggler in found:
            place = self._place(straggler.rank)
            self._metrics.event("straggler", step, **place, seconds=straggler.seconds, median_s=straggler.median_s)
            self._console.message(
                f"warning: rank {straggler.rank} on {place['host']} is slow: its work takes {straggler.seconds:.2f} s "
                f"a step longer than the median rank's {straggler.median_s:.2f} s"
            )
        for rank in recovered:
            place = self._place(rank)
            self._metrics.event("straggler_over", step, **place)
            self._console.message(f"rank {rank} on {place['host']} is as fast as the others again")

    def _place(self, rank: int) -> dict[str, int | str]:
        return {"rank": rank, "node": rank // self._mesh.local_world_size, "host": self._hosts[rank]}
