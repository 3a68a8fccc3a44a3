"""Plays the order of calls and transfers with a clock: when the disk works, and when a step waits for it.

The disk does one thing after the other, in the order in which it was asked, while the step computes; where the step
needs what has not come yet, it waits. What is read ahead of whom is in the order already, as the run's own conveyor
made it, so there is no formula for a schedule here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windlass.plan.recorder import Calls, DiskTransfer, DiskWait

NUM_ROUNDS = 3
"""Steps that are played; the last counts, which finds the disk as the one before has left it."""


@dataclass(frozen=True)
class DiskSpeed:
    """The rates of a disk for one rank."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    cpu_s_per_byte: float = 0.0
    """Processor time that a byte takes from computing, to be moved and checked; 0 where there are cores to spare."""


@dataclass(frozen=True)
class DiskUse:
    """The use of the disk in a step."""

    busy_s: float = 0.0
    stall_s: float = 0.0
    """The wait of the step."""
    cpu_s: float = 0.0
    """The time that the step computes longer."""


def play(timeline: Sequence[Calls | DiskTransfer | DiskWait], call_s: Mapping[str, float], disk: DiskSpeed) -> DiskUse:
    """The course of a step whose like came before it.

    Args:
        call_s: seconds of a call, by key.
    """
    now = disk_free = busy = stall = cpu = 0.0
    first = next((event.number for event in timeline if isinstance(event, DiskTransfer)), 0)
    ends: list[float] = []  # of the transfers of this step
    for _ in range(NUM_ROUNDS):
        before, ends, busy, stall, cpu = ends, [], 0.0, 0.0, 0.0
        for event in timeline:
            if isinstance(event, Calls):
                now += event.times * call_s[event.key]
            elif isinstance(event, DiskTransfer):
                seconds = event.num_bytes / (disk.write_bytes_per_s if event.is_write else disk.read_bytes_per_s)
                disk_free = max(now, disk_free) + seconds
                busy += seconds
                cpu += event.num_bytes * disk.cpu_s_per_byte
                ends.append(disk_free)
            else:
                index = event.number - first  # below 0: it was begun in the step before, as this step's last are
                known = ends if index >= 0 else before
                ready = known[index] if index >= -len(known) else 0.0  # what is older has ended
                stall += max(0.0, ready - now)
                now = max(now, ready)
    return DiskUse(busy, stall, cpu)
