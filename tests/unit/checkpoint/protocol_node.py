"""A node of the explored job: a real agent's core in memory, and what of it is written down.

Its disk is the headers of its slots, the generation and what it gave up, written one at a time, as the core asks for
it. `Part` is what really lies in a slot, whatever its header says.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from windlass.checkpoint.agent.core import AgentCore
from windlass.checkpoint.agent.effects import (
    BeginSlot,
    Effect,
    EmptySlot,
    Group,
    SaveAborted,
    SaveGeneration,
    SealSlot,
    SendReport,
    WriteHeader,
)
from windlass.checkpoint.agent.header import Header, Region
from windlass.checkpoint.agent.ledger import Ledger, Phase, Report, Slot, SnapshotId
from windlass.checkpoint.agent.persist_queue import Outcome
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.snapshot.plan import Held

FOREVER = 1 << 30
KEPT = (BeginSlot, SealSlot, WriteHeader, EmptySlot, SaveAborted, SaveGeneration, SendReport)
"""Effects that outlive the agent; the others are in its memory."""


class Violation(AssertionError):
    """A promise is broken."""


class Part(NamedTuple):
    snapshot: SnapshotId
    has_data: bool = False
    has_parity: bool = False


@dataclass(frozen=True)
class Job:
    """What is explored, and how often the worst may happen in one interleaving."""

    num_nodes: int
    num_parity_shards: int
    num_slots: int
    ledger: type[Ledger] = Ledger
    core: type[AgentCore] = AgentCore
    max_snapshots: int = 3
    """In a generation."""
    max_kills: int = 2
    max_crashes: int = 2
    max_pins: int = 1

    @property
    def needed(self) -> int:
        return self.num_nodes - self.num_parity_shards


class Node:
    """One node: `core` is in memory, the rest outlives the agent."""

    __slots__ = ("_keys", "aborted", "core", "generation", "headers", "holds_floor", "is_up", "parts", "position")

    def __init__(self, job: Job, position: int) -> None:
        self.position = position
        self.headers: list[Header | None] = [None] * job.num_slots
        self.parts: list[Part | None] = [None] * job.num_slots
        self.generation = 0
        self.aborted: SnapshotId | None = None
        self.is_up = True
        self.holds_floor = False
        self._keys: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
        self.core = self._adopt(job)
        self.do(self.core.start(), [])

    def clone(self) -> Node:
        node = object.__new__(Node)
        node.core = clone_core(self.core)
        node.position = self.position
        node.headers, node.parts = list(self.headers), list(self.parts)
        node.generation, node.aborted = self.generation, self.aborted
        node.is_up, node.holds_floor = self.is_up, self.holds_floor
        node._keys = None
        return node

    def memory(self) -> tuple[Any, ...]:
        """All that the core knows."""
        core = self.core
        ledger, progress, persists = core.ledger, core.progress, core.persists
        return (
            ledger.generation,
            ledger.newest_begun,
            ledger.aborted,
            tuple((slot.snapshot, slot.phase, slot.is_pinned) for slot in ledger.slots),
            frozenset((snapshot, frozenset(nodes)) for snapshot, nodes in ledger._prepared_by.items()),
            None if progress is None else (progress.snapshot, progress.parity_left),
            None if persists.job is None else (persists.job.snapshot, persists.job.part is None),
            tuple(persists.waiting),
            frozenset(persists.outcomes),
        )

    def key(self) -> tuple[Any, ...]:
        """Tells states apart. It may be asked for once the node changes no more."""
        return self._both_keys()[0]

    def disk_key(self) -> tuple[Any, ...]:
        """Tells apart what is in the slots."""
        return self._both_keys()[1]

    def _both_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if self._keys is None:
            heads = [None if header is None else (header.snapshot, header.phase) for header in self.headers]
            disk = (*heads, *self.parts, self.is_up)
            self._keys = ((self.memory(), *disk, self.generation, self.aborted, self.holds_floor), disk)
        return self._keys

    def phase_of(self, snapshot: SnapshotId) -> Phase:
        return self.core.ledger.phase_of(snapshot)

    def held(self) -> list[Held]:
        """What the agent answers when it is asked what it holds."""
        return [
            held_of(header.snapshot, header.phase, self.position, header.num_nodes, header.num_parity_shards)
            for header in self.headers
            if header is not None
        ]

    def do(self, effects: list[Effect], sent: list[Report], max_effects: int = FOREVER) -> int:
        """Does effects, and those of what comes of them, in the order that the core gives; at most `max_effects`.

        Args:
            sent: gets what is said.

        Returns:
            How many were done.
        """
        todo, num_done = deque(effects), 0
        while todo and num_done < max_effects:
            effect = todo.popleft()
            if isinstance(effect, KEPT):
                todo.extend(self._do(effect, sent))
                num_done += 1
        return num_done

    def _do(self, effect: Effect, sent: list[Report]) -> list[Effect]:
        match effect:
            case SendReport(report):
                if report.prepared or report.aborted:
                    sent.append(report)
            case WriteHeader(index, header):
                self.headers[index] = header
            case BeginSlot(index, header):
                self.headers[index], self.parts[index] = header, Part(header.snapshot)
            case SealSlot(index, header):
                self.headers[index] = header
                return self.core.sealed(index, header)
            case EmptySlot(index):
                self.headers[index] = self.parts[index] = None
            case SaveAborted(snapshot):
                self.aborted = snapshot
            case SaveGeneration(generation):
                self.generation = generation
        return []

    def restart(self, job: Job, sent: list[Report]) -> None:
        """The agent is killed, and the next one adopts what was written down, and hears who its peers are."""
        self.core = self._adopt(job)
        self.do(self.core.start(), sent)
        if self.generation:
            self.do(self.core.configure(group_of(job, self.generation, self.position), []), sent)

    def _adopt(self, job: Job) -> AgentCore:
        return job.core.adopt(self.headers, {}, self.generation, self.aborted, float("inf"), 0.0, job.ledger)

    def finish_persist(self, sent: list[Report]) -> None:
        """The snapshot that is being written to disk is written, here and everywhere."""
        job = self.core.persists.job
        assert job is not None
        part = {"type": "written", "snapshot": job.snapshot, "position": self.position, "error": None}
        outcome = Outcome(None, job.step)
        is_over = job.group is not self.core.group
        self.do(self.core.part_written(part), sent)
        if is_over:
            return
        if self.position == job.group.writer:
            for other in job.group.others:
                self.do(self.core.hear_of_write(part | {"position": other}), sent)
            self.do(self.core.checkpoint_written(outcome), sent)
        else:
            told = {"type": "persisted", "snapshot": job.snapshot, "outcome": vars(outcome)}
            self.do(self.core.hear_of_write(told), sent)


def clone_core(core: AgentCore) -> AgentCore:
    """A copy that shares nothing that changes."""
    other, ledger, persists = _shallow(core), _shallow(core.ledger), _shallow(core.persists)
    ledger.slots = [Slot(slot.snapshot, slot.phase, slot.is_pinned) for slot in core.ledger.slots]
    ledger._prepared_by = {snapshot: set(nodes) for snapshot, nodes in core.ledger._prepared_by.items()}
    persists.ledger, persists.job = ledger, persists.job and copy.copy(persists.job)
    persists.waiting, persists.outcomes = persists.waiting.copy(), persists.outcomes.copy()
    persists.parts = {snapshot: dict(parts) for snapshot, parts in persists.parts.items()}
    other.ledger, other.persists = ledger, persists
    other.headers, other.foreign, other.damaged = core.headers.copy(), core.foreign.copy(), core.damaged.copy()
    other._unwritten, other._ended = core._unwritten.copy(), core._ended.copy()
    if core.progress is not None:
        other.progress = _shallow(core.progress)
        other.progress.waiting, other.progress.owed = core.progress.waiting.copy(), core.progress.owed.copy()
    return other


def _shallow(value: Any) -> Any:
    other = object.__new__(type(value))
    other.__dict__ = value.__dict__.copy()
    return other


@functools.cache
def header_of(job: Job, snapshot: SnapshotId, position: int) -> Header:
    """As trainers begin a snapshot: each node has one rank, with a block for each stripe."""
    node_bytes = job.needed * BLOCK_BYTES
    return Header(
        snapshot=snapshot,
        step=step_of(snapshot),
        phase=Phase.writing,
        position=position,
        num_nodes=job.num_nodes,
        num_parity_shards=job.num_parity_shards,
        node_bytes=node_bytes,
        world_size=job.num_nodes,
        layout=layout_of(snapshot),
        regions=tuple(Region(node, node, 0, node_bytes) for node in range(job.num_nodes)),
    )


@functools.cache
def group_of(job: Job, generation: int, position: int) -> Group:
    return Group(generation, position, (("", 0),) * job.num_nodes, b"", job.num_parity_shards, writer=0)


def step_of(snapshot: SnapshotId) -> int:
    return 100 * snapshot.generation + snapshot.number


def layout_of(snapshot: SnapshotId) -> str:
    return f"cut {snapshot.generation}"


@functools.cache
def held_of(snapshot: SnapshotId, phase: Phase, position: int, num_nodes: int, num_parity_shards: int) -> Held:
    return Held(snapshot, step_of(snapshot), layout_of(snapshot), phase, position, num_nodes, num_parity_shards)
