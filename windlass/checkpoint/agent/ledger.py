"""The commit protocol: what a node knows of the snapshots in its slots and of its peers'. No I/O and no clock.

All nodes prepare a snapshot before any of them commits it, and only a commit makes the slot of the snapshot before it
free. So at every moment the newest committed snapshot, or one that all nodes have prepared since, is whole on every
node. docs/design/commit_protocol.md has the argument; tests/unit/checkpoint/test_commit_protocol.py explores it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self


class SnapshotId(NamedTuple):
    """Ordered: a later generation is newer, whatever the number. A number is used once in its generation."""

    generation: int
    """The generation that took it; every attempt and every recovery begins a new one."""
    number: int


class Phase(StrEnum):
    """How far a slot is. In those in the middle its snapshot is in flight: not yet committed here."""

    empty = "empty"
    writing = "writing"
    """Trainers copy into it."""
    local = "local"
    """This node's data is whole, with its checksums."""
    prepared = "prepared"
    """So is the parity that this node holds for others. It promises to keep both until it hears how it ends."""
    committed = "committed"


IN_FLIGHT = (Phase.writing, Phase.local, Phase.prepared)
WHOLE = (Phase.prepared, Phase.committed)


@dataclass
class Slot:
    snapshot: SnapshotId | None = None
    phase: Phase = Phase.empty
    is_pinned: bool = False
    """It is not free: somebody reads it to write it to disk, or fills it from other nodes'."""


@dataclass(frozen=True)
class Report:
    """A node's report of itself to its peers: facts that stay true for the generation, so any may be lost or late."""

    position: int
    generation: int
    prepared: SnapshotId | None
    """The newest snapshot that this node has prepared, whether or not it has committed it since."""
    committed: SnapshotId | None
    aborted: SnapshotId | None
    """The newest snapshot that this node gave up before it had prepared it: it will never be prepared here."""


class Busy(Exception):
    """A snapshot cannot begin now: the one before it is in flight, or its slot is being read."""


class Stale(Exception):
    """A message of an older attempt of the job, or of a snapshot that is over."""


