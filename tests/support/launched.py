"""`windlass train` in processes of its own, one launcher a simulated machine, as users start it."""

from __future__ import annotations

import contextlib
import copy
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support import commands, nodes, runs
from support.ranks import free_port
from windlass.conf.dotted_keys import flatten
from windlass.conf.store import to_plain

RECOVERY_S = 15.0
"""The bar for the time from the loss of a node to the next finished step."""
GROUPS = ("data", "optim", "parallel", "checkpoint", "launch", "offload")


@dataclass(frozen=True)
class Recovery:
    """Seconds of each part of a way back, from a kill to the next finished step."""

    detect: float
    """Until the launcher knows, or with torchrun all nodes have met again, a new one among them."""
    restart: float
    """Until the processes are there, have met, and ask what can be restored."""
    decode: float
    """Until the lost node's part is whole again."""
    load: float
    """Until all ranks have their state."""
    first_step: float

    @property
    def total(self) -> float:
        return self.detect + self.restart + self.decode + self.load + self.first_step

    @property
    def row(self) -> str:
        return (
            f"{self.total:6.2f} s = detect {self.detect:5.2f} + restart {self.restart:5.2f} "
            f"+ decode {self.decode:5.2f} + load {self.load:5.2f} + first step {self.first_step:5.2f}"
        )


def beside_the_bar(found: Sequence[Recovery]) -> str:
    """To be printed, and not asserted: how long it takes depends on what else the machine does."""
    slowest = max(recovery.total for recovery in found)
    return f"slowest {slowest:.2f} s, bar {RECOVERY_S:g} s: {'kept' if slowest <= RECOVERY_S else 'missed'}"


def on_nodes(num_nodes: int) -> tuple[str, ...]:
    """Overrides of a torchrun job of one worker a node, on loopback, at a port that is free."""
    address = f"127.0.0.1:{free_port()}"
    return (
        "launch=torchrun",
        "launch.nproc_per_node=1",
        f"launch.nnodes={num_nodes}",
        f"launch.address={address}",
    )


def command_line(config: runs.Config) -> list[str]:
    """The overrides that make `windlass train` compose `config`."""
    flat = flatten(to_plain(config))
    chosen = [f"{group}={flat.pop(f'{group}.name')}" for group in GROUPS]
    values = {key: "null" if value is None else str(value).replace(" ", "") for key, value in flat.items()}
    return chosen + [f"{key}={value}" for key, value in values.items()]


def start_launcher(config: runs.Config, scratch: Path, output: Path | None = None, **more: Any) -> commands.Command:
    """Starts `windlass train` as `config` says.

    Args:
        scratch: for its temporary files.
        output: where its output goes; beside `scratch` if there is none.
        more: of `commands.start`.
    """
    output = output or scratch.with_name(f"{scratch.name}.output")
    return commands.start(["train", *command_line(config)], output, **{"TMPDIR": str(scratch), **more})


def workers(launcher: commands.Command) -> list[psutil.Process]:
    """The ranks of a launcher: what its fork server has forked."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += child.children()
    return found


@dataclass
class Machine:
    """A launcher, and the memory of its node."""

    launcher: commands.Command
    node: nodes.Node
    scratch: Path

    @property
    def output(self) -> str:
        return self.launcher.output

    def join(self, timeout_s: float = 120) -> int:
        return self.launcher.wait(timeout_s)

    def lose(self) -> None:
        """SIGKILL to all that runs on the machine, at once, and its memory is gone."""
        doomed = [psutil.Process(self.launcher.pid), *psutil.Process(self.launcher.pid).children(recursive=True)]
        for process in doomed:
            process.suspend()  # so that none sees another die
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait()
        self.node.kill_agent()
        shutil.rmtree(self.node.shm_dir)


class Machines:
    """Starts launchers of one job, each with memory of its own."""

    def __init__(self, root: Path) -> None:
        self._root, self._num_started = root, 0
        self.all: list[Machine] = []

    def start(self, config: runs.Config, prefix: Sequence[str] = (), **changes: Any) -> Machine:
        """Args:
        prefix: a command that becomes the launcher's.
        changes: of `config.launch`, for this machine alone.
        """
        own = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(own.launch, key, value)
        folder = self._root / f"machine{self._num_started}"
        self._num_started += 1
        node, scratch = nodes.Node(folder / "shm"), folder / "tmp"
        node.shm_dir.mkdir(parents=True)
        scratch.mkdir()
        own.checkpoint.shm_dir = str(node.shm_dir)
        launcher = start_launcher(own, scratch, scratch / "output", prefix=prefix, PYTHONFAULTHANDLER="1")
        machine = Machine(launcher, node, scratch)
        self.all.append(machine)
        return machine

    def outputs(self) -> str:
        return "\n".join(f"--- machine {number}\n{machine.output}" for number, machine in enumerate(self.all))

    def stacks(self) -> str:
        """The outputs, and at their ends what each launcher was doing: it prints that, and is no more."""
        running = [machine for machine in self.all if machine.launcher.returncode is None]
        for machine in running:
            children = psutil.Process(machine.launcher.pid).children(recursive=True)
            send(machine, signal.SIGABRT)
            machine.launcher.wait()
            for process in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return self.outputs()

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.all:
            if machine.launcher.returncode is None:
                machine.lose()
            elif machine.node.shm_dir.exists():
                machine.node.kill_agent()


@contextmanager
def machines() -> Iterator[Machines]:
    """Nothing is left of them."""
    system = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="windlass-test-", dir=system if system.is_dir() else None))
    try:
        with Machines(root) as started:
            yield started
    finally:
        shutil.rmtree(root)


def wait_for_step(config: runs.Config, step: int, timeout_s: float = 90) -> None:
    """Until `step` is the last that was recorded, or a later one."""
    path = Path(config.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and newest_step(config) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {runs.output(config)}")


def newest_step(config: runs.Config) -> int:
    return max(runs.losses(config), default=0)


def send(machine: Machine, number: signal.Signals) -> None:
    machine.launcher.send_signal(number)


def wait_for_listener(address: str) -> None:
    """Until somebody listens at HOST:PORT."""
    host, port = address.split(":")

    def is_there() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    nodes.wait_until(is_there, f"a listener at {address}")
