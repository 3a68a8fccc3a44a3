"""The workers of one node: started from its fork server, watched, sent signals, and never left without a keeper.

The process that makes `NodeWorkers` keeps them. If it is killed they are, too, at once and without a checkpoint: its
launcher starts the ranks again elsewhere, from a snapshot that others keep, and must not meet the old ones there. This
module imports no framework and knows no launcher: what it needs of torch runs in forked processes.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from windlass.launch.fork_server import fork_context, place_for_sockets, send_signal
from windlass.launch.interfaces import everywhere
from windlass.launch.job_store import StoreServer, store_variables
from windlass.outcome import OUTCOME_FILE, STOP_FILE, Outcome, write_request

NUM_LAST_WORDS = 20
"""Lines that are kept of what a rank says that nobody reads: before it has a log, or when it crashes."""
DRAIN_S = 1.0
"""What the output of a worker that has ended may take to be read."""
CLOSE_S = 120.0
"""What the node's snapshot agent has to write what it has, and leave."""


@dataclass(frozen=True)
class Life:
    """One start of the workers of this node."""

    number: int
    seat: int
    """Of this node among the job's."""
    num_nodes: int
    num_local_ranks: int
    master_address: str
    master_port: int
    secret: bytes = field(repr=False)
    """Of the store on which the ranks meet, which is there."""

    @property
    def first_rank(self) -> int:
        return self.seat * self.num_local_ranks

    def variables(self, local_rank: int) -> dict[str, str]:
        """torchrun's, and that the store in which ranks meet is somebody else's."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(self.seat),
            "WORLD_SIZE": str(self.num_nodes * self.num_local_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_local_ranks),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
            **store_variables((self.master_address, self.master_port), self.secret),
        }


@dataclass(frozen=True)
class Ended:
    rank: int
    exit_code: int
    outcome: Outcome | None
    last_words: tuple[str, ...]
    """Of ranks other than the first, whose output is shown."""


@dataclass(frozen=True)
class Line:
    number: int
    text: str
    is_error: bool


@dataclass(frozen=True)
class Report:
    life: int
    """The newest; -1 before the first."""
    ended: tuple[Ended, ...]
    lines: tuple[Line, ...]
    """Of the job's first rank, if it is on this node."""
    is_warm: bool
    """Whether workers could start in a moment."""