@dataclass
class Ledger:
    """One node's part in the protocol.

    What a report or an answer says is to be written down before it is sent, so that the next agent of this node knows
    it as well: first `aborted`, then the headers of the slots, then the generation.
    """

    num_slots: int
    position: int = 0
    num_nodes: int = 1
    generation: int = 0
    slots: list[Slot] = field(default_factory=list)
    newest_begun: SnapshotId | None = None
    aborted: SnapshotId | None = None
    _prepared_by: dict[SnapshotId, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slots:
            self.slots = [Slot() for _ in range(self.num_slots)]

    @property
    def in_flight(self) -> int | None:
        """The index of the slot in flight: there is at most one."""
        return next((index for index, slot in enumerate(self.slots) if slot.phase in IN_FLIGHT), None)

    @property
    def committed(self) -> SnapshotId | None:
        """The newest snapshot that is committed here."""
        return max((s.snapshot for s in self.slots if s.phase == Phase.committed and s.snapshot), default=None)

    def find(self, snapshot: SnapshotId) -> int | None:
        return next((index for index, slot in enumerate(self.slots) if slot.snapshot == snapshot), None)

    def phase_of(self, snapshot: SnapshotId) -> Phase:
        """The phase of the slot that holds `snapshot`; empty if there is none."""
        return next((slot.phase for slot in self.slots if slot.snapshot == snapshot), Phase.empty)

    def has_begun(self, snapshot: SnapshotId) -> bool:
        """Tells whether a snapshot of this generation was begun or given up here, or a newer one."""
        return self.newest_begun is not None and self.newest_begun >= snapshot

    def free_slot(self) -> int | None:
        """The slot that the next snapshot would take, or None while there is none."""
        if self.in_flight is not None:
            return None
        newest = self.committed if self.num_slots > 1 else None  # a single slot is given up for the next snapshot
        free = [
            (slot.snapshot or SnapshotId(-1, -1), index)
            for index, slot in enumerate(self.slots)
            if not slot.is_pinned and (slot.snapshot is None or slot.snapshot != newest)
        ]
        return min(free)[1] if free else None

    def begin(self, snapshot: SnapshotId) -> int:
        """Takes a slot for `snapshot`, whose bytes may be overwritten from now on.

        Raises:
            Stale: it is of another generation, or not newer than the newest that was begun.
            Busy: there is no free slot.
        """
        self._require_generation(snapshot)
        if self.has_begun(snapshot):
            raise Stale(f"snapshot {snapshot} is not newer than {self.newest_begun}")
        index = self.free_slot()
        if index is None:
            raise Busy("the snapshot before is not committed yet, or is being written to disk")
        self.newest_begun = snapshot
        self.slots[index] = Slot(snapshot, Phase.writing)
        return index

    def finish_local(self, snapshot: SnapshotId) -> None:
        """The data of this node is whole. Raises Stale if the snapshot is over."""
        slot = self._in_flight_slot(snapshot)
        if slot.phase == Phase.writing:
            slot.phase = Phase.local

    def prepare(self, snapshot: SnapshotId) -> None:
        """The parity of this node is whole as well. Raises Stale if the snapshot is over."""
        slot = self._in_flight_slot(snapshot)
        assert slot.phase != Phase.writing, "the data must be whole before the snapshot is prepared"
        slot.phase = Phase.prepared
        self._note_prepared(snapshot, self.position)

    def abort(self, snapshot: SnapshotId) -> bool:
        """Gives a snapshot up, also one that was never begun here; False if it is prepared: others may commit it."""
        if snapshot.generation != self.generation:
            return False
        index = self.find(snapshot)
        if index is None:
            if self.has_begun(snapshot):
                return False
            self.newest_begun = snapshot
        elif self.slots[index].phase in (Phase.prepared, Phase.committed):
            return False
        else:
            self.slots[index] = Slot()
        self.aborted = snapshot
        return True

    def pin(self, snapshot: SnapshotId) -> None:
        """Keeps a snapshot's slot from being taken: somebody reads it."""
        index = self.find(snapshot)
        if index is not None:
            self.slots[index].is_pinned = True

    def release(self, snapshot: SnapshotId) -> None:
        """Nobody reads a snapshot's slot any more."""
        index = self.find(snapshot)
        if index is not None:
            self.slots[index].is_pinned = False

    def begin_rebuild(self) -> int:
        """Takes an empty slot that is to be filled from other nodes'. Raises Busy if there is none."""
        for index, slot in enumerate(self.slots):
            if slot.phase == Phase.empty and not slot.is_pinned:
                slot.is_pinned = True
                return index
        raise Busy("there is no empty slot")

    def finish_rebuild(self, index: int, snapshot: SnapshotId) -> None:
        """The slot holds what was committed elsewhere; one that was mended in place stays pinned."""
        before = self.slots[index]
        self.slots[index] = Slot(snapshot, Phase.committed, before.is_pinned and before.snapshot == snapshot)

    def abandon_rebuild(self, index: int) -> None:
        self.slots[index] = Slot()

    def hear(self, report: Report) -> None:
        """Takes in what a peer says of itself. A report of another generation is passed over."""
        if report.generation != self.generation or report.position == self.position:
            return
        if report.prepared is not None:
            self._note_prepared(report.prepared, report.position)
        index = self.in_flight
        if index is None:
            return
        slot = self.slots[index]
        assert slot.snapshot is not None
        if report.aborted == slot.snapshot:
            self.slots[index] = Slot()  # it can be committed nowhere: one node will never have prepared it
        elif slot.phase == Phase.prepared and report.committed == slot.snapshot:
            slot.phase = Phase.committed  # whoever committed it had heard all nodes

    def report(self) -> Report:
        prepared = (Phase.prepared, Phase.committed)
        newest = max((s.snapshot for s in self.slots if s.snapshot and s.phase in prepared), default=None)
        return Report(self.position, self.generation, newest, self.committed, self.aborted)

    def fence(self, generation: int, position: int, num_nodes: int, keep: Iterable[SnapshotId] = ()) -> list[int]:
        """Begins a generation: nothing of an older one is listened to any more, and `keep` stays, committed.

        So does what is whole and older than it: until all nodes have `keep`, a further loss may take it. The same
        generation may be begun again (its agent was restarted): then nothing changes.

        Returns:
            The slots that were emptied: an old writer may still have them open.

        Raises:
            Stale: a newer generation has begun.
        """
        if generation < self.generation:
            raise Stale(f"generation {generation} is over: {self.generation} has begun")
        self.position, self.num_nodes = position, num_nodes
        if generation == self.generation:
            return []
        self.generation = generation
        self.newest_begun = self.aborted = None
        self._prepared_by.clear()
        newest, emptied = max(keep, default=None), []
        for index, slot in enumerate(self.slots):
            is_whole = slot.phase in (Phase.prepared, Phase.committed)
            if is_whole and slot.snapshot is not None and newest is not None and slot.snapshot <= newest:
                slot.phase = Phase.committed
            elif slot.snapshot is not None:
                self.slots[index] = Slot()
                emptied.append(index)
        return emptied

    @classmethod
    def adopt(cls, generation: int, slots: list[Slot], aborted: SnapshotId | None = None) -> Self:
        """The ledger of an agent that takes over what another left, by what that had written down.

        What was being written when that agent died is given up: nobody knows how far it had come.
        """
        ledger = cls(len(slots), generation=generation, slots=slots, aborted=aborted)
        for index, slot in enumerate(slots):
            slot.is_pinned = False
            if slot.snapshot is not None and slot.phase in (Phase.writing, Phase.local):
                ledger.aborted = slot.snapshot
                slots[index] = Slot()
        begun = [s for s in (ledger.aborted, *[slot.snapshot for slot in slots]) if s and s.generation == generation]
        ledger.newest_begun = max(begun, default=None)
        return ledger

    def _note_prepared(self, snapshot: SnapshotId, position: int) -> None:
        if snapshot.generation != self.generation:
            return
        nodes = self._prepared_by.setdefault(snapshot, set())
        nodes.add(position)
        index = self.find(snapshot)
        if index is not None and self.slots[index].phase == Phase.prepared and self._is_on_all(nodes):
            self.slots[index].phase = Phase.committed
            for older in [other for other in self._prepared_by if other < snapshot]:
                del self._prepared_by[older]

    def _is_on_all(self, nodes: set[int]) -> bool:
        return len(nodes | {self.position}) == self.num_nodes

    def _in_flight_slot(self, snapshot: SnapshotId) -> Slot:
        self._require_generation(snapshot)
        index = self.find(snapshot)
        if index is None or self.slots[index].phase not in IN_FLIGHT:
            raise Stale(f"snapshot {snapshot} is over")
        return self.slots[index]

    def _require_generation(self, snapshot: SnapshotId) -> None:
        if snapshot.generation != self.generation:
            raise Stale(f"snapshot {snapshot} is of generation {snapshot.generation}; {self.generation} is the one now")
