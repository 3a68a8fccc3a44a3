"""Starts the workers of one node from its fork server, watches them, and never leaves them without a keeper.

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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from windlass.launch.attempt import Attempt
from windlass.launch.fork_server import fork_context, send_signal, socket_folder
from windlass.launch.interfaces import everywhere
from windlass.launch.job_store import StoreServer
from windlass.outcome import OUTCOME_FILE, STOP_FILE, Outcome, write_request

NUM_LAST_WORDS = 20
"""Lines that are kept of what a rank says that nobody reads: before it has a log, or when it crashes."""
DRAIN_S = 1.0
"""How long the output of a worker that has ended may take to be read."""
CLOSE_S = 120.0
"""How long the node's snapshot agent may take to write what it has, and leave."""


@dataclass(frozen=True)
class Ended:
    rank: int
    exit_code: int
    outcome: Outcome | None
    last_words: tuple[str, ...]
    """None of the job's first rank, whose output is shown."""


@dataclass(frozen=True)
class Line:
    number: int
    text: str
    is_error: bool


@dataclass(frozen=True)
class Report:
    attempt: int
    """The newest; -1 before the first."""
    ended: tuple[Ended, ...]
    lines: tuple[Line, ...]
    """The output of the job's first rank, if it is on this node."""
    is_warm: bool
    """Workers could start in a moment."""


class _Worker:
    """Holds a rank's process, and the threads that read its output."""

    def __init__(self, process: BaseProcess, rank: int, outcome_file: Path) -> None:
        self.process, self.rank, self.outcome_file = process, rank, outcome_file
        self.last_words: collections.deque[str] = collections.deque(maxlen=NUM_LAST_WORDS)
        self.readers: list[threading.Thread] = []
        self.has_ended = False

    def wait(self) -> Ended:
        """Waits until it has ended. For one thread only: another that looked would take the exit code away."""
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
        self._attempt = -1
        self._workers: list[_Worker] = []
        self._ended: list[Ended] = []
        self._lines: collections.deque[Line] = collections.deque()
        self._num_lines = 0
        self._store: StoreServer | None = None
        self._context = fork_context()
        self._cleanup, theirs = multiprocessing.Pipe()
        self._cleanup_process = self._context.Process(target=_clean_up, args=(theirs, str(self._config_file)))
        self._is_warm = False
        self._warming = threading.Thread(target=self._warm, args=(theirs,), name="warm", daemon=True)
        self._warming.start()

    def _warm(self, theirs: Connection) -> None:
        self._cleanup_process.start()  # returns when the server has imported what workers need, and has forked
        theirs.close()
        with self._changed:
            self._is_warm = True
            self._changed.notify_all()

    def serve_store(self, host: str, secret: bytes) -> int:
        """Begins a store for an attempt's ranks to meet in, in place of the last; returns its port.

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

    def start(self, attempt: Attempt) -> None:
        """Starts this node's workers. Those of the attempt before have ended."""
        folder = self._scratch / f"attempt{attempt.number}"
        folder.mkdir()
        with self._starting:
            with self._changed:
                assert all(worker.has_ended for worker in self._workers), "workers of another attempt still run"
                self._attempt, self._workers, self._ended = attempt.number, [], []
            for local_rank in range(attempt.num_local_ranks):
                worker = self._start_worker(attempt, local_rank, folder)
                with self._changed:
                    self._workers.append(worker)
            for worker in self._workers:
                threading.Thread(target=self._note_end, args=(worker,), daemon=True).start()

    def _start_worker(self, attempt: Attempt, local_rank: int, folder: Path) -> _Worker:
        rank, outcome_file = attempt.first_rank + local_rank, folder / f"outcome{local_rank}"
        files = {OUTCOME_FILE: str(outcome_file), STOP_FILE: str(self._scratch / "stop")}
        (out, out_w), (err, err_w) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        arguments = (str(self._config_file), attempt.variables(local_rank) | files, out_w, err_w)
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
        """Reports as soon as there is more than the caller knows: so many ends of this attempt, and lines of all."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    len(self._ended) != num_ended or self._num_lines > num_lines or (self._is_warm and not was_warm)
                ),
                wait_s,
            )
            while self._lines and self._lines[0].number < num_lines:
                self._lines.popleft()
            return Report(self._attempt, tuple(self._ended), tuple(self._lines), self._is_warm)

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

    def kill(self) -> None:
        """Returns when no worker runs any more."""
        with self._starting, self._changed:
            self.signal(signal.SIGKILL)
            self._changed.wait_for(lambda: all(worker.has_ended for worker in self._workers))

    def close(self, ends_agents: bool = True) -> list[str]:
        """Kills workers that still run, and has the node's snapshot agent make durable what only it has, and leave.

        Returns:
            The folders of agents that are still at work.
        """
        self.kill()
        self._end_store()
        self._warming.join()
        left: list[str] = []
        with contextlib.suppress(EOFError, OSError):  # somebody has killed it
            self._cleanup.send_bytes(b"end_agents" if ends_agents else b"leave_agents")
            if self._cleanup.poll(CLOSE_S):
                left = self._cleanup.recv_bytes().decode().splitlines()
                self._cleanup_process.join()
        self._cleanup.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        return left


def temporary_folder(prefix: str, longest: int) -> str:
    """Makes a folder for sockets, whose paths the system limits to 107 bytes: in /tmp if the usual one is longer."""
    return tempfile.mkdtemp(prefix=prefix, dir=socket_folder(longest))


# --- In forked processes. ---


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
    """Ends this worker with its keeper, at once: a checkpoint written later could meet those of the workers that are
    started in its stead."""
    keeper = multiprocessing.parent_process()
    assert keeper is not None
    keeper.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _clean_up(keeper: Connection, config_file: str) -> None:
    from windlass.launch.cleanup import clean_up_after

    clean_up_after(keeper, Path(config_file))
