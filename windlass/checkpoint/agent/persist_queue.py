"""Decides which committed snapshots are written to the durable tier, and in what order. No I/O, threads or clock.

Every agent puts the chunks of its own ranks. The writer, which is the agent of rank 0's node, commits them when it has
heard of all, and tells the others how it went. A slot is pinned until then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

from windlass.checkpoint.agent.effects import Announce, Effect, Group, Json, Send, WriteCheckpoint, WritePart
from windlass.checkpoint.agent.ledger import Ledger, SnapshotId

REPEAT_S = 5.0
"""A part is told again after so long: its message may have been lost with a connection."""


@dataclass(frozen=True)
class Outcome:
    """How writing a snapshot went, alike on all nodes."""

    error: str | None
    step: int
    seconds: float = 0.0
    num_bytes: int = 0
    written_bytes: int = 0
    """The bytes that were not in the store already."""

    def announce(self) -> Announce:
        if self.error is not None:
            return Announce("persist_failed", {"step": self.step, "reason": self.error})
        return Announce(
            "persisted",
            {
                "step": self.step,
                "seconds": round(self.seconds, 6),
                "bytes": self.num_bytes,
                "written_bytes": self.written_bytes,
            },
        )


@dataclass
class Job:
    """The snapshot that is being written."""

    snapshot: SnapshotId
    step: int
    group: Group
    """The one that began it. In another its result is of no use."""
    part: Json | None = None
    """The part that this node has put, once it has."""
    sent_at: float | None = None
    is_at_store: bool = False
    """The shell makes the checkpoint."""


class PersistQueue:
    """Writes one snapshot at a time, in the order of commits.

    Args:
        ledger: keeps the pins.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.group: Group | None = None
        self.job: Job | None = None
        self.waiting: deque[tuple[SnapshotId, int]] = deque()
        self.parts: dict[SnapshotId, dict[int, Json]] = {}
        self.outcomes: dict[SnapshotId, Outcome] = {}

    @property
    def is_busy(self) -> bool:
        return self.job is not None or bool(self.waiting)

    def knows(self, snapshot: SnapshotId) -> bool:
        """Tells that a snapshot is written, has failed to be, or will be written."""
        in_hand = [waiting for waiting, _ in self.waiting] + ([] if self.job is None else [self.job.snapshot])
        return snapshot in self.outcomes or snapshot in in_hand

    def configure(self, group: Group) -> None:
        """Gives up what the group before was writing. A slot stays pinned while the shell still reads it."""
        for snapshot, _ in self.waiting:
            self.ledger.release(snapshot)
        self.waiting.clear()
        self.parts.clear()
        self.outcomes.clear()
        self.group = group
        if self.job is not None and self.job.part is not None and not self.job.is_at_store:
            self.ledger.release(self.job.snapshot)
            self.job = None

    def add(self, snapshot: SnapshotId, step: int) -> list[Effect]:
        """Has a committed snapshot written."""
        self.ledger.pin(snapshot)
        self.waiting.append((snapshot, step))
        return self._begin_next()

    def part_written(self, part: Json) -> list[Effect]:
        """This node's chunks are written, or failed to be."""
        job = self.job
        assert job is not None
        if job.group is not self.group:
            return self._finish(None)
        job.part = part
        if job.snapshot in self.outcomes:
            return self._finish(self.outcomes[job.snapshot])
        if job.group.position != job.group.writer:
            return [Send(job.group.writer, part)]
        return self._add_part(part)

    def hear(self, message: Json) -> list[Effect]:
        """A peer's part is written, or the writer says how it went."""
        snapshot = SnapshotId(*message["snapshot"])
        if message["type"] == "persisted":
            self.outcomes[snapshot] = Outcome(**message["outcome"])
            is_awaited = self.job is not None and self.job.snapshot == snapshot and self.job.part is not None
            return self._finish(self.outcomes[snapshot]) if is_awaited else []
        if snapshot in self.outcomes:
            return [self._tell(message["position"], snapshot)]  # it has missed how it went
        return self._add_part(message)

    def checkpoint_written(self, outcome: Outcome) -> list[Effect]:
        """All nodes' parts are a checkpoint now, or failed to be."""
        job = self.job
        assert job is not None and self.group is not None
        self.outcomes[job.snapshot] = outcome
        told = [self._tell(position, job.snapshot) for position in self.group.others]
        return [*told, *self._finish(outcome)]

    def tick(self, now: float) -> list[Effect]:
        job = self.job
        if job is None or job.part is None or job.group.position == job.group.writer:
            return []
        if job.sent_at is not None and now <= job.sent_at + REPEAT_S:
            return []
        is_first, job.sent_at = job.sent_at is None, now
        return [] if is_first else [Send(job.group.writer, job.part)]

    def _add_part(self, part: Json) -> list[Effect]:
        snapshot = SnapshotId(*part["snapshot"])
        parts = self.parts.setdefault(snapshot, {})
        parts[part["position"]] = part
        job = self.job
        if job is None or job.snapshot != snapshot or job.group is not self.group or job.is_at_store:
            return []
        if len(parts) < len(job.group.addresses):
            return []
        job.is_at_store = True
        del self.parts[snapshot]
        return [WriteCheckpoint(job.step, job.group, tuple(part for _, part in sorted(parts.items())))]

    def _tell(self, position: int, snapshot: SnapshotId) -> Send:
        outcome = asdict(self.outcomes[snapshot])
        return Send(position, {"type": "persisted", "snapshot": snapshot, "outcome": outcome})

    def _finish(self, outcome: Outcome | None) -> list[Effect]:
        # Not before: chunks are named by what is in the slot, and must be written from the same.
        assert self.job is not None
        self.ledger.release(self.job.snapshot)
        self.job = None
        return [*([] if outcome is None else [outcome.announce()]), *self._begin_next()]

    def _begin_next(self) -> list[Effect]:
        while self.job is None and self.waiting and self.group is not None:
            snapshot, step = self.waiting.popleft()
            if self.ledger.find(snapshot) is not None:
                self.job = Job(snapshot, step, self.group)
                return [WritePart(snapshot, step, self.group)]
        return []
