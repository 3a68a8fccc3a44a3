"""A cluster on loopback: nodes of one trainer and one snapshot agent each, which a test can lose as machines are lost.

Every node has a folder of shared memory of its own. A node is lost when its trainer and its agent are killed and that
folder is gone; a launcher then starts all trainers again, on a new node in its place.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support import runs
from support.ranks import CONTEXT, free_port
from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.folder import AgentFolder, folders
from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import Phase

WAIT_S = 60.0


@dataclass
class Node:
    """One simulated machine."""

    shm_dir: Path

    @property
    def folder(self) -> AgentFolder | None:
        """Where the job's agent lives, if it has been started."""
        return next(iter(folders(self.shm_dir)), None)

    def headers(self) -> list[Header]:
        """What the slots hold now; one that is being replaced is left out."""
        found = []
        for path in self.shm_dir.glob("*/*/[01].head"):
            with contextlib.suppress(OSError, ValueError):
                found.append(Header.from_bytes(path.read_bytes()))
        return found

    def phases(self) -> list[Phase]:
        return [header.phase for header in self.headers()]

    def committed(self) -> int:
        """The newest step that this node has committed; 0 where there is none."""
        return max((header.step for header in self.headers() if header.phase == Phase.committed), default=0)

    def agent(self) -> psutil.Process | None:
        """Its process, whether or not it answers."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "windlass.checkpoint.agent" in line and str(self.shm_dir) in line[-1]:
                    return process
        return None

    def running_agent(self) -> psutil.Process:
        process = self.agent()
        assert process is not None, f"there is no agent in {self.shm_dir}"
        return process

    def stop_within(self, phase: Phase, process: psutil.Process) -> None:
        """Stops a process of this node at a moment at which a slot is in `phase`, and stays so."""
        deadline = time.monotonic() + WAIT_S
        while True:
            wait_until(
                lambda: phase in self.phases(), f"a slot that is {phase}", deadline - time.monotonic(), every_s=0.001
            )
            stop(process)
            time.sleep(0.01)
            if phase in self.phases():
                return
            process.resume()

    def status(self) -> dict[str, Any]:
        """What the agent says of itself."""
        with self.client() as client:
            return client.ask("status")

    @contextmanager
    def client(self) -> Iterator[AgentClient]:
        folder = self.folder
        assert folder is not None
        client = AgentClient(folder.connect())
        yield client
        client.close()

    def kill_agent(self) -> None:
        process = self.agent()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                wait_until(lambda: not is_running(process), "the agent's end")

    def wait_until_left(self) -> None:
        """The job is over: the agent has gone, and has left nothing."""
        wait_until(lambda: not any(self.shm_dir.iterdir()), f"the agent in {self.shm_dir} to leave")

    def lose_memory(self) -> None:
        """Also what an agent leaves that was just being started."""
        self.kill_agent()
        shutil.rmtree(self.shm_dir)
        self.shm_dir.mkdir()


class Cluster:
    """Starts whole runs on its nodes."""

    def __init__(self, shm: Path, num_nodes: int) -> None:
        self.nodes = [Node(shm / f"node{number}") for number in range(num_nodes)]
        for node in self.nodes:
            node.shm_dir.mkdir()

    def start(self, config: runs.Config, num_nodes: int | None = None) -> runs.Attempt:
        """Starts the trainers, a rank a node, as a launcher on each node would; on the first nodes only, if so many."""
        nodes = self.nodes[:num_nodes]
        port = free_port()
        processes = []
        for rank, node in enumerate(nodes):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(nodes)),
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            own = copy.deepcopy(config)
            own.checkpoint.shm_dir = str(node.shm_dir)
            process = CONTEXT.Process(target=runs.rank_main, args=(own, variables, None))
            process.start()
            processes.append(process)
        return runs.Attempt(processes)

    def headers(self) -> list[Header]:
        return [header for node in self.nodes for header in node.headers()]

    def newest_committed(self) -> int:
        """The newest step that any node has committed; 0 where there is none."""
        return max(node.committed() for node in self.nodes)

    def replace(self, number: int) -> None:
        """Puts a new node in the place of one, which goes on without the cluster's knowing."""
        self.nodes[number] = Node(self.nodes[number].shm_dir.with_name(f"other{number}"))
        self.nodes[number].shm_dir.mkdir()

    def newest_generation(self) -> int:
        return max((header.snapshot.generation for header in self.headers()), default=0)

    def has_committed_after(self, generation: int) -> bool:
        """Whether a snapshot of a newer generation is committed on some node."""
        return any(
            header.phase == Phase.committed and header.snapshot.generation > generation for header in self.headers()
        )


@contextmanager
def shared_memory() -> Iterator[Path]:
    """A folder for the memory of all nodes of a test, which goes at its end."""
    system = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="windlass-test-", dir=system if system.is_dir() else None))
    try:
        yield path
    finally:
        for shm_dir in path.iterdir():
            Node(shm_dir).kill_agent()
        shutil.rmtree(path)


@contextmanager
def cluster(num_nodes: int) -> Iterator[Cluster]:
    """Nodes, of which nothing is left afterwards."""
    with shared_memory() as shm:
        yield Cluster(shm, num_nodes)


def erasure_config(root: Path, run_dir: str, *overrides: str) -> runs.Config:
    """A run with dropout and a shuffled loader that snapshots in memory only, but for its last step."""
    return runs.run_config(
        root,
        run_dir,
        "model.dropout=0.1",
        "train.batch_size=1",
        "checkpoint=erasure",
        "checkpoint.snapshot_every=1",
        "checkpoint.persist_every=100000",
        "checkpoint.num_parity_shards=2",
        *overrides,
    )


def undisturbed(num_nodes: int, *overrides: str) -> runs.Config:
    """The run of `erasure_config` as nothing disturbs it, whatever protects it: with checkpoints on a disk."""
    return runs.undisturbed(num_nodes, "checkpoint=durable", *overrides, like=erasure_config)


def kill_trainers(attempt: runs.Attempt) -> None:
    """As a launcher ends those that are left when one has died."""
    attempt.kill()
    attempt.join()


def is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = WAIT_S, every_s: float = 0.02) -> None:
    """Looks `every_s` seconds: what is waited for needs the cores."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(every_s)


def stop(process: psutil.Process) -> None:
    """SIGSTOP; returns when the process has stopped."""
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "a process to stop")
