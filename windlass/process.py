"""Begins and ends a process of windlass. Torch-free."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from windlass.errors import EXIT_FAILURE, EXIT_USER_ERROR, ConfigError
from windlass.streams import make_lasting
from windlass.text import printable

_TORCH_THREADS = "pt_"
"""The prefix of the names of torch's threads."""


def run(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as all that this process does, and ends the process with the code that it returns."""
    os.environ["PYTHONSAFEPATH"] = "1"  # see `windlass.safe_path`
    _leave_ascii()
    make_lasting()
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # torch, too, ends without one
        error = ConfigError("working directory", os.environ.get("PWD", "?"), "was removed", "cd to another one")
        sys.stderr.write(f"windlass: error: {printable(str(error))}\n")
        end(EXIT_USER_ERROR)
    try:
        code = main()
    except SystemExit as ending:
        code = _code_of(ending)
    except KeyboardInterrupt:
        sys.stderr.write("windlass: interrupted\n")
        end(EXIT_FAILURE)
    except BaseException as error:
        # As the interpreter would. Here, while the error holds what it has met: a process group that nobody holds any
        # more waits for its threads, and one of them may wait for a rank that is not coming.
        sys.excepthook(type(error), error, error.__traceback__)
        end(EXIT_FAILURE)
    end(code)


def _leave_ascii() -> None:
    """Begins anew in Python's UTF-8 mode where the locale and the environment leave it with ASCII for names of files.

    A name that is not ASCII could not be read from the command line there, nor given to the system.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end(code: int) -> NoReturn:
    """Ends this process as the interpreter does, threads and `atexit` included, but kills no thread inside of torch.

    A thread that wants the interpreter's lock while the interpreter ends is unwound where it stands. Where that is a
    destructor of C++, it takes the process with it: "terminate called without an active exception", SIGABRT. So do the
    threads of gloo, which give tensors back under that lock. A rank that has ended its training has ended them
    (`windlass.parallel.mesh.end_groups`). One that fails cannot: a thread may wait for another rank until its
    collective times out, and torch ends none. Where such threads are left, the process ends without its interpreter.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # pyrefly: ignore[missing-attribute]  # waits for threads
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the code stands
    if not _has_other_threads():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _has_other_threads() -> bool:
    """True if there may be threads that this process would kill inside of code that is not Python's."""
    if any(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return True
    tasks = Path("/proc/self/task")
    if not tasks.exists():  # no Linux: nobody can tell
        return "torch" in sys.modules
    return any(name.startswith(_TORCH_THREADS) for name in thread_names())


def thread_names() -> list[str]:
    """The names of all threads of this process, those that are not Python's included. Linux only."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended
            continue
    return names


def _code_of(ending: SystemExit) -> int:
    """The exit code, as the interpreter has it."""
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    sys.stderr.write(f"{ending.code}\n")
    return EXIT_FAILURE
