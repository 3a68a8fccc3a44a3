"""The snapshot agent: one process a node that keeps snapshots in shared memory while trainers come and go.

Trainers copy their state into its slots and tell it so over a unix socket that only their user can open. The agents of
a job make parity of each other's data over authenticated TCP (`peers`), commit by the protocol of `ledger`, and
write some of the snapshots to the durable tier (`persist`). Torch-free.

    python -m windlass.checkpoint.agent FOLDER < JSON of `AgentSettings`, in one line
"""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from windlass.checkpoint.agent.commands import serve_trainer
from windlass.checkpoint.agent.encoding import Encoding
from windlass.checkpoint.agent.folder import AgentFolder, AgentSettings, peer_pid, remove_expired, uptime
from windlass.checkpoint.agent.ledger import IN_FLIGHT, Ledger, Phase, Report, Slot, SnapshotId
from windlass.checkpoint.agent.peers import Group, PeerSender, Push, serve_peer
from windlass.checkpoint.agent.persist import Persister
from windlass.checkpoint.agent.slots import SlotFiles, write_shared
from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.pacer import Pacer
from windlass.checkpoint.net.transport import Listener
from windlass.checksum import crc32c
from windlass.os_errors import said
from windlass.untrusted import convert, parse_json

GIVE_UP_S = 120.0
"""A snapshot that is not prepared here after so long is given up: somebody has stopped."""
TICK_S = 1.0
MAX_EVENTS = 100
"""Kept for trainers, which ask after each step, and get all of them when they are new."""

logger = logging.getLogger("windlass.checkpoint.agent.process")


