"""Runs a function on several ranks over gloo on loopback, in processes that are kept from one test to the next."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server a session has imported all that ranks and launchers need; those are forked from it: seconds less a process.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "torch._inductor",  # what `torch.use_deterministic_algorithms` imports, most of the start of a rank
        "pytest",
        "support.toy",
        "support.runs",
        "support.commands",
        "support.optimizers",
        "windlass.launch.main",
        "windlass.launch.torchrun",
        "windlass.optim.apollo",
        "windlass.optim.natural_galore",
        "windlass.optim.muon",
        "windlass.optim.cosmos",
        "windlass.optim.sgd_sai",
    ]
)

PORTS = range(12_000, 32_000)
"""Below those that the system gives to whoever asks for any."""
PORTS_A_PROCESS = 250
_next_port = 0


def free_port() -> int:
    """A port that nobody listens at, and that no other test of this machine is given, of whatever session."""
    global _next_port
    _, ports = _own_ports()
    while True:
        port = ports[_next_port % len(ports)]
        _next_port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@functools.cache
def _own_ports() -> tuple[IO[bytes], range]:
    """Ports that are this process's while it has the file open."""
    folder = Path(tempfile.gettempdir()) / "windlass-test-ports"
    folder.mkdir(exist_ok=True)
    for first in PORTS[::PORTS_A_PROCESS]:
        file = (folder / str(first)).open("wb")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, range(first, first + PORTS_A_PROCESS)
        file.close()
    raise AssertionError("all ports of tests are in use")


class _Rank:
    """A process that runs one function after another."""

    def __init__(self) -> None:
        self.connection, end = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


_idle: list[_Rank] = []
"""Ranks of whatever number: a job of two takes the first two."""


def start_ranks(num_ranks: int) -> None:
    """Has so many wait for functions, and their server with them."""
    run_ranks(os.getpid, num_ranks)


@atexit.register
def end_ranks() -> None:
    """Ends the processes that wait for another function."""
    while _idle:
        _idle.pop().end()


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, local_world_size: int | None = None, fresh: bool = False
) -> list:
    """`function(*args)` on `num_ranks` ranks; what each returned, in rank order.

    `function` must be importable and find its rank in torchrun's environment, as `ParallelConfig.build` does.

    Args:
        fresh: in processes that nothing else has run in, for what measures memory or ends its process.
    """
    port = free_port()
    ranks = [_Rank() if fresh or not _idle else _idle.pop(0) for _ in range(num_ranks)]
    is_sound = False
    try:
        for rank, place in enumerate(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % (local_world_size or num_ranks)),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(local_world_size or num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            place.connection.send((environment, function, args))
        outcomes = [_outcome_of(rank, place) for rank, place in enumerate(ranks)]
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        assert not failures, "\n".join(failures)
        is_sound = True
        return [result for result, _ in outcomes]
    finally:
        if is_sound and not fresh:
            _idle[:0] = ranks
        else:
            for place in ranks:
                place.end()


def _outcome_of(rank: int, place: _Rank) -> tuple[Any, str | None]:
    try:
        return place.connection.recv()
    except (EOFError, ConnectionResetError):
        return None, f"rank {rank} died without a word"


def _patchable() -> list[Any]:
    """The modules of windlass and of what supports its tests, and their classes."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("windlass", "support")]
    modules = [module for name in names if (module := sys.modules[name]) is not None]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [*modules, *(kind for kind in classes if kind.__module__ in names)]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported needs no look at the end of each function
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):  # a launcher signals all that may be its workers
        signal.signal(number, lambda *_: None)
    while True:
        try:
            environment, function, args = connection.recv()
        except EOFError:
            return
        before = _State()
        os.environ.update(environment)
        try:
            connection.send((function(*args), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
            return
        before.restore()


class _State:
    """What a function may leave changed in its process, what it has patched in windlass among it."""

    def __init__(self) -> None:
        self.bindings = [(place, dict(vars(place))) for place in _patchable()]
        self.environment = dict(os.environ)
        self.folder = os.getcwd()  # noqa: PTH109
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def restore(self) -> None:
        for place, names in self.bindings:
            for name in [name for name, value in vars(place).items() if names.get(name) is not value]:
                if name in names:
                    setattr(place, name, names[name])
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        gc.collect()
