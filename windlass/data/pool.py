"""The parent's side of the worker processes: starts them, hands out units, hears of errors. Torch-free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from windlass.data.worker import Advanced, Failed, Finished, Setup, Task
from windlass.errors import DataError

WORKER_MAIN = "import sys; from windlass.data.worker import main; main(int(sys.argv[1]))"
EXIT_TIMEOUT_S = 5.0
WHY: dict[int, str] = {
    signal.SIGKILL: ", as happens when memory runs out",
    signal.SIGABRT: ", as happens when a tokenizer takes more memory than text of this size does",
}


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """`num_workers` processes that tokenise. A context manager; leaving it ends them, at once if by an
    exception.

    A worker also ends by itself when this process does, however that happens: its socket closes.
    """

    def __init__(self, setup: Setup, num_workers: int) -> None:
        self._setup = setup
        self._num_workers = num_workers
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> WorkerPool:
        try:
            for _ in range(self._num_workers):
                self._start()
        except BaseException:
            self._end(kill=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._end(kill=kind is not None)

    def run(self, tasks: Sequence[Task]) -> Iterator[Advanced | Finished]:
        """Tokenise `tasks`, in any order, and yield what the workers report.

        Raises:
            DataError, ConfigError: of the first unit that failed.
            RuntimeError: a worker met an error that is not the user's.
        """
        waiting = list(reversed(tasks))
        for connection in self._processes:
            if waiting:
                _send(connection, waiting.pop())
        num_left = len(tasks)
        while num_left:
            for connection in wait(list(self._processes)):
                assert isinstance(connection, Connection)
                message = self._receive(connection)
                if isinstance(message, Failed):
                    raise message.error or RuntimeError(f"a worker process failed:\n{message.trace}")
                if isinstance(message, Finished):
                    num_left -= 1
                    if waiting:
                        _send(connection, waiting.pop())
                yield message

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", WORKER_MAIN, str(theirs.fileno())],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for the parent, which ends its workers
            )
            connection = Connection(ours.detach())
        self._processes[connection] = process
        _send(connection, self._setup)

    def _receive(self, connection: Connection) -> Advanced | Finished | Failed:
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            code = self._processes[connection].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise DataError(
            "data.num_workers",
            self._num_workers,
            f"a worker process {how}{WHY.get(-code, '')}",
            "run the same command again, with fewer data.num_workers (--num-workers): it goes on from there",
        )

    def _end(self, kill: bool) -> None:
        for connection, process in self._processes.items():
            if kill:
                process.kill()
            connection.close()
        for process in self._processes.values():
            try:
                process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _send(connection: Connection, message: Setup | Task) -> None:
    # A worker that is gone is reported when its end of the socket is read.
    with suppress(ConnectionError):
        connection.send(message)


def _environment() -> dict[str, str]:
    """The parent's, and its `sys.path`; one thread each, since each core has a process."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    quiet = {"RUST_BACKTRACE": "0"}  # what the Rust of tokenizers panics with becomes one message
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **quiet}
