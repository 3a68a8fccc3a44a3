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

from windlass.checkpoint.agent.core import GIVE_UP_S, AgentCore
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
from windlass.checkpoint.agent.ledger import WHOLE, Busy, Ledger, Phase, Report, Slot, SnapshotId, Stale
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
    """Bounds what is explored, and how often the worst may happen in one interleaving."""

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


class Change(NamedTuple):
    """The result of an event on a node."""

    node: Node
    sent: tuple[Report, ...]
    is_alive: bool
    """The agent was not killed in its midst."""


class Node:
    """A state of a node: `core` is in memory, the rest outlives the agent. It stays as it is: `after` gives the next.

    Args:
        states: all that were met, so that equal ones are one, and what comes of an event is found out once.
    """

    __slots__ = ("_after", "_left", "_sent", "aborted", "core", "generation", "headers", "is_up", "job", "parts")
    __slots__ += ("committed", "disk_key", "position", "report", "states")

    def __init__(self, job: Job, position: int, states: dict[tuple[Any, ...], Node]) -> None:
        self.job, self.position, self.states = job, position, states
        self.headers: list[Header | None] = [None] * job.num_slots
        self.parts: list[Part | None] = [None] * job.num_slots
        self.generation = 0
        self.aborted: SnapshotId | None = None
        self.is_up = True
        self.report: Report | None = None  # the last that was sent
        self._left, self._sent = FOREVER, []
        self._restart()

    def after(self, event: str, *args: Any, max_effects: int = FOREVER) -> Change:
        """The result of an event.

        Args:
            event: the name of a method, without its underscore.
            max_effects: after so many the agent is killed; at the latest before it answers.
        """
        key = (event, args, max_effects)
        if key not in self._after:
            node = self.clone()
            node._left, node._sent = max_effects, []
            getattr(node, f"_{event}")(*args)
            is_alive = max_effects == FOREVER
            if not is_alive:
                node._left = FOREVER
                node._restart()
            self._after[key] = Change(node.settled(), tuple(node._sent), is_alive)
        return self._after[key]

    def clone(self) -> Node:
        node = object.__new__(Node)
        node.job, node.position, node.states = self.job, self.position, self.states
        node.core = clone_core(self.core)
        node.headers, node.parts = self.headers.copy(), self.parts.copy()
        node.generation, node.aborted, node.is_up = self.generation, self.aborted, self.is_up
        node.report = self.report
        return node

    def settled(self) -> Node:
        """The one node that is equal to this one. From now on it stays as it is."""
        heads = [None if header is None else (header.snapshot, header.phase) for header in self.headers]
        self.disk_key = (*heads, *self.parts, self.is_up)
        self._after: dict[tuple[Any, ...], Change] = {}
        self.committed = self.core.ledger.committed
        key = (self.position, self.memory(), self.disk_key, self.generation, self.aborted)
        return self.states.setdefault(key, self)

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

    @property
    def is_free(self) -> bool:
        return self.core.ledger.free_slot() is not None

    def phase_of(self, snapshot: SnapshotId) -> Phase:
        return self.core.ledger.phase_of(snapshot)

    def held(self) -> list[Held]:
        """The slots, as the agent answers when it is asked what it holds."""
        return [
            held_of(header.snapshot, header.phase, self.position, header.num_nodes, header.num_parity_shards)
            for header in self.headers
            if header is not None
        ]

    # --- Events. ---

    def _begin(self, snapshot: SnapshotId) -> None:
        """Trainers begin a snapshot, and give it up if the agent refuses."""
        before, read = list(self.core.ledger.slots), self.core.persists.job
        newest = self.core.ledger.committed
        try:
            effects = self.core.begin(header_of(self.job, snapshot, self.position))
        except (Busy, Stale):
            self._abort(snapshot)
            return
        taken = before[self.core.ledger.slots.index(Slot(snapshot, Phase.writing))].snapshot
        if self.job.num_slots > 1 and newest is not None and taken == newest:
            raise Violation("a snapshot was begun over the newest that is committed")
        if read is not None and taken == read.snapshot:
            raise Violation("a snapshot was begun over one that is being written to disk")
        self._do(effects)

    def _abort(self, snapshot: SnapshotId) -> None:
        before = self.memory()
        was_prepared = self.phase_of(snapshot) in WHOLE
        effects = self.core.give_up(snapshot, "it is to be")
        is_other = snapshot.generation != self.core.ledger.generation
        if (was_prepared or is_other) and (effects or self.memory() != before):
            raise Violation("a snapshot was given up that others may have committed, or of another generation")
        self._do(effects)

    def _local(self, snapshot: SnapshotId) -> None:
        """The data of the node's only rank is there. The core may refuse it, as it is of an older generation."""
        before = self.memory()
        self._fill(snapshot, has_parity=self.job.num_parity_shards == 0)
        try:
            self._do(self.core.copied(snapshot, self.position))
        except Stale:
            if self.memory() != before or snapshot.generation == self.core.ledger.generation:
                raise Violation("what was refused had an effect") from None

    def _prepare(self, snapshot: SnapshotId) -> None:
        """The data of all others is there."""
        self._fill(snapshot, has_parity=True)
        progress = self.core.progress
        owed = {} if progress is None else progress.owed.copy()
        while owed:
            position, num_blocks = owed.popitem()
            num_whole = 0 if owed else self.job.num_parity_shards
            self._do(self.core.parity_arrived(snapshot, position, num_blocks, num_whole))

    def _fill(self, snapshot: SnapshotId, has_parity: bool) -> None:
        for index, part in enumerate(self.parts):
            if part is not None and part.snapshot == snapshot:
                self.parts[index] = Part(snapshot, has_data=True, has_parity=has_parity)

    def _hear(self, report: Report) -> None:
        self._do(self.core.hear(report))

    def _fence(self, generation: int, restored: SnapshotId | None) -> None:
        keep = [] if restored is None else [restored]
        self._do(self.core.configure(group_of(self.job, generation, self.position), keep))

    def _rebuild(self, snapshot: SnapshotId) -> None:
        header = header_of(self.job, snapshot, self.position)
        try:
            effects = self.core.begin_rebuild(header)
        except Busy:
            raise Violation("there is no room to rebuild what is to be gone on from") from None
        if self._do(effects):
            self._fill(snapshot, has_parity=True)
            self._do(self.core.rebuilt(header))

    def _pin(self) -> None:
        """The newest committed snapshot is to be written to disk."""
        self._do(self.core.persist_newest())

    def _unpin(self) -> None:
        """The snapshot that is being written to disk is written, here and everywhere."""
        core, job = self.core, self.core.persists.job
        assert job is not None
        part = {"type": "written", "snapshot": job.snapshot, "position": self.position, "error": None}
        outcome = Outcome(None, job.step)
        self._do(core.part_written(part))
        if job.group is not core.group:
            return
        if self.position == job.group.writer:
            for other in job.group.others:
                self._do(core.hear_of_write(part | {"position": other}))
            self._do(core.checkpoint_written(outcome))
        else:
            told = {"type": "persisted", "snapshot": job.snapshot, "outcome": vars(outcome)}
            self._do(core.hear_of_write(told))

    def _wait(self) -> None:
        """Nothing has happened for so long that somebody must have stopped."""
        self.core.now = 2 * GIVE_UP_S
        self._do(self.core.tick())
        self.core.now = 0.0

    def _lose(self) -> None:
        self.is_up = False

    def _kill(self) -> None:
        self._restart()

    def _stale(self, reports: tuple[Report, ...], snapshots: tuple[SnapshotId, ...]) -> None:
        """Messages of other generations come."""
        before, core = self.memory(), self.core
        effects = [core.hear(report) for report in reports]
        for snapshot in snapshots:
            effects += [core.give_up(snapshot, "it is old"), core.parity_arrived(snapshot, 0, 1, 1)]
            begun = header_of(self.job, snapshot, self.position)
            for message, args in ((core.begin, (begun,)), (core.copied, (snapshot, self.position))):
                try:
                    message(*args)
                except Stale:
                    continue
                raise Violation(f"{snapshot} was taken in generation {core.ledger.generation}")
        if any(effects) or self.memory() != before:
            raise Violation("a message of another generation had an effect")

    # --- What the core asks for. ---

    def _do(self, effects: list[Effect]) -> bool:
        """Does effects, and then those of what comes of them, in their order; False if the agent is to be killed."""
        todo = deque(effects)
        while todo and self._left:
            effect = todo.popleft()
            if isinstance(effect, KEPT):
                todo.extend(self._do_one(effect))
                self._left -= 1
        return self._left > 0

    def _do_one(self, effect: Effect) -> list[Effect]:
        match effect:
            case SendReport(report):
                self.report = report
                if report.prepared or report.aborted:
                    self._sent.append(report)
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

    def _restart(self) -> None:
        """An agent adopts what was written down, and hears who its peers are."""
        job = self.job
        self.core = job.core.adopt(self.headers, {}, self.generation, self.aborted, FOREVER, 0.0, job.ledger)
        self._do(self.core.start())
        if self.generation:
            self._do(self.core.configure(group_of(job, self.generation, self.position), []))


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
