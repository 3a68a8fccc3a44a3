"""Starts the process that workers are forked from: it has imported what they need, once a node and job.

A worker that is forked starts in a moment where a fresh interpreter imports for seconds, which counts in every restart,
and the pages of code are shared between ranks. Nothing that is imported may touch a GPU, or begin a thread that does
not survive a fork (those of OpenBLAS and jemalloc do).

What asks workers to stop often reaches the whole process group or container: the server must outlive it, as workers
still save. So it begins with those signals blocked, and so does every worker, until it can listen (`hear_signals`):
until then they wait, and none is lost.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

MODULES = (
    "windlass.launch.worker",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._inductor",  # what `torch.use_deterministic_algorithms` imports, most of the start of a rank
)
LONGEST_TEMP_DIR = 70
"""Bytes of a path in which multiprocessing's sockets have names of at most 107 bytes, as the system wants them."""
HELD_BACK = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def fork_context() -> ForkServerContext:
    """Returns what starts processes. Starts its server, with this process's environment, if there is none yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    with _safe_path():
        # Starting the tracker unblocks signals, so it comes first.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            _make_socket_folder()
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


@contextmanager
def _safe_path() -> Iterator[None]:
    """Has interpreters that start now find no modules in the working directory: see `windlass.safe_path`."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _make_socket_folder() -> None:
    """Has multiprocessing make its folder, which it does once a process: in /tmp if the usual place is too long."""
    usual = tempfile.gettempdir()
    tempfile.tempdir = socket_folder(LONGEST_TEMP_DIR)
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def socket_folder(longest: int) -> str:
    """Returns the folder of temporary files, or /tmp if its path has more than `longest` bytes."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= longest else "/tmp"


@contextmanager
def shared_cores(num_ranks: int) -> Iterator[None]:
    """Gives a server that begins now the threads of a rank's share of the cores, unless the user has chosen."""
    is_chosen = "OMP_NUM_THREADS" in os.environ
    if not is_chosen:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    try:
        yield
    finally:
        if not is_chosen:
            os.environ.pop("OMP_NUM_THREADS", None)


def send_signal(process: BaseProcess, number: int) -> None:
    """Sends a signal to a child of the server. If it has ended that is no error: its ID goes when the server has waited
    for it, which is before this process hears of it."""
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def hear_signals() -> None:
    """Lets in what was held back while this worker started; of no effect in a process that was not forked."""
    if multiprocessing.parent_process() is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
