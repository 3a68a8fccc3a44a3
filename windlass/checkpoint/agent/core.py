"""The decisions of a snapshot agent: messages and the time go in, effects come out. No I/O, threads or clock.

A message is a method: from trainers, from peers, or of I/O that is done. The shell (`process`) sets `now`, calls it,
and does the effects one after the other. What is said is written down first, so the order of effects is a promise: the
explorer in tests/unit/checkpoint/test_commit_protocol.py runs this class, and kills agents between any two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Self

from windlass.checkpoint.agent.effects import (
    Announce,
    BeginSlot,
    Connect,
    Effect,
    EmptySlot,
    End,
    Group,
    Json,
    ReserveSlot,
    SaveAborted,
    SaveGeneration,
    SealSlot,
    SendData,
    SendReport,
    WriteHeader,
)
from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import IN_FLIGHT, WHOLE, Ledger, Phase, Report, Slot, SnapshotId, Stale
from windlass.checkpoint.agent.persist_queue import Outcome, PersistQueue
from windlass.checkpoint.agent.progress import Progress
from windlass.checkpoint.agent.stripes import Stripes

GIVE_UP_S = 120.0
"""A snapshot that is not prepared here after so long is given up: somebody has stopped."""
LAST_WORDS_S = 60.0
"""The time that the last write has when the job ends without its trainers."""
GIVEN_UP_ELSEWHERE = "another node gave it up"


class AgentCore:
    """One node's agent, but for its I/O.

    Every method that returns effects is a message. What it refuses it raises, and then it has changed nothing.

    Args:
        ledger: of the slots.
        headers: what the slots hold.
        foreign: data of lost nodes whose place nobody has taken, by index, until a newer snapshot is committed.
        lease_s: how long trainers may be gone.
    """

    def __init__(
        self, ledger: Ledger, headers: list[Header | None], foreign: dict[int, Header], lease_s: float, now: float
    ) -> None:
        self.ledger, self.headers, self.foreign, self.lease_s = ledger, headers, foreign, lease_s
        self.now = self.last_seen = now
        self.num_trainers = 0
        self.group: Group | None = None
        self.progress: Progress | None = None
        self.damaged: dict[int, frozenset[int]] = {}
        """Index of a slot -> its blocks that were found to have changed."""
        self.persists = PersistQueue(ledger)
        self._unwritten: set[int] = set()  # slots whose header could not be written
        self._aborted: SnapshotId | None = None  # what is written down of it
        self._reported: Report | None = None
        self._ended: set[int] = set()  # ranks of this node that have said that the job is over
        self._terminates: tuple[SnapshotId | None, float] | None = None  # what is awaited, and until when

    @classmethod
    def adopt(
        cls,
        headers: Sequence[Header | None],
        foreign: dict[int, Header],
        generation: int,
        aborted: SnapshotId | None,
        lease_s: float,
        now: float,
        ledger: type[Ledger] = Ledger,
    ) -> Self:
        """The core of an agent that takes over what another left, by what that had written down."""
        slots = [Slot() if header is None else Slot(header.snapshot, header.phase) for header in headers]
        return cls(ledger.adopt(generation, slots, aborted), list(headers), foreign, lease_s, now)

    def start(self) -> list[Effect]:
        """The agent is up."""
        return self._sync("the agent before was lost")

    # --- The group. ---

    def configure(self, group: Group, keep: Iterable[SnapshotId]) -> list[Effect]:
        """Begins a generation, or says again who is in it. Whoever still acts for an older one is refused from now on.

        Raises:
            Stale: a newer one has begun.
        """
        keep = set(keep)
        is_new = group.generation > self.ledger.generation
        self.ledger.fence(group.generation, group.position, len(group.addresses), keep)
        if self.progress is not None:
            # In a generation that goes on: with the connections goes what is under way on them.
            self.ledger.abort(self.progress.snapshot)
        self.group = group
        self._ended.clear()
        self.persists.configure(group)
        gone = [index for index, header in self.foreign.items() if is_new and header.snapshot not in keep]
        return [
            *self._write(),  # first: an old slot in flight would never end in the new generation
            SaveGeneration(group.generation),
            *self._drop_foreign(gone),
            Connect(group),
            *self._conclude(),
        ]

    def configure_failed(self) -> list[Effect]:
        """The generation could not be written down: the agent has no group until it is."""
        self.group = self._reported = None
        return []

    def hear(self, report: Report) -> list[Effect]:
        """A peer says how far it is."""
        self.ledger.hear(report)
        return self._sync()

    def peer_gone(self, group: Group, position: int) -> list[Effect]:
        """A peer's connection has ended. What it had begun to send will not come."""
        progress = self.progress
        if progress is None or self.group is not group or not progress.has_begun_to_send(position):
            return []
        return self.give_up(progress.snapshot, f"node {position} was lost while it sent parity")

    # --- Snapshots. ---

    def reserve(self, node_bytes: int) -> list[Effect]:
        """Takes the memory of all empty slots now, so that no snapshot finds it gone."""
        group = self.require_group()
        stripes = Stripes(len(group.addresses), group.num_parity_shards, node_bytes)
        return [
            ReserveSlot(index, stripes) for index, slot in enumerate(self.ledger.slots) if slot.phase == Phase.empty
        ]

    def begin(self, header: Header) -> list[Effect]:
        """Trainers begin a snapshot: each rank of the node says so. If its slot fails to begin, give it up.

        Raises:
            Busy, Stale: it cannot begin now, or is over.
        """
        self.require_group()
        if self.ledger.find(header.snapshot) is not None:
            self._progress_of(header.snapshot)
            return []
        index = self.ledger.begin(header.snapshot)
        self.headers[index] = header
        self.damaged.pop(index, None)
        self.progress = Progress.begin(header, self.now)
        return [BeginSlot(index, header), *self._sync()]

    def copied(self, snapshot: SnapshotId, rank: int) -> list[Effect]:
        """A rank's data is whole, with its checksums. With the last one the others may have it.

        Raises:
            Stale: the snapshot is over.
        """
        progress = self._progress_of(snapshot)
        progress.waiting.discard(rank)
        if progress.waiting or self.ledger.phase_of(snapshot) != Phase.writing:
            return []
        self.ledger.finish_local(snapshot)
        progress.copied_at = self.now
        header = progress.header
        targets: dict[int, list[tuple[int, int]]] = {}
        for chunk, row, position in header.stripes.parity_targets(header.position):
            targets.setdefault(position, []).append((chunk, row))
        sends = [SendData(snapshot, position, tuple(blocks)) for position, blocks in targets.items()]
        return [*self._seal_if_whole(progress), *sends]

    def parity_arrived(self, snapshot: SnapshotId, position: int, num_blocks: int, num_whole: int) -> list[Effect]:
        """A node has sent blocks, which made `num_whole` blocks of parity whole."""
        progress = self.progress
        if progress is None or progress.snapshot != snapshot:
            return []
        progress.owed[position] -= num_blocks
        progress.parity_left -= num_whole
        return self._seal_if_whole(progress) if num_whole and progress.parity_left == 0 else []

    def _seal_if_whole(self, progress: Progress) -> list[Effect]:
        index = self.ledger.find(progress.snapshot)
        header = None if index is None else self.headers[index]
        if progress.parity_left or index is None or header is None or self.ledger.slots[index].phase != Phase.local:
            return self._sync()
        # First: who says that it has prepared promises to keep it.
        return [SealSlot(index, replace(header, phase=Phase.prepared))]

    def sealed(self, index: int, header: Header) -> list[Effect]:
        """A slot's checksums are written, and `header`, which says that it is whole."""
        self.damaged.pop(index, None)
        if index >= len(self.headers):
            self.foreign[index] = header
            return []
        self.headers[index] = header
        if header.phase == Phase.committed:
            self.ledger.finish_rebuild(index, header.snapshot)
        else:
            self.ledger.prepare(header.snapshot)
            if self.progress is not None:
                self.progress.prepared_at = self.now
        return self._sync()

    def header_not_written(self, index: int) -> list[Effect]:
        """The next agent here would find less than there is. It is tried again with the next message."""
        self._unwritten.add(index)
        return []

    def give_up(self, snapshot: SnapshotId, why: str) -> list[Effect]:
        """Aborts a snapshot, on all nodes, unless this node has promised to keep it."""
        return self._sync(why) if self.ledger.abort(snapshot) else []

    def count_resume(self, snapshot: SnapshotId, is_confirmed: bool) -> list[Effect]:
        """Counts an attempt to go on from a snapshot, or says that one has succeeded."""
        index = self.ledger.find(snapshot)
        header = None if index is None else self.headers[index]
        if index is None or header is None:
            return []
        header = replace(header, num_resumes=0 if is_confirmed else header.num_resumes + 1)
        self.headers[index] = header
        return [WriteHeader(index, header)]

    # --- Slots as the shell reads and fills them. ---

    def slot_of(self, part: Header) -> int:
        """The index of the slot with a node's part of a snapshot. Raises Stale if it is not here.

        Args:
            part: names them.
        """
        index = self._find(part.snapshot, part.position)
        if index is None:
            raise Stale(f"snapshot {part.snapshot} is over")
        return index

    def whole_slot_of(self, snapshot: SnapshotId, position: int) -> int | None:
        """The index of the slot with a node's part of a snapshot, if all of it is here."""
        index = self._find(snapshot, position)
        return index if index is not None and self.held()[index].phase in WHOLE else None

    def _find(self, snapshot: SnapshotId, position: int) -> int | None:
        parts = ((index, header) for index, header in self.held().items() if header.snapshot == snapshot)
        return next((index for index, header in parts if header.position == position), None)

    def held(self) -> dict[int, Header]:
        """The headers of all slots that hold something, by index."""
        return {index: header for index, header in enumerate(self.headers) if header is not None} | self.foreign

    def verified(self, index: int, part: Header, damaged: Iterable[int]) -> list[Effect]:
        """All blocks of a part were read again; that says nothing of what has taken its slot meanwhile."""
        if self._find(part.snapshot, part.position) == index:
            self.damaged[index] = frozenset(damaged)
        return []

    def begin_rebuild(self, header: Header) -> list[Effect]:
        """The part of a lost node is to be restored here, or blocks of one that is here are.

        It gets a slot of this node's own if the node has taken the lost one's place, else one beside them. `rebuilt`
        or `rebuild_failed` follows.

        Args:
            header: as another node has it, with the position of the lost one.

        Raises:
            Busy: there is no slot for it.
        """
        group = self.require_group()
        if self.whole_slot_of(header.snapshot, header.position) is not None:
            return []
        header = replace(header, phase=Phase.writing, table_crc=0)
        is_own = (header.position, header.num_nodes) == (group.position, len(group.addresses))
        if is_own and self.ledger.find(header.snapshot) is None:
            index = self.ledger.begin_rebuild()
            self.headers[index] = header
        else:
            index = next(i for i in range(len(self.headers), 1 << 30) if i not in self.foreign)
            self.foreign[index] = header
        return [BeginSlot(index, header)]

    def blocks_to_rebuild(self, part: Header) -> frozenset[int] | None:
        """The numbers of the blocks that are damaged in the slot of a part; None: it has none yet."""
        index = self.whole_slot_of(part.snapshot, part.position)
        return None if index is None else self.damaged.get(index, frozenset())

    def rebuilt(self, part: Header) -> list[Effect]:
        """All blocks of a part are as they were written."""
        index = self.slot_of(part)
        return [SealSlot(index, replace(self.held()[index], phase=Phase.committed))]

    def rebuild_failed(self, part: Header) -> list[Effect]:
        index = self._find(part.snapshot, part.position)
        if index is None or self.held()[index].phase in WHOLE:  # blocks of it are damaged, and stay so
            return []
        if index >= len(self.headers):
            return self._drop_foreign([index])
        self.ledger.abandon_rebuild(index)
        return self._sync()

    # --- The durable tier. ---

    def persist_newest(self) -> list[Effect]:
        """Has the newest committed snapshot written, unless this agent has written it or failed to."""
        index = None if self.ledger.committed is None else self.ledger.find(self.ledger.committed)
        header = None if index is None else self.headers[index]
        if self.group is None or header is None or self.persists.knows(header.snapshot):
            return []
        return self.persists.add(header.snapshot, header.step)

    def part_written(self, part: Json) -> list[Effect]:
        """The chunks of this node's ranks are put, or could not be."""
        return [*self.persists.part_written(part), *self._end_if_persisted()]

    def checkpoint_written(self, outcome: Outcome) -> list[Effect]:
        """The checkpoint of all parts is made, or could not be."""
        return [*self.persists.checkpoint_written(outcome), *self._end_if_persisted()]

    def hear_of_write(self, message: Json) -> list[Effect]:
        """A peer's part is written, or the writer says how it went."""
        return [*self.persists.hear(message), *self._end_if_persisted()]

    # --- Time, and the end. ---

    def tick(self) -> list[Effect]:
        """Some time has passed."""
        if self.num_trainers:
            self.last_seen = self.now
        effects = self.persists.tick(self.now)
        progress = self.progress
        if progress is not None and self.now > progress.began + GIVE_UP_S:
            effects += self.give_up(progress.snapshot, f"it was not prepared within {GIVE_UP_S:.0f} s")
        if self.is_lease_over:
            effects += self.terminate()
        return [*effects, *self._end_if_persisted()]

    @property
    def is_lease_over(self) -> bool:
        return self.now > self.last_seen + self.lease_s

    def trainer_came(self) -> list[Effect]:
        self.num_trainers += 1
        return []

    def trainer_left(self, copying: tuple[SnapshotId, int] | None) -> list[Effect]:
        """A connection has ended.

        Args:
            copying: the snapshot and the rank whose copy was awaited on it.
        """
        self.num_trainers -= 1
        self.last_seen = self.now
        return [] if copying is None else self.give_up(copying[0], f"rank {copying[1]} ended while it copied")

    def terminate(self) -> list[Effect]:
        """Somebody takes the machine away, or no trainer comes: what only this agent has is written, then it ends."""
        if self._terminates is not None:
            return []
        self._terminates = (self.ledger.committed, self.now + LAST_WORDS_S)
        return [*self.persist_newest(), *self._end_if_persisted()]

    def _end_if_persisted(self) -> list[Effect]:
        if self._terminates is None:
            return []
        snapshot, until = self._terminates
        is_done = snapshot is None or self.group is None or snapshot in self.persists.outcomes
        return [End(after_sends=True)] if is_done or self.now > until else []

    def end(self, rank: int, num_local_ranks: int, persist: bool) -> list[Effect]:
        """The job is over, or this rank of it. The last one to say so ends the agent."""
        self._ended.add(rank)
        if len(self._ended) < num_local_ranks:
            return []
        return self.terminate() if persist else [End()]

    def leave(self) -> list[Effect]:
        """Another agent takes over, of another number of slots."""
        return [End(keeps_folder=True)]

    # --- What the ledger says, done. ---

    def require_group(self) -> Group:
        if self.group is None:
            raise Stale("this agent was started anew, and does not know its group yet")
        return self.group

    def _progress_of(self, snapshot: SnapshotId) -> Progress:
        if self.progress is None or self.progress.snapshot != snapshot:
            raise Stale(f"snapshot {snapshot} is over")
        return self.progress

    def _sync(self, why: str = GIVEN_UP_ELSEWHERE) -> list[Effect]:
        """Brings what is written down, and then what is said, up to what the ledger says.

        Args:
            why: the snapshot in flight is over without a commit, if it is.
        """
        return [*self._write(why), *self._conclude(why)]

    def _write(self, why: str = GIVEN_UP_ELSEWHERE) -> list[Effect]:
        effects: list[Effect] = []
        aborted = self.ledger.aborted
        if aborted != self._aborted and aborted is not None:
            # First: whoever waits for the snapshot must hear of it, also from the next agent here.
            effects.append(SaveAborted(aborted, why))
        self._aborted = aborted
        for index, slot in enumerate(self.ledger.slots):
            header = self.headers[index]
            if header is None:
                continue
            if slot.phase == Phase.empty:
                if not slot.is_pinned:  # else it is being rebuilt
                    effects.append(EmptySlot(index))
                    self.headers[index] = None
            elif header.phase != slot.phase or index in self._unwritten:
                self._unwritten.discard(index)
                self.headers[index] = header = replace(header, phase=slot.phase)
                effects.append(WriteHeader(index, header))
        return effects

    def _conclude(self, why: str = GIVEN_UP_ELSEWHERE) -> list[Effect]:
        effects: list[Effect] = []
        progress = self.progress
        phase = None if progress is None else self.ledger.phase_of(progress.snapshot)
        if progress is not None and phase not in IN_FLIGHT:
            self.progress = None
            if phase == Phase.committed:
                effects += self._committed(progress)
            else:
                effects.append(Announce("snapshot_given_up", {"step": progress.header.step, "reason": why}))
        report = self.ledger.report()
        if self.group is not None and report != self._reported:
            self._reported = report
            effects.append(SendReport(report))
        return effects

    def _committed(self, progress: Progress) -> list[Effect]:
        fields = {
            "step": progress.header.step,
            "seconds": round(self.now - progress.began, 6),
            "copy_s": round(progress.copied_at - progress.began, 6),
            "encode_s": round(progress.prepared_at - progress.copied_at, 6),
        }
        effects = [Announce("snapshot_committed", fields), *self._drop_foreign(list(self.foreign))]
        return effects + (self.persists.add(progress.snapshot, progress.header.step) if progress.header.persist else [])

    def _drop_foreign(self, indexes: Iterable[int]) -> list[Effect]:
        for index in indexes:
            del self.foreign[index]
        return [EmptySlot(index) for index in indexes]