class Agent:
    """Everything that the threads of the process share. `changed` guards all of it, and wakes who waits for some."""

    def __init__(self, folder: AgentFolder, job: str, num_slots: int, host: str, lease_s: float) -> None:
        self.folder, self.job, self.lease_s = folder, job, lease_s
        self.incarnation = secrets.token_hex(8)
        self.changed = threading.Condition()
        self.slots = [SlotFiles(folder.path, index) for index in range(num_slots)]
        self.foreign: list[SlotFiles] = []
        """Data of lost nodes whose place nobody has taken, until a newer snapshot is committed."""
        self.damaged: dict[int, set[int]] = {}
        """Index of a slot -> its blocks that were found to have changed."""
        self.rebuilding: set[int] = set()
        """Indexes of slots that are being filled from other nodes', which the ledger does not know of yet."""
        self._aborted: SnapshotId | None = None
        self.ended: set[int] = set()
        """Ranks of this node that have said that the job is over."""
        self.ledger = self._adopt()
        self.group: Group | None = None
        self.senders: dict[int, PeerSender] = {}
        self.encoding: Encoding | None = None
        self.version = 0
        """Counts the changes of what there is to report."""
        self._reported: Report | None = None
        self.events: list[dict[str, Any]] = []
        self.num_stale = 0
        self.sent_bytes = {"parity": 0, "read": 0}
        """To other nodes: to protect snapshots, and for those that restore them."""
        self.is_closing = False
        self.keeps_folder = False
        """Whether another agent is to adopt what is here."""
        self.trainers: dict[Connection, int | None] = {}
        """Who is connected: by its process id, where the system tells."""
        self.last_seen = time.monotonic()
        self.pacer = Pacer(None)
        self.persister = Persister(self)
        self.listener = Listener(host, lambda peer: serve_peer(self, peer), self._secret)
        self.socket = folder.listen()

    # --- Life. ---

    def run(self) -> None:
        """Serves until the job ends or its lease does, and leaves nothing behind, unless another agent takes over."""
        self.persister.start()
        threading.Thread(target=self._accept_trainers, name="trainers", daemon=True).start()
        self._write_headers()
        while not self.is_closing:
            self._tick()
            with self.changed:
                self.changed.wait_for(lambda: self.is_closing, TICK_S)
        self.listener.close(1.0)
        if not self.keeps_folder:
            self.folder.remove()

    def close(self) -> None:
        with self.changed:
            self.is_closing = True
            self.changed.notify_all()

    def _adopt(self) -> Ledger:
        for files in self.slots:
            files.adopt()
        for index in sorted({int(path.stem) for path in self.folder.path.glob("*.head") if path.stem.isdecimal()}):
            if index >= len(self.slots):
                self.foreign.append(SlotFiles(self.folder.path, index))
                self.foreign[-1].adopt()
        headers = [files.header for files in self.slots]
        slots = [Slot() if header is None else Slot(header.snapshot, header.phase) for header in headers]
        generation, aborted = self._saved("generation"), self._saved("aborted")
        return Ledger.adopt(generation[0] if generation else 0, slots, SnapshotId(*aborted) if aborted else None)

    def _saved(self, name: str) -> list[int]:
        """Numbers that an earlier agent wrote down; none if damaged: trainers then count on from the store's."""
        try:
            return [int(number) for number in (self.folder.path / name).read_bytes().split()]
        except (FileNotFoundError, ValueError):
            return []

    def _tick(self) -> None:
        with _said_only("renew its lease"):
            self.folder.touch(self.job, self.lease_s)
        with self.changed:
            if self.trainers:
                self.last_seen = time.monotonic()
            encoding = self.encoding
            is_late = encoding is not None and time.monotonic() > encoding.began + GIVE_UP_S
        if encoding is not None and is_late:
            self.give_up(encoding.snapshot, f"it was not prepared within {GIVE_UP_S:.0f} s")
        if time.monotonic() > self.last_seen + self.lease_s:
            logger.info("no trainer came for %.0f s: the job is over", self.lease_s)
            self.persister.persist_newest()
            self.close()

    def _accept_trainers(self) -> None:
        while True:
            sock, _ = self.socket.accept()
            connection = Connection(sock, "a trainer")
            threading.Thread(target=serve_trainer, args=(self, connection, peer_pid(sock)), daemon=True).start()

    def _secret(self) -> bytes | None:
        return None if self.group is None else self.group.secret

    # --- The group. ---

    def configure(self, group: Group, keep: list[SnapshotId]) -> None:
        """Begins a generation, or says again who is in it. Whoever still acts for an older one is refused from now on.

        Raises:
            Stale: a newer one has begun.
        """
        with self.changed:
            is_new = group.generation > self.ledger.generation
            self.ledger.fence(group.generation, group.position, len(group.addresses), keep)
            if self.encoding is not None:
                # In a generation that goes on: with the connections goes what is under way on them.
                self.ledger.abort(self.encoding.snapshot)
            self._write_headers()  # first: an old slot in flight would never end in the new generation
            write_shared(self.folder.path / "generation", str(group.generation).encode())
            self.group = group
            self.ended.clear()
            if is_new:
                for files in self.foreign:
                    if files.header is None or files.header.snapshot not in keep:
                        files.empty()
                self.foreign = [files for files in self.foreign if files.header is not None]
            self.persister.forget()
            self.apply()
            self.senders = {position: PeerSender(self, group, position) for position in group.others}
            for sender in self.senders.values():
                sender.start()
            self.changed.notify_all()

    def group_of_generation(self, generation: int, wait_s: float) -> Group | None:
        """The group, once `generation` has begun here; None if it is over, or does not begin."""
        with self.changed:
            self.changed.wait_for(lambda: self.group is not None and self.group.generation >= generation, wait_s)
            return self.group if self.group is not None and self.group.generation == generation else None

    def count_stale(self, connection: Connection, who: str) -> None:
        with self.changed:
            self.num_stale += 1
        logger.warning("refused %s (%s): its generation is over", who, connection.peer)

    def count_sent(self, kind: str, num_bytes: int) -> None:
        with self.changed:
            self.sent_bytes[kind] += num_bytes

    # --- Snapshots. ---

    def is_in_flight(self, snapshot: SnapshotId) -> bool:
        index = self.ledger.find(snapshot)
        return index is not None and self.ledger.slots[index].phase in IN_FLIGHT

    def held(self, snapshot: SnapshotId, position: int) -> SlotFiles | None:
        """The whole slot of a snapshot that belongs to the node `position`, if it is here."""
        with self.changed:
            for files in [*self.slots, *self.foreign]:
                header = files.header
                if header is not None and (header.snapshot, header.position) == (snapshot, position):
                    return files if header.phase in (Phase.prepared, Phase.committed) else None
        return None

    def wait_for_encoding(self, snapshot: SnapshotId) -> Encoding | None:
        """The work on a snapshot, once trainers have begun it here; None if it is over."""
        with self.changed:
            self.changed.wait_for(
                lambda: snapshot.generation != self.ledger.generation or self._has_begun(snapshot), GIVE_UP_S
            )
            encoding = self.encoding
            return encoding if encoding is not None and encoding.snapshot == snapshot else None

    def _has_begun(self, snapshot: SnapshotId) -> bool:
        return self.ledger.newest_begun is not None and self.ledger.newest_begun >= snapshot

    def local_is_whole(self, encoding: Encoding) -> None:
        """All ranks of this node have copied: from now on the others may have the data."""
        for number in encoding.uncovered_blocks():
            encoding.files.table[number] = crc32c(encoding.files.blocks(number))
        with self.changed:
            if encoding.is_over:
                return
            self.ledger.finish_local(encoding.snapshot)
            encoding.copied_at = time.monotonic()
            assert self.group is not None
            pushes: dict[int, list[tuple[int, int]]] = {}
            for chunk, row, target in encoding.stripes.parity_targets(self.group.position):
                pushes.setdefault(target, []).append((chunk, row))
            for position, targets in pushes.items():
                self.senders[position].pushes.append(Push(encoding.snapshot, encoding.files, targets))
            self._prepare_if_whole(encoding)

    def parity_arrived(self, encoding: Encoding, position: int, is_whole: bool) -> None:
        """A node has sent a block, which may have made a block of parity whole."""
        with self.changed:
            encoding.owed[position] -= 1
            if is_whole:
                encoding.parity_left -= 1
                if encoding.parity_left == 0:
                    self._prepare_if_whole(encoding)

    def _prepare_if_whole(self, encoding: Encoding) -> None:
        if not encoding.is_over and not encoding.waiting and encoding.parity_left == 0:
            index = self.ledger.find(encoding.snapshot)
            if index is None or self.ledger.slots[index].phase != Phase.local:
                return  # the last rank's data is here, and its checksums are still being looked after
            try:
                encoding.files.set_phase(Phase.prepared, with_table=True)  # first: who says so promises to keep it
            except OSError as error:
                self.give_up(encoding.snapshot, f"it cannot be described: {said(error)}")
                return
            self.ledger.prepare(encoding.snapshot)
            encoding.prepared_at = time.monotonic()
        self.apply()

    def give_up(self, snapshot: SnapshotId, why: str) -> None:
        """Aborts a snapshot, on all nodes, unless this node has promised to keep it."""
        with self.changed:
            if self.ledger.abort(snapshot):
                logger.warning("gave up snapshot %s: %s", tuple(snapshot), why)
                self.apply(why)

    def peer_gone(self, group: Group, position: int) -> None:
        """A peer's connection has ended. What it had begun to send will not come."""
        with self.changed:
            encoding = self.encoding if self.group is group else None
            is_missing = encoding is not None and not encoding.is_over and encoding.has_begun_to_send(position)
        if encoding is not None and is_missing:
            self.give_up(encoding.snapshot, f"node {position} was lost while it sent parity")

    def apply(self, why: str = "another node gave it up") -> None:
        """Brings headers, work and reports up to what the ledger says. `changed` is held.

        Args:
            why: a snapshot in flight is over without a commit, if it is.
        """
        step = None if self.encoding is None or self.encoding.files.header is None else self.encoding.files.header.step
        self._write_headers()
        encoding = self.encoding
        if encoding is not None:
            index = self.ledger.find(encoding.snapshot)
            phase = Phase.empty if index is None else self.ledger.slots[index].phase
            if phase in (Phase.empty, Phase.committed):
                encoding.is_over = True
                self.encoding = None
            if phase == Phase.committed:
                self._committed(encoding)
            elif phase == Phase.empty:
                self.add_event("snapshot_given_up", step=step, reason=why)
        report = self.ledger.report()
        if report != self._reported:
            self._reported = report
            self.version += 1
        self.changed.notify_all()

    def _committed(self, encoding: Encoding) -> None:
        header = encoding.files.header
        assert header is not None
        seconds = time.monotonic() - encoding.began
        self.add_event(
            "snapshot_committed",
            step=header.step,
            seconds=round(seconds, 6),
            copy_s=round(encoding.copied_at - encoding.began, 6),
            encode_s=round(encoding.prepared_at - encoding.copied_at, 6),
            ended=time.time(),
        )
        for files in self.foreign:
            files.empty()
        self.foreign.clear()
        if header.persist:
            self.persister.add(encoding.snapshot, header.step)

    def add_event(self, kind: str, **fields: Any) -> None:
        """For trainers to collect."""
        # The next agent's go on from these: no two of them run at the same time.
        number = self.events[-1]["number"] + 1 if self.events else int(uptime() * 1e6)
        self.events.append({"number": number, "kind": kind, **fields})
        del self.events[:-MAX_EVENTS]

    def _write_headers(self) -> None:
        if self.ledger.aborted != self._aborted and self.ledger.aborted is not None:
            # First: whoever waits for the snapshot must hear of it, also from the next agent here.
            with _said_only("write down what it gave up"):
                write_shared(self.folder.path / "aborted", "{} {}".format(*self.ledger.aborted).encode())
        self._aborted = self.ledger.aborted
        for slot, files in zip(self.ledger.slots, self.slots, strict=True):
            if slot.phase == Phase.empty:
                if files.header is not None and files.index not in self.rebuilding:
                    files.empty()
            elif files.header is not None and files.header.phase != slot.phase:
                # Else the next agent here finds less than there is, and hears of the rest.
                with _said_only(f"write down that slot {files.index} is {slot.phase}"):
                    files.set_phase(slot.phase)


@contextmanager
def _said_only(what: str) -> Iterator[None]:
    """Of what an agent can go on without: shared memory may be full of what others have put there."""
    try:
        yield
    except OSError as error:
        logger.warning("cannot %s: %s", what, said(error))


def main() -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    (path,) = sys.argv[1:]
    settings = convert(parse_json(sys.stdin.buffer.readline()), AgentSettings)
    job, host, lease_s = settings.job, settings.host, settings.lease_s
    folder = AgentFolder(Path(path))
    with folder.locked() as is_ours:
        if not is_ours:
            return 0
        with _said_only("write its lease"):
            folder.touch(job, lease_s)  # first, so that somebody removes the folder if this agent fails
        for removed in remove_expired(folder.path.parent.parent):
            logger.info("removed %s: its job is over", removed)
        try:
            agent = Agent(folder, job, settings.num_slots, host, lease_s)
        except OSError as error:
            logger.error("it cannot listen on %s, or use %s: %s", host, path, said(error))
            return 1
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=agent.persister.persist_and_close).start())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        agent.run()
    return 0
