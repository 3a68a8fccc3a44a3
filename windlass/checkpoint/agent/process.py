"""The snapshot agent: one process a node that keeps snapshots in shared memory while trainers come and go.

Trainers copy their state into its slots and tell it so over a unix socket that only their user can open. The agents of
a job make parity of each other's data over authenticated TCP (`peers`), commit by the protocol of `ledger`, and
write some of the snapshots to the durable tier (`persist`). Torch-free.

    python -m windlass.checkpoint.agent FOLDER < JSON of `AgentSettings`, in one line
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

from windlass.checkpoint.agent import effects as to_do
from windlass.checkpoint.agent.commands import serve_trainer
from windlass.checkpoint.agent.core import GIVE_UP_S, AgentCore
from windlass.checkpoint.agent.effects import Effect, Group
from windlass.checkpoint.agent.encoding import Encoding
from windlass.checkpoint.agent.folder import AgentFolder, AgentSettings, peer_pid, remove_expired, uptime
from windlass.checkpoint.agent.ledger import Phase, SnapshotId, Stale
from windlass.checkpoint.agent.peers import PeerSender, serve_peer
from windlass.checkpoint.agent.persist import Persister
from windlass.checkpoint.agent.slots import SlotFiles, SlotMemory, write_shared
from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.pacer import Pacer
from windlass.checkpoint.net.transport import Listener
from windlass.os_errors import said
from windlass.untrusted import convert, parse_json

TICK_S = 1.0
TELL_S = 5.0
"""The time that the agent has to tell the others how its last write went."""
MAX_EVENTS = 100
"""Kept for trainers, which ask after each step, and get all of them when they are new."""

P = ParamSpec("P")
logger = logging.getLogger("windlass.checkpoint.agent.process")


class Agent:
    """The shell around the core: what the threads of the process share. `changed` guards it, and wakes who waits."""

    def __init__(self, folder: AgentFolder, job: str, num_slots: int, host: str, lease_s: float) -> None:
        self.folder, self.job, self.lease_s = folder, job, lease_s
        self.incarnation = secrets.token_hex(8)
        self.changed = threading.Condition()
        self.rebuilding = threading.Lock()
        self.slots: dict[int, SlotFiles] = {}
        self.core = self._adopt(num_slots)
        self.senders: dict[int, PeerSender] = {}
        self.encoding: Encoding | None = None
        """The work on the snapshot in flight."""
        self.report = self.core.ledger.report()
        """The last that peers are to have, and how many there were before it."""
        self.version = 0
        self.events: list[dict[str, Any]] = []
        self.num_stale = 0
        self.sent_bytes = {"parity": 0, "read": 0}
        """To other nodes: to protect snapshots, and for those that restore them."""
        self.ending: to_do.End | None = None
        self.is_leaving = False
        """Nothing is answered any more."""
        self.is_closing = False
        self.trainers: dict[Connection, int | None] = {}
        """The trainers that are connected, by process id where the system tells."""
        self.pacer = Pacer(None)
        self.persister = Persister(self)
        self.listener = Listener(host, lambda peer: serve_peer(self, peer), self._secret)
        self.socket = folder.listen()

    def run(self) -> None:
        """Serves until the job ends or its lease does, and leaves nothing behind, unless another agent takes over."""
        self.persister.start()
        threading.Thread(target=self._accept_trainers, name="trainers", daemon=True).start()
        self.tell(self.core.start)
        while self.ending is None:
            with _said_only("renew its lease"):
                self.folder.touch(self.job, self.lease_s)
            self.tell(self.core.tick)
            with self.changed:
                self.changed.wait_for(lambda: self.ending is not None, TICK_S)
        with self.changed:
            if self.ending.after_sends:
                self.changed.wait_for(lambda: not any(sender.messages for sender in self.senders.values()), TELL_S)
            self.is_closing = True
            self.changed.notify_all()
        self.listener.close(1.0)
        if not self.ending.keeps_folder:
            self.folder.remove()

    def _adopt(self, num_slots: int) -> AgentCore:
        """Opens what an earlier agent left."""
        found = {int(path.stem) for path in self.folder.path.glob("*.head") if path.stem.isdecimal()}
        for index in sorted(found | set(range(num_slots))):
            self.files(index).adopt()
        headers = {index: files.header for index, files in self.slots.items()}
        foreign = {index: header for index, header in headers.items() if index >= num_slots and header is not None}
        generation, aborted = self._saved("generation"), self._saved("aborted")
        return AgentCore.adopt(
            [headers[index] for index in range(num_slots)],
            foreign,
            generation[0] if generation else 0,
            SnapshotId(*aborted) if aborted else None,
            self.lease_s,
            time.monotonic(),
        )

    def _saved(self, name: str) -> list[int]:
        """Numbers that an earlier agent wrote down; none if damaged: trainers then count on from the store's."""
        try:
            return [int(number) for number in (self.folder.path / name).read_bytes().split()]
        except (FileNotFoundError, ValueError):
            return []

    def _accept_trainers(self) -> None:
        while True:
            sock, _ = self.socket.accept()
            connection = Connection(sock, "a trainer")
            threading.Thread(target=serve_trainer, args=(self, connection, peer_pid(sock)), daemon=True).start()

    def _secret(self) -> bytes | None:
        return None if self.core.group is None else self.core.group.secret

    # --- Messages and effects. ---

    def tell(self, message: Callable[P, list[Effect]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Gives the core a message, and does what it answers with.

        Args:
            message: a method of the core.

        Raises:
            Busy, Stale: the core refuses it.
            OSError: memory is not there for what cannot be done without it.
        """
        with self.changed:
            self.do(self.step(message, *args, **kwargs))

    def step(self, message: Callable[P, list[Effect]], *args: P.args, **kwargs: P.kwargs) -> list[Effect]:
        """Gives the core a message, and leaves what it answers with to the caller."""
        with self.changed:
            self.core.now = time.monotonic()
            return message(*args, **kwargs)

    def do(self, effects: list[Effect]) -> None:
        """Does effects in their order, and then those of what comes of them."""
        with self.changed:
            self._end_encoding()
            todo = deque(effects)
            while todo:
                todo.extend(self._do(todo.popleft()))
            self._end_encoding()
            if effects:
                self.changed.notify_all()

    def _do(self, effect: Effect) -> list[Effect]:
        """Does one effect, and returns those of what comes of it."""
        match effect:
            case to_do.ReserveSlot(index, stripes):
                self.files(index).reserve(stripes)
            case to_do.BeginSlot(index, header):
                self.files(index).begin(header)
                if self.core.progress is not None and self.core.progress.header is header:
                    self.encoding = Encoding(self.files(index).memory)
            case to_do.SealSlot(index, header):
                try:
                    return self.core.sealed(index, self.files(index).seal(header))
                except OSError as error:
                    if header.phase == Phase.committed:  # rebuilt: whoever asked for it hears of it
                        raise
                    return self.core.give_up(header.snapshot, f"it cannot be described: {said(error)}")
            case to_do.WriteHeader(index, header):
                with _said_only(f"write down that slot {index} is {header.phase}"):
                    self.files(index).write_header(header)
                    return []
                return self.core.header_not_written(index)
            case to_do.EmptySlot(index):
                self.files(index).empty()
            case to_do.SaveAborted(snapshot, why):
                logger.warning("gave up snapshot %s: %s", tuple(snapshot), why)
                with _said_only("write down what it gave up"):
                    write_shared(self.folder.path / "aborted", "{} {}".format(*snapshot).encode())
            case to_do.SaveGeneration(generation):
                write_shared(self.folder.path / "generation", str(generation).encode())
            case to_do.Connect(group):
                self.senders = {position: PeerSender(self, group, position) for position in group.others}
                for sender in self.senders.values():
                    sender.start()
            case to_do.SendReport(report):
                self.report, self.version = report, self.version + 1
            case to_do.Send(position, message):
                if message not in self.senders[position].messages:
                    self.senders[position].messages.append(message)
            case to_do.SendData(position=position):
                self.senders[position].pushes.append(effect)
            case to_do.WritePart() | to_do.WriteCheckpoint():
                self.persister.work.put(effect)
            case to_do.Announce(kind, fields):
                self._add_event(kind, fields)
            case to_do.End():
                self.ending, self.is_leaving = effect, True
        return []

    def _end_encoding(self) -> None:
        """Takes in no more parity of a snapshot that is not in flight any more."""
        progress = self.core.progress
        if self.encoding is not None and (progress is None or progress.snapshot != self.encoding.snapshot):
            self.encoding.is_over = True
            self.encoding = None

    def _add_event(self, kind: str, fields: dict[str, Any]) -> None:
        # The next agent's go on from these: no two of them run at the same time.
        number = self.events[-1]["number"] + 1 if self.events else int(uptime() * 1e6)
        ended = {"ended": time.time()} if "seconds" in fields else {}
        self.events.append({"number": number, "kind": kind, **fields, **ended})
        del self.events[:-MAX_EVENTS]
        if kind == "persist_failed":
            logger.warning("step %d was not written: %s", fields["step"], fields["reason"])

    # --- What other threads ask for. ---

    def files(self, index: int) -> SlotFiles:
        return self.slots.setdefault(index, SlotFiles(self.folder.path, index))

    def whole_part(self, snapshot: SnapshotId, position: int) -> SlotMemory | None:
        """The part of a snapshot that belongs to the node `position`, if all of it is here."""
        with self.changed:
            index = self.core.whole_slot_of(snapshot, position)
            return None if index is None else self.files(index).memory

    def encoding_of(self, snapshot: SnapshotId) -> Encoding:
        """The work on the snapshot in flight. Raises Stale if that is another."""
        with self.changed:
            if self.encoding is None or self.encoding.snapshot != snapshot:
                raise Stale(f"snapshot {snapshot} is over")
            return self.encoding

    def wait_for_encoding(self, snapshot: SnapshotId) -> Encoding | None:
        """The work on a snapshot, once trainers have begun it here; None if it is over."""
        ledger = self.core.ledger
        with self.changed:
            self.changed.wait_for(
                lambda: snapshot.generation != ledger.generation or ledger.has_begun(snapshot), GIVE_UP_S
            )
            with contextlib.suppress(Stale):
                return self.encoding_of(snapshot)
        return None

    def group_of_generation(self, generation: int, wait_s: float) -> Group | None:
        """The group, once `generation` has begun here; None if it is over, or does not begin."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.core.group is not None and self.core.group.generation >= generation, wait_s
            )
            group = self.core.group
            return group if group is not None and group.generation == generation else None

    def count_stale(self, connection: Connection, who: str) -> None:
        with self.changed:
            self.num_stale += 1
        logger.warning("refused %s (%s): its generation is over", who, connection.peer)

    def count_sent(self, kind: str, num_bytes: int) -> None:
        with self.changed:
            self.sent_bytes[kind] += num_bytes


@contextmanager
def _said_only(what: str) -> Iterator[None]:
    """Logs that the system refuses what an agent can go on without: others may have filled the shared memory."""
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
        signal.signal(
            signal.SIGTERM, lambda *_: threading.Thread(target=agent.tell, args=(agent.core.terminate,)).start()
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        agent.run()
    return 0
