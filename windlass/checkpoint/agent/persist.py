"""Writes committed snapshots to the durable tier, from the slots, behind the training.

Every agent puts the chunks of its own ranks. The writer, which is the agent of rank 0's node, commits them when it has
heard of all, and tells the others how it went. A slot is pinned until then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.slots import Region, SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.store import KEEP_ALL, DurableStore, WrittenChunk
from windlass.checkpoint.image import Description
from windlass.checksum import crc32c
from windlass.errors import RunFolderError, WindlassError

if TYPE_CHECKING:
    from windlass.checkpoint.agent.peers import Group
    from windlass.checkpoint.agent.process import Agent
    from windlass.checkpoint.durable.storage import Location

REPEAT_S = 5.0
"""A part is told again after so long: its message may have been lost with a connection."""
LAST_WORDS_S = 60.0
"""What the last write has when the job ends without its trainers."""
TELL_S = 5.0
"""What the writer has to tell the others of it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How writing a snapshot went, alike on all nodes."""

    error: str | None
    step: int
    seconds: float = 0.0
    num_bytes: int = 0
    written_bytes: int = 0
    """What was not in the store already."""


class Persister(threading.Thread):
    """One snapshot at a time, in the order of commits."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(name="persist", daemon=True)
        self.agent = agent
        self.target: tuple[Location, int] | None = None
        """Where checkpoints go, and how many are kept."""
        self._queue: deque[tuple[SnapshotId, int]] = deque()
        self._parts: dict[SnapshotId, dict[int, dict[str, Any]]] = {}
        self._outcomes: dict[SnapshotId, Outcome] = {}
        self._at_work = False

    @property
    def is_busy(self) -> bool:
        return self._at_work or bool(self._queue)

    def forget(self) -> None:
        """The group has changed: what the one before was writing is given up. The agent's lock is held."""
        for snapshot, _ in self._queue:
            index = self.agent.ledger.find(snapshot)
            if index is not None:
                self.agent.ledger.slots[index].is_pinned = False
        self._queue.clear()
        self._parts.clear()
        self._outcomes.clear()

    def add(self, snapshot: SnapshotId, step: int) -> None:
        """Has a committed snapshot written. The agent's lock is held."""
        index = self.agent.ledger.find(snapshot)
        if index is not None:
            self.agent.ledger.slots[index].is_pinned = True
            self._queue.append((snapshot, step))
            self.agent.changed.notify_all()

    def hear(self, kind: str, message: dict[str, Any]) -> None:
        """A peer's part is written, or the writer says how it went."""
        snapshot = SnapshotId(*message["snapshot"])
        agent = self.agent
        with agent.changed:
            if kind == "persisted":
                self._outcomes[snapshot] = Outcome(**message["outcome"])
            elif snapshot in self._outcomes:
                self._tell(message["position"], snapshot)  # it has missed how it went
            else:
                self._parts.setdefault(snapshot, {})[message["position"]] = message
            agent.changed.notify_all()

    def persist_newest(self) -> None:
        """Writes the newest committed snapshot, unless this agent has written it or failed to; waits for a while."""
        agent = self.agent
        with agent.changed:
            snapshot = agent.ledger.committed
            index = None if snapshot is None else agent.ledger.find(snapshot)
            header = None if index is None else agent.slots[index].header
            if snapshot is None or header is None or self.target is None or agent.group is None:
                return
            if snapshot not in self._outcomes and snapshot not in [queued for queued, _ in self._queue]:
                self.add(snapshot, header.step)
            agent.changed.wait_for(lambda: snapshot in self._outcomes, LAST_WORDS_S)
            # The others end as well, when they have heard how it went.
            agent.changed.wait_for(lambda: not any(sender.messages for sender in agent.senders.values()), TELL_S)

    def persist_and_close(self) -> None:
        """What SIGTERM asks for: somebody takes the machine away."""
        self.persist_newest()
        self.agent.close()

    def run(self) -> None:
        agent = self.agent
        while True:
            with agent.changed:
                self._at_work = False
                agent.changed.wait_for(lambda: bool(self._queue))
                snapshot, step = self._queue.popleft()
                group, target, self._at_work = agent.group, self.target, True
                index = agent.ledger.find(snapshot)
                if group is None or target is None or index is None:
                    continue
                agent.ledger.slots[index].is_pinned = True
            self._persist(snapshot, step, group, target)
            with agent.changed:
                # Not before: chunks are named by what is in the slot, and must be written from the same.
                index = agent.ledger.find(snapshot)
                if index is not None:
                    agent.ledger.slots[index].is_pinned = False
                    agent.apply()

    def _persist(self, snapshot: SnapshotId, step: int, group: Group, target: tuple[Location, int]) -> None:
        begin = time.monotonic()
        part: dict[str, Any] = {"type": "written", "snapshot": snapshot, "position": group.position}
        try:
            part |= self._write_part(snapshot, group, target[0])
        except WindlassError as error:
            part["error"] = str(error)
        except (ValueError, OSError) as error:
            logger.exception("step %d could not be written", step)
            part["error"] = f"{type(error).__name__}: {error}"
        if group.position == group.writer:
            with self.agent.changed:
                self._parts.setdefault(snapshot, {})[group.position] = part
            outcome = self._commit(snapshot, step, group, target, begin)
        else:
            outcome = self._hand_over(snapshot, part, group)
        if outcome is not None:
            self._record(outcome)

    def _write_part(self, snapshot: SnapshotId, group: Group, location: Location) -> dict[str, Any]:
        """Puts the chunks of this node's ranks."""
        files = self.agent.held(snapshot, group.position)
        if files is None or files.header is None or files.data is None:
            raise ValueError("the snapshot is gone")
        store, written, objects = DurableStore(location), [], {}
        for region in files.header.own_regions:
            _check_region(files, region)
            view = files.data.view[region.offset : region.offset + region.nbytes]
            description, image = Description.from_region(view)
            objects |= description.objects
            for chunk in description.chunks:
                if self.agent.group is not group:
                    raise ValueError("the generation is over")
                written.append(store.put_chunk(chunk, view[image + chunk.begin : image + chunk.end]).to_json())
        return {"error": None, "written": written, "objects": objects, "world_size": files.header.world_size}

    def _hand_over(self, snapshot: SnapshotId, part: dict[str, Any], group: Group) -> Outcome | None:
        """Gives the part to the writer, and waits for how it goes."""
        agent = self.agent
        while True:
            with agent.changed:
                if agent.group is not group:
                    return None
                if part not in agent.senders[group.writer].messages:
                    agent.senders[group.writer].messages.append(part)
                    agent.changed.notify_all()
                agent.changed.wait_for(lambda: snapshot in self._outcomes or agent.group is not group, REPEAT_S)
                if snapshot in self._outcomes:
                    return self._outcomes[snapshot]

    def _commit(
        self, snapshot: SnapshotId, step: int, group: Group, target: tuple[Location, int], begin: float
    ) -> Outcome | None:
        """Makes a checkpoint of all nodes' parts, and says so."""
        agent = self.agent
        with agent.changed:
            agent.changed.wait_for(
                lambda: len(self._parts.get(snapshot, {})) == len(group.addresses) or agent.group is not group
            )
            if agent.group is not group:
                return None
            parts = [part for _, part in sorted(self._parts.pop(snapshot).items())]
        error = next((part["error"] for part in parts if part["error"]), None)
        written = [WrittenChunk.from_json(chunk) for part in parts for chunk in part.get("written", [])]
        store = DurableStore(target[0])
        try:
            if error is None:
                objects = {key: value for part in parts for key, value in part["objects"].items()}
                store.commit(step, group.generation, parts[0]["world_size"], objects, written)
                if not objects.get("info", {}).get(KEEP_ALL):
                    store.retain(target[1])
        except WindlassError as failure:
            error = str(failure)
        if error is not None:
            self._clean(store, group)
        outcome = Outcome(
            error,
            step,
            time.monotonic() - begin,
            sum(chunk.size for chunk in written),
            sum(chunk.size for chunk in written if chunk.written),
        )
        with agent.changed:
            self._outcomes[snapshot] = outcome
            for position in group.others:
                self._tell(position, snapshot)
            agent.changed.notify_all()
        return outcome

    def _clean(self, store: DurableStore, group: Group) -> None:
        """After a failure: what was written for nothing may be what fills the disk."""
        try:
            if self.agent.group is group:
                store.remove_leftovers()
        except RunFolderError as error:
            logger.warning("%s", error)

    def _tell(self, position: int, snapshot: SnapshotId) -> None:
        message = {"type": "persisted", "snapshot": snapshot, "outcome": vars(self._outcomes[snapshot])}
        self.agent.senders[position].messages.append(message)

    def _record(self, outcome: Outcome) -> None:
        with self.agent.changed:
            if outcome.error is None:
                self.agent.add_event(
                    "persisted",
                    step=outcome.step,
                    seconds=round(outcome.seconds, 6),
                    bytes=outcome.num_bytes,
                    written_bytes=outcome.written_bytes,
                    ended=time.time(),
                )
            else:
                logger.warning("step %d was not written: %s", outcome.step, outcome.error)
                self.agent.add_event("persist_failed", step=outcome.step, reason=outcome.error)
            self.agent.changed.notify_all()


def _check_region(files: SlotFiles, region: Region) -> None:
    """Raises ValueError if memory has changed since trainers wrote it: what is damaged is not made durable."""
    first = region.offset // BLOCK_BYTES
    for number in range(first, first + -(-region.nbytes // BLOCK_BYTES)):
        if crc32c(files.blocks(number)) != int(files.table[number]):
            raise ValueError(f"block {number} of the snapshot has changed in memory")
