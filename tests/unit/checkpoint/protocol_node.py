"""A node of the explored job: a real ledger in memory, and what of it is written down.

Its disk is the headers of its slots, the generation and what it gave up, written one at a time. `Part` is what really
lies in a slot, whatever its header says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from windlass.checkpoint.agent.ledger import Ledger, Phase, Slot, SnapshotId
from windlass.checkpoint.snapshot.plan import Held

WHOLE = (Phase.prepared, Phase.committed)
FOREVER = 1 << 30


class Violation(AssertionError):
    """A promise is broken."""


class Part(NamedTuple):
    snapshot: SnapshotId
    has_data: bool = False
    has_parity: bool = False


class SlotHeader(NamedTuple):
    snapshot: SnapshotId | None = None
    phase: Phase = Phase.empty


@dataclass(frozen=True)
class Job:
    """What is explored, and how often the worst may happen in one interleaving."""

    num_nodes: int
    num_parity_shards: int
    num_slots: int
    ledger: type[Ledger] = Ledger
    max_snapshots: int = 3
    """In a generation."""
    max_kills: int = 2
    max_crashes: int = 2
    max_pins: int = 1

    @property
    def needed(self) -> int:
        return self.num_nodes - self.num_parity_shards


class Node:
    """One node: `ledger` is in memory, the rest outlives the agent."""

    __slots__ = ("aborted", "generation", "headers", "holds_floor", "is_up", "ledger", "parts", "position")

    def __init__(self, job: Job, position: int) -> None:
        self.position = position
        self.ledger = job.ledger(job.num_slots, position=position, num_nodes=job.num_nodes)
        self.headers = [SlotHeader()] * job.num_slots
        self.parts: list[Part | None] = [None] * job.num_slots
        self.generation = 0
        self.aborted: SnapshotId | None = None
        self.is_up = True
        self.holds_floor = False

    def clone(self) -> Node:
        node = object.__new__(Node)
        node.ledger = object.__new__(type(self.ledger))
        node.ledger.__dict__ = dict(self.ledger.__dict__)
        node.ledger.slots = [Slot(slot.snapshot, slot.phase, slot.is_pinned) for slot in self.ledger.slots]
        node.ledger._prepared_by = {snapshot: set(nodes) for snapshot, nodes in self.ledger._prepared_by.items()}
        node.position = self.position
        node.headers, node.parts = list(self.headers), list(self.parts)
        node.generation, node.aborted = self.generation, self.aborted
        node.is_up, node.holds_floor = self.is_up, self.holds_floor
        return node

    def memory(self) -> tuple[Any, ...]:
        """All that the ledger knows."""
        ledger = self.ledger
        return (
            ledger.generation,
            ledger.newest_begun,
            ledger.aborted,
            tuple((slot.snapshot, slot.phase, slot.is_pinned) for slot in ledger.slots),
            frozenset((snapshot, frozenset(nodes)) for snapshot, nodes in ledger._prepared_by.items()),
        )

    def key(self) -> tuple[Any, ...]:
        return (self.memory(), *self.headers, *self.parts, self.generation, self.aborted, self.is_up, self.holds_floor)

    def phase_of(self, snapshot: SnapshotId) -> Phase:
        index = self.ledger.find(snapshot)
        return Phase.empty if index is None else self.ledger.slots[index].phase

    def held(self, job: Job) -> list[Held]:
        """What the agent answers when it is asked what it holds."""
        return [
            held_of(header, self.position, job.num_nodes, job.num_parity_shards)
            for header in self.headers
            if header.snapshot is not None
        ]

    def write(self, max_writes: int = FOREVER) -> bool:
        """Writes down what has changed in the ledger; False if the agent is killed after `max_writes` of it."""
        for write in self._writes():
            if max_writes == 0:
                return False
            max_writes -= 1
            write()
        return True

    def _writes(self) -> Iterator[Callable[[], None]]:
        """In the order that the ledger asks for."""
        if self.aborted != self.ledger.aborted and self.ledger.aborted is not None:
            yield lambda: setattr(self, "aborted", self.ledger.aborted)
        for index, slot in enumerate(self.ledger.slots):
            if SlotHeader(slot.snapshot, slot.phase) != self.headers[index]:
                yield functools.partial(self._write_header, index, slot)
        if self.generation != self.ledger.generation:
            yield self._write_generation

    def _write_header(self, index: int, slot: Slot) -> None:
        self.headers[index] = SlotHeader(slot.snapshot, slot.phase)
        if slot.phase == Phase.writing:
            assert slot.snapshot is not None
            self.parts[index] = Part(slot.snapshot)

    def _write_generation(self) -> None:
        self.generation, self.aborted = self.ledger.generation, self.ledger.aborted

    def restart(self, job: Job) -> None:
        """The agent is killed, and the next one adopts what was written down."""
        slots = [Slot(header.snapshot, header.phase) for header in self.headers]
        self.ledger = job.ledger.adopt(self.generation, slots, self.aborted)
        self.ledger.fence(self.generation, self.position, job.num_nodes)
        self.write()


def step_of(snapshot: SnapshotId) -> int:
    return 100 * snapshot.generation + snapshot.number


@functools.cache
def held_of(header: SlotHeader, position: int, num_nodes: int, num_parity_shards: int) -> Held:
    assert header.snapshot is not None
    layout = f"cut {header.snapshot.generation}"
    return Held(header.snapshot, step_of(header.snapshot), layout, header.phase, position, num_nodes, num_parity_shards)
