"""However a job on two nodes ends, no process, socket, file in shared memory or temporary folder of it is left.

Random ends in a row: the last step, bad input, workers that die too often, and Ctrl-C at any moment, from the first
import on, pressed again where the job takes its time.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import launched, nodes
from support.ray_cluster import Driver, RayNodes, marked, ray_config, ray_nodes

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from windlass.train.signals import SECOND_PRESS_S

NUM_NODES = 2
LONGEST_START_S = 8.0
"""After which most jobs train."""
EXIT_INTERRUPTED = -signal.SIGINT
"""Ctrl-C before there is a launcher to hear it."""
HOW = ("completes", "is refused", "dies", "is interrupted")
OVERRIDES = {
    "completes": ("train.steps=4",),
    "is refused": ("data.path=/nowhere",),
    "dies": ("train.steps=100000", "launch.max_restarts=0"),
    "is interrupted": ("train.steps=100000",),
}
MAY_EXIT_WITH = {
    "completes": {EXIT_DONE},
    "is refused": {EXIT_USER_ERROR},
    "dies": {EXIT_FAILURE},
    "is interrupted": {EXIT_STOPPED, EXIT_FAILURE, EXIT_INTERRUPTED},
}


@dataclass
class TorchrunJob:
    machines: list[launched.Machine]

    def workers(self) -> list[psutil.Process]:
        return launched.workers(self.machines[-1].launcher)

    def has_ended(self) -> bool:
        return all(machine.launcher.returncode is not None for machine in self.machines)

    def interrupt(self) -> None:
        for machine in self.machines:
            machine.launcher.send_signal(signal.SIGINT)  # nothing happens to one that has ended

    def join(self) -> set[int]:
        return {machine.join(60) for machine in self.machines}

    def left(self) -> list[str]:
        found: list[str] = []
        for machine in self.machines:
            found += files_in(machine.node.shm_dir) + files_in(machine.scratch)
            found += [str(process) for process in marked(machine.scratch)]
        return found

    @property
    def output(self) -> str:
        return "\n".join(machine.output for machine in self.machines)


@dataclass
class RayJob:
    cluster: RayNodes
    driver: Driver
    scratch: Path

    def workers(self) -> list[psutil.Process]:
        return [process for node in self.cluster.nodes for process in node.processes_of_job()]

    def has_ended(self) -> bool:
        return self.driver.process.poll() is not None

    def interrupt(self) -> None:
        self.driver.process.send_signal(signal.SIGINT)

    def join(self) -> set[int]:
        return {self.driver.join(60)}

    def left(self) -> list[str]:
        found = [entry for node in self.cluster.nodes for entry in node.left()]
        return found + files_in(self.scratch) + [str(process) for process in marked(self.scratch)]

    @property
    def output(self) -> str:
        return self.driver.output


def files_in(folder: Path) -> list[str]:
    """Beside what tests keep there, and a folder that torch makes when it is imported."""
    return [str(path) for path in folder.rglob("*") if path.name != "output" and "torchinductor" not in str(path)]


def shared_entries() -> set[str]:
    """In the folders that all processes of the system share."""
    folders = {Path("/dev/shm"), Path("/tmp"), Path(tempfile.gettempdir())}
    found = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    own = (path for path in found if any(word in path.name for word in ("windlass", "torch", "pymp-")))
    return {str(path) for path in own if not path.name.startswith(("windlass-test-", "windlass-benchmark-"))}


def end(job: TorchrunJob | RayJob, how: str, randomness: random.Random) -> None:
    """Sees to it that the job ends, at some moment."""
    if how == "dies":
        deadline = time.monotonic() + 60
        while not (workers := job.workers()):
            assert time.monotonic() < deadline, f"no worker begins: {job.output}"
            time.sleep(0.01)
        workers[-1].kill()
    if how == "is interrupted":
        time.sleep(randomness.uniform(0, LONGEST_START_S))
        job.interrupt()
        if randomness.random() < 0.5:
            time.sleep(SECOND_PRESS_S + 0.1)
            if not job.has_ended():
                job.interrupt()


def check(job: TorchrunJob | RayJob, how: str) -> None:
    codes = job.join()
    assert codes <= MAY_EXIT_WITH[how], f"a job that {how}, {codes}: {job.output}"
    deadline = time.monotonic() + 30
    while left := job.left():
        assert time.monotonic() < deadline, f"a job that {how}, {codes}, left {left}: {job.output}"
        time.sleep(0.1)


def ways(num_runs: int, randomness: random.Random) -> list[str]:
    """Each at least once; most are interrupted, as that may happen at any moment."""
    return [*HOW, *randomness.choices((*HOW, "is interrupted"), k=num_runs - len(HOW))]


@pytest.mark.serial
@pytest.mark.full
@pytest.mark.parametrize("num_runs", [4, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_under_torchrun(tmp_path: Path, num_runs: int) -> None:
    randomness = random.Random(num_runs)
    for number, how in enumerate(ways(num_runs, randomness)):
        config = nodes.erasure_config(
            tmp_path,
            f"run{number}",
            "checkpoint.num_parity_shards=1",
            *launched.on_nodes(NUM_NODES),
            *OVERRIDES[how],
        )
        with launched.machines() as machines:
            before = shared_entries()
            job = TorchrunJob([machines.start(config) for _ in range(NUM_NODES)])
            end(job, how, randomness)
            check(job, how)
            assert shared_entries() == before


@pytest.mark.serial
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_under_ray(tmp_path: Path) -> None:
    randomness = random.Random(20)
    with ray_nodes(NUM_NODES) as cluster:
        before = shared_entries()
        for number, how in enumerate(ways(20, randomness)):
            config = ray_config(tmp_path, f"run{number}", cluster, str(NUM_NODES), *OVERRIDES[how])
            job = RayJob(cluster, Driver(config, tmp_path / "scratch"), tmp_path / "scratch")
            end(job, how, randomness)
            check(job, how)
            assert shared_entries() == before
