"""A Ray cluster on loopback whose nodes a test can lose as machines are lost, and drivers that run on it.

Every node is a raylet with a folder of shared memory and one for temporary files of its own. A node is lost when all
that its raylet has started is killed, the snapshot agent too, and its shared memory is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from support import nodes, runs
from windlass.conf.dotted_keys import flatten
from windlass.conf.store import to_plain

STORE_BYTES = 80 * 2**20
COMMON = {"object_store_memory": STORE_BYTES, "include_log_monitor": False}


@dataclass(eq=False)
class RayletNode:
    """One simulated machine."""

    raylet: Any
    memory: nodes.Node
    scratch: Path

    @property
    def id(self) -> str:
        return self.raylet.node_id

    def processes(self) -> list[psutil.Process]:
        """All that runs on this node."""
        info = self.raylet.all_processes[ray._private.ray_constants.PROCESS_TYPE_RAYLET][0]
        found = [psutil.Process(info.process.pid)]
        found += found[0].children(recursive=True)
        agent = self.memory.agent()
        return found + ([agent] if agent is not None else []) + marked(self.scratch)

    def processes_of_job(self) -> list[psutil.Process]:
        """The workers on this node."""
        return [process for process in marked(self.scratch) if process.name().startswith("windlass-")]

    def left(self) -> list[str]:
        """What a job has left: files and processes."""
        files = [str(path) for folder in (self.memory.shm_dir, self.scratch) for path in folder.rglob("*")]
        jobs = [f"{process.pid} {process.name()}" for process in marked(self.scratch) if is_of_a_job(process)]
        # torch keeps what it has compiled, and asks for the folder when it is imported.
        return [path for path in files if "torchinductor" not in path] + jobs


def marked(scratch: Path) -> list[psutil.Process]:
    """Processes with this folder for their temporary files: those of its node, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(scratch):
                found.append(process)
    return found


def is_of_a_job(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        words = " ".join(process.cmdline())
        is_started = "multiprocessing.forkserver" in words or "windlass" in words or "ray::RayNode" in words
        return is_started and process.status() != psutil.STATUS_ZOMBIE
    return False


class RayNodes:
    def __init__(self, shm: Path, scratch: Path) -> None:
        self._shm, self._scratch = shm, scratch
        self._num = 0
        self.nodes: list[RayletNode] = []
        self.cluster = Cluster()
        self._env = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.cluster.add_node(num_cpus=0, include_dashboard=False, env_vars=self._env, **COMMON)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, **variables: str) -> RayletNode:
        """A node for one rank."""
        shm_dir, scratch = self._shm / f"node{self._num}", self._scratch / f"n{self._num}"
        self._num += 1
        shm_dir.mkdir()
        scratch.mkdir()
        own = {"WINDLASS_SHM_DIR": str(shm_dir), "TMPDIR": str(scratch)}
        raylet = self.cluster.add_node(num_cpus=1, wait=False, env_vars=self._env | own | variables, **COMMON)
        node = RayletNode(raylet, nodes.Node(shm_dir), scratch)
        self.nodes.append(node)
        return node

    def lose(self, node: RayletNode) -> None:
        """As if its power was cut: nothing on it has time for anything."""
        doomed = node.processes()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.memory.lose_memory()
        self.cluster.remove_node(node.raylet, allow_graceful=False)
        self.nodes.remove(node)

    def drain(self, node: RayletNode, seconds: float = 600) -> None:
        """The notice that a cloud gives before it takes a machine away."""
        client = ray._raylet.GcsClient(address=self.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node.id, reason, "preempted", int((time.time() + seconds) * 1000))
        assert accepted, why

    def wait_until_left(self, timeout_s: float = 30) -> None:
        """Nothing of a job is on any node."""

        def left() -> list[str]:
            return [entry for node in self.nodes for entry in node.left()]

        deadline = time.monotonic() + timeout_s
        while left():
            assert time.monotonic() < deadline, left()
            time.sleep(0.1)

    def close(self) -> None:
        doomed = [process for node in self.nodes for process in node.processes()]
        self.cluster.shutdown()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def ray_nodes(num_nodes: int) -> Iterator[RayNodes]:
    """A head that runs nothing, and nodes of one rank each; nothing is left of them."""
    scratch = Path(tempfile.mkdtemp(prefix="wr", dir="/tmp"))  # Ray's sockets lie deep below it
    (scratch / "ray").mkdir()
    with nodes.shared_memory() as shm, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(scratch))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a token in the user's home would be taken by some and not by others
        cluster = RayNodes(shm, scratch)
        try:
            for _ in range(num_nodes):
                cluster.add()
            cluster.cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.close()
            shutil.rmtree(scratch, ignore_errors=True)


class Driver:
    """`windlass train launch=ray` as a user starts it; its output is kept with the time of each line."""

    def __init__(self, config: runs.Config, scratch: Path, **environment: str) -> None:
        scratch.mkdir(exist_ok=True)
        self.config = config
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("windlass"), "train", *command_line(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=scratch.parent,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip("\n")))

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def said(self, words: str) -> bool:
        return any(words in line for _, line in list(self.lines))

    def wait_for(self, words: str, timeout_s: float = 90) -> None:
        self.wait_until(lambda: self.said(words), f"{words!r}", timeout_s)

    def wait_for_step(self, step: int, timeout_s: float = 90) -> None:
        """Of any attempt: the newest line of the metrics."""

        def newest() -> int:
            path = Path(self.config.run_dir) / "metrics.jsonl"
            return max(runs.losses(self.config), default=0) if path.exists() else 0

        self.wait_until(lambda: newest() >= step, f"step {step}", timeout_s)

    def wait_until(self, is_so: Any, what: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}: {self.output}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.output}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C in a terminal reaches all processes of the session."""
        os.killpg(self.process.pid, signal.SIGINT)

    def join(self, timeout_s: float = 120) -> int:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver does not end: {self.output}") from None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def command_line(config: runs.Config) -> list[str]:
    """The overrides that make `windlass train` compose `config`."""
    flat = flatten(to_plain(config))
    chosen = [f"{group}={flat.pop(f'{group}.name')}" for group in ("data", "optim", "parallel", "checkpoint", "launch")]
    values = {key: "null" if value is None else str(value).replace(" ", "") for key, value in flat.items()}
    return chosen + [f"{key}='{value}'" if ":" in value else f"{key}={value}" for key, value in values.items()]


def ray_config(root: Path, run_dir: str, cluster: RayNodes, nnodes: str, *overrides: str) -> runs.Config:
    """A run on so many nodes of one rank that snapshots every step in memory, with one parity shard."""
    return nodes.erasure_config(
        root,
        run_dir,
        "launch=ray",
        f"launch.address='{cluster.address}'",
        f"launch.nnodes='{nnodes}'",
        "launch.max_restarts=20",
        "launch.wait_for_nodes_s=60",
        "checkpoint.num_parity_shards=1",
        *overrides,
    )