class _Worker:
    """A rank's process, and what reads its output."""

    def __init__(self, process: BaseProcess, rank: int, outcome_file: Path) -> None:
        self.process, self.rank, self.outcome_file = process, rank, outcome_file
        self.last_words: collections.deque[str] = collections.deque(maxlen=NUM_LAST_WORDS)
        self.readers: list[threading.Thread] = []
        self.has_ended = False

    def wait(self) -> Ended:
        """Until it has ended. For one thread only: another that looked at the process would take its exit code away."""
        self.process.join()
        for reader in self.readers:
            reader.join(DRAIN_S)
        code = self.process.exitcode
        assert code is not None
        try:
            outcome = Outcome.from_json(self.outcome_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            outcome = None
        return Ended(self.rank, code, outcome, tuple(self.last_words))


class NodeWorkers:
    """Any thread may call any method.

    Args:
        config_yaml: the job's configuration, resolved.
        scratch: an empty folder, which goes in the end, whatever that is.
    """

    def __init__(self, config_yaml: str, scratch: Path) -> None:
        self._scratch = scratch
        self._config_file = self._scratch / "config.yaml"
        self._config_file.write_text(config_yaml, encoding="utf-8")
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._life = -1
        self._workers: list[_Worker] = []
        self._ended: list[Ended] = []
        self._lines: collections.deque[Line] = collections.deque()
        self._num_lines = 0
        self._store: StoreServer | None = None
        self._context = fork_context()
        self._warden, theirs = multiprocessing.Pipe()
        self._warden_process = self._context.Process(target=_ward, args=(theirs, str(self._config_file)))
        self._is_warm = False
        self._warming = threading.Thread(target=self._warm, args=(theirs,), name="warm", daemon=True)
        self._warming.start()

    def _warm(self, theirs: Connection) -> None:
        self._warden_process.start()  # returns when the server has imported what workers need, and has forked
        theirs.close()
        with self._changed:
            self._is_warm = True
            self._changed.notify_all()

    def serve_store(self, host: str, secret: bytes) -> int:
        """Begins a store for a life's ranks to meet in, in place of the last; returns its port.

        Args:
            host: the address of this node to listen on; on all where that is not its own, as behind a translation.
        """
        self._end_store()
        try:
            self._store = StoreServer(host, secret)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            self._store = StoreServer(everywhere(), secret)
        return self._store.port

    def _end_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def start(self, life: Life) -> None:
        """Starts this node's workers. Those of the life before have ended."""
        folder = self._scratch / f"life{life.number}"
        folder.mkdir()
        with self._starting:
            with self._changed:
                assert all(worker.has_ended for worker in self._workers), "workers of another life still run"
                self._life, self._workers, self._ended = life.number, [], []
            for local_rank in range(life.num_local_ranks):
                worker = self._start_worker(life, local_rank, folder)
                with self._changed:
                    self._workers.append(worker)
            for worker in self._workers:
                threading.Thread(target=self._note_end, args=(worker,), daemon=True).start()

    def _start_worker(self, life: Life, local_rank: int, folder: Path) -> _Worker:
        rank, outcome_file = life.first_rank + local_rank, folder / f"outcome{local_rank}"
        files = {OUTCOME_FILE: str(outcome_file), STOP_FILE: str(self._scratch / "stop")}
        (out, out_w), (err, err_w) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        arguments = (str(self._config_file), life.variables(local_rank) | files, out_w, err_w)
        process = self._context.Process(target=_run_worker, args=arguments, name=f"rank {rank}")
        process.start()
        for end in (out_w, err_w):
            end.close()
        worker = _Worker(process, rank, outcome_file)
        for stream, is_error in ((out, False), (err, True)):
            reader = threading.Thread(target=self._read, args=(stream, worker, is_error), daemon=True)
            worker.readers.append(reader)
            reader.start()
        return worker

    def _read(self, stream: Connection, worker: _Worker, is_error: bool) -> None:
        with os.fdopen(os.dup(stream.fileno()), encoding="utf-8", errors="replace") as file:
            stream.close()
            for text in file:
                if worker.rank != 0:
                    worker.last_words.append(text.rstrip("\n"))
                    continue
                with self._changed:
                    self._lines.append(Line(self._num_lines, text.rstrip("\n"), is_error))
                    self._num_lines += 1
                    self._changed.notify_all()

    def _note_end(self, worker: _Worker) -> None:
        ended = worker.wait()
        with self._changed:
            worker.has_ended = True
            self._ended.append(ended)
            self._changed.notify_all()

    def watch(self, num_ended: int, num_lines: int, was_warm: bool, wait_s: float) -> Report:
        """What there is, as soon as it is more than the caller knows: so many ends of this life, and lines of all."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    len(self._ended) != num_ended or self._num_lines > num_lines or (self._is_warm and not was_warm)
                ),
                wait_s,
            )
            while self._lines and self._lines[0].number < num_lines:
                self._lines.popleft()
            return Report(self._life, tuple(self._ended), tuple(self._lines), self._is_warm)

    def signal(self, number: int) -> None:
        """Sends a signal to each worker that runs, and to nobody else."""
        with self._changed:
            for worker in self._workers:
                if not worker.has_ended:
                    send_signal(worker.process, number)

    def stop(self) -> None:
        """Asks for a stop, also of workers that do not listen yet."""
        write_request(self._scratch / "stop", "the launcher")
        self.signal(signal.SIGUSR1)

    def end(self, grace_s: float) -> None:
        """Returns when no worker runs any more. Those that have not ended by themselves in `grace_s` are killed."""
        with self._starting, self._changed:
            if not self._changed.wait_for(self._have_all_ended, grace_s):
                self.signal(signal.SIGKILL)
            self._changed.wait_for(self._have_all_ended)

    def _have_all_ended(self) -> bool:
        return all(worker.has_ended for worker in self._workers)

    def close(self, ends_agents: bool = True) -> list[str]:
        """Kills workers that still run, and has the node's snapshot agent make durable what only it has, and leave.

        Returns:
            The folders of agents that are still at work.
        """
        self.end(0.0)
        self._end_store()
        self._warming.join()
        left: list[str] = []
        with contextlib.suppress(EOFError, OSError):  # somebody has killed it
            self._warden.send_bytes(b"end_agents" if ends_agents else b"leave_agents")
            if self._warden.poll(CLOSE_S):
                left = self._warden.recv_bytes().decode().splitlines()
                self._warden_process.join()
        self._warden.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        return left


def temporary_folder(prefix: str, longest: int) -> str:
    """A new folder for sockets, whose paths the system limits to 107 bytes: in /tmp if the usual place is longer."""
    return tempfile.mkdtemp(prefix=prefix, dir=place_for_sockets(longest))


# --- What runs in forked processes. ---


def _run_worker(config_file: str, variables: dict[str, str], out: Connection, err: Connection) -> None:
    from windlass.launch.worker import forked

    for stream, connection in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(connection.fileno(), stream.fileno())
        connection.close()
    threading.Thread(target=_die_with_keeper, name="keeper", daemon=True).start()
    # Held back until the worker listens, heard while it trains, and too late when it has ended its training.
    signal.signal(signal.SIGTERM, lambda *_: None)
    forked(config_file, variables)


def _die_with_keeper() -> None:
    """A checkpoint written now could meet those of the workers that are started in place of this one."""
    keeper = multiprocessing.parent_process()
    assert keeper is not None
    keeper.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _ward(keeper: Connection, config_file: str) -> None:
    from windlass.launch.warden import keep_watch

    keep_watch(keeper, Path(config_file))
