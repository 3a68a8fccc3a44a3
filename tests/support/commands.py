"""`windlass ...` in a process of its own, forked from one that has imported it all, or started as a user does.

A command that is forked runs the same `main` in a session, environment and folder of its own, and the servers that
multiprocessing would start as new interpreters are forked from it. What is left out is the import of two interpreters,
most of what a short job costs; tests of starts, and one of each kind of launcher, start commands as users do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path
from typing import Any

from support.ranks import CONTEXT

SERVER = re.compile(r"from multiprocessing\.(forkserver|resource_tracker) import main; ?main\((.*)\)", re.DOTALL)


class Command:
    """A running command. All that it prints goes to a file.

    Args:
        process: a child of this process, or of the server of `CONTEXT`.
    """

    def __init__(self, process: subprocess.Popen | Any, output: Path) -> None:
        self._process = process
        self._output = output

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, timeout_s: float = 120) -> int:
        if isinstance(self._process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        else:
            self._process.join(timeout_s)
        code = self.returncode
        assert code is not None, f"still running: {self.output}"
        return code

    def send_signal(self, number: int) -> None:
        """Of no effect on one that has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str],
    output: Path,
    *,
    cwd: Path | None = None,
    prefix: Sequence[str] = (),
    is_exec: bool = False,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> Command:
    """Starts `windlass ARGUMENTS` in a session of its own.

    Args:
        output: a file that its output is added to.
        prefix: a command that becomes the one that follows.
        is_exec: starts it as users do, as a new interpreter; with a prefix it always is.
        before: runs in the new process first, and so in all that is forked from it. Of forked commands only.
        environment: added to this process's.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if is_exec or prefix:
        assert before is None, "nothing can be run in a new interpreter"
        command = [*prefix, str(Path(sys.executable).with_name("windlass")), *arguments]
        with output.open("ab") as file:
            return Command(
                subprocess.Popen(
                    command,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=variables,
                ),
                output,
            )
    output.touch()
    child = CONTEXT.Process(target=_become, args=(list(arguments), variables, output, cwd, before), daemon=True)
    child.start()
    return Command(child, output)


def _become(
    arguments: list[str],
    environment: Mapping[str, str],
    output: Path,
    cwd: Path | None,
    before: Callable[[], None] | None,
) -> None:
    """Turns this fork into what a new interpreter would be, and runs the command."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    _redirect(output)
    _forget_parent()
    sys.argv = ["windlass", *arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    code = 1
    try:
        if before is not None:
            before()
        from windlass.cli import main

        code = main(arguments)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _redirect(output: Path) -> None:
    null, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115


def _forget_parent() -> None:
    """Has multiprocessing and tempfile know nothing of the server that this process was forked from."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    for descriptor in (server._forkserver_alive_fd, tracker._fd, *(server._inherited_fds or ())):
        if descriptor is not None:
            os.close(descriptor)
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = server._inherited_fds = None
    server._preload_modules = ["__main__"]
    tracker._fd = tracker._pid = None
    own = process.current_process()
    own._config = {"authkey": process.AuthenticationString(os.urandom(32)), "semprefix": "/mp"}  # type: ignore
    process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = _fork_server  # type: ignore[attr-defined]
    tempfile.tempdir = None


def _fork_server(path: bytes, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: forks what that starts as a new interpreter."""
    found = SERVER.fullmatch(arguments[-1])
    assert found is not None, f"nothing that multiprocessing is known to start: {arguments}"
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # as a new program begins
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _close_all_but({0, 1, 2, *kept})
        multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
        process._children.clear()  # type: ignore[attr-defined]
        _forget_server()
        exec(arguments[-1], {})
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    """`multiprocessing.util.close_all_fds_except` closes all where two that are kept are next to each other."""
    for path in list(Path("/proc/self/fd").iterdir()):
        if int(path.name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(path.name))


def _forget_server() -> None:
    """Descriptors of the launcher, which this fork has closed by now."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = server._inherited_fds = None
    tracker._fd = tracker._pid = None
