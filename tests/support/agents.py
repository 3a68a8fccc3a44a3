"""A few snapshot agents on this machine, each a node with shared memory of its own, driven as trainers drive them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from support.stored import noise
from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.folder import AgentFolder
from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.slots import SharedFile, SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.image import Description, FragmentSpec, image_bytes, lay_out
from windlass.checkpoint.snapshot.plan import Held, RecoveryPlan, plan_recovery
from windlass.checkpoint.snapshot.reader import SlotSource, manifest_of, read_parts
from windlass.checksum import crc32c

HEAD_BYTES = 64 << 10
LATE_S = 30.0
"""What must happen is given so long."""


def wait_until(condition: Callable[[], Any], what: str, late_s: float = LATE_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + late_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {late_s:.0f} s"
        time.sleep(0.005)
    return value


@contextlib.contextmanager
def shared_memory() -> Iterator[Path]:
    """A folder of shared memory that is gone afterwards."""
    system = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="windlass-test-", dir=system if system.is_dir() else None) as folder:
        yield Path(folder)


@contextlib.contextmanager
def small_tmpfs(parent: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of `num_bytes`; skips the test where this process may not mount one."""
    folder = parent / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_header(folder: Path, index: int) -> Header | None:
    """What the head of a slot says; None if it has none, or none that is whole."""
    try:
        return Header.from_bytes((folder / f"{index}.head").read_bytes())
    except (OSError, ValueError):
        return None


@dataclass
class Cluster:
    """The agents of one job; the test is their trainers, a rank a node.

    Args:
        root: shared memory; each node has a folder there.
        store: where the durable checkpoints go.
        rates: node -> what its agent sends at most, bytes a second.
    """

    root: Path
    num_nodes: int
    num_parity_shards: int
    store: Location
    tensor_bytes: int = 1 << 20
    """A node has two such tensors."""
    num_slots: int = 2
    lease_s: float = 60.0
    rates: dict[int, float] = field(default_factory=dict)
    keep_durable: int = 0
    clients: dict[int, AgentClient] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    generation: int = 1
    number: int = 0
    steps: dict[SnapshotId, int] = field(default_factory=dict)
    secret: bytes = b""
    """Another one whenever the agents are told of each other, as trainers do it."""

    # --- Agents. ---

    def folder(self, node: int) -> AgentFolder:
        shm_dir = self.root / f"node{node}"
        shm_dir.mkdir(exist_ok=True)
        return AgentFolder.of("a job", shm_dir)

    def open(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start, range(self.num_nodes)))
        self.configure()

    def start(self, node: int) -> None:
        """As trainers do: finds the node's agent, or starts it."""
        connection = self.folder(node).start_agent(f"{self.store}#test", self.num_slots, "127.0.0.1", self.lease_s)
        self.clients[node] = AgentClient(connection)
        self.pids[node] = self.status(node)["pid"]

    def reopen(self) -> None:
        """What trainers do when an agent was lost: the same generation, with those that are there now."""
        for client in self.clients.values():
            client.close()
        self.open()

    def configure(self, keep: Iterable[SnapshotId] = ()) -> None:
        self.secret = secrets.token_bytes(32)
        addresses = [self.status(node)["address"] for node in range(self.num_nodes)]
        for node, client in self.clients.items():
            client.ask(
                "configure",
                generation=self.generation,
                position=node,
                addresses=addresses,
                secret=self.secret.hex(),
                num_parity_shards=self.num_parity_shards,
                writer=0,
                keep=list(keep),
                store=str(self.store),
                keep_durable=self.keep_durable,
                max_send_bytes_per_s=self.rates.get(node),
            )

    def status(self, node: int) -> dict[str, Any]:
        return self.clients[node].ask("status")

    def kill(self, *nodes: int) -> None:
        """SIGKILL to the agents, all at once."""
        for node in nodes:
            os.kill(self.pids[node], signal.SIGKILL)
        for node in nodes:
            wait_until(lambda node=node: not self.folder(node).has_agent(), "the end of a killed agent")

    def signal(self, node: int, number: signal.Signals) -> None:
        """Sends a signal; returns when a process that was told to stop has stopped, which takes the system a moment."""
        os.kill(self.pids[node], number)
        if number == signal.SIGSTOP:
            process = psutil.Process(self.pids[node])
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "an agent to stop")

    def lose(self, *nodes: int) -> None:
        """The agents are killed, and their memory is gone."""
        self.kill(*nodes)
        for node in nodes:
            shutil.rmtree(self.root / f"node{node}")

    def close(self) -> None:
        """Leaves no process and no file."""
        for client in self.clients.values():
            client.close()
        for node in range(self.num_nodes):
            if node in self.pids and self.folder(node).has_agent():
                self.signal(node, signal.SIGKILL)
                wait_until(lambda node=node: not self.folder(node).has_agent(), "the end of a killed agent")
            shutil.rmtree(self.root / f"node{node}", ignore_errors=True)

    # --- Snapshots. ---

    def region(self, node: int, step: int) -> bytes:
        """All that the rank of a node has to say at a step."""
        blocks = [FragmentSpec(name, "uint8", (size,), (0,), (size,)) for name, size in self._tensors(node).items()]
        chunks = lay_out(blocks)
        head = Description(node, chunks, {"step": step} if node == 0 else {}).to_bytes()
        image = bytearray(image_bytes(chunks))
        for chunk in chunks:
            for entry in chunk.entries:
                image[entry.begin : entry.end] = noise(f"{entry.spec.name} {step}", entry.spec.nbytes)
        return head.ljust(HEAD_BYTES, b"\0") + bytes(image)

    def _tensors(self, node: int) -> dict[str, int]:
        return {f"n{node}.a": self.tensor_bytes, f"n{node}.b": self.tensor_bytes - 12345}

    def expected(self, step: int) -> dict[str, bytes]:
        return {
            name: noise(f"{name} {step}", size)
            for node in range(self.num_nodes)
            for name, size in self._tensors(node).items()
        }

    def begin(self, step: int, persist: bool = False, nodes: Iterable[int] | None = None) -> SnapshotId:
        """Has a slot begun on `nodes`, or on all."""
        self.number += 1
        snapshot = SnapshotId(self.generation, self.number)
        self.steps[snapshot] = step
        sizes = [len(self.region(node, step)) for node in range(self.num_nodes)]
        for node in range(self.num_nodes) if nodes is None else nodes:
            self.clients[node].ask(
                "begin",
                snapshot=snapshot,
                step=step,
                rank=node,
                regions=[[other, other, 0, size] for other, size in enumerate(sizes)],
                node_bytes=-(-max(sizes) // BLOCK_BYTES) * BLOCK_BYTES,
                world_size=self.num_nodes,
                layout="one layout",
                persist=persist,
            )
        return snapshot

    def copy(self, snapshot: SnapshotId, nodes: Iterable[int] | None = None) -> None:
        """The trainers of `nodes`, or of all, copy their state, and say so."""
        for node in range(self.num_nodes) if nodes is None else nodes:
            region = self.region(node, self.steps[snapshot])
            data = region + bytes(-len(region) % BLOCK_BYTES)
            files = self.slot(node, snapshot)
            assert files.header is not None
            shared = SharedFile(files.path("data"), files.header.stripes.data_bytes, may_make=False)
            shared.view[: len(data)] = data
            sums = np.array([crc32c(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)], np.uint32)
            self.clients[node].ask("copied", sums.view(np.uint8), snapshot=snapshot, rank=node)

    def take(self, step: int, persist: bool = False) -> SnapshotId:
        """A snapshot that all nodes have committed."""
        wait_until(lambda: all(self.status(node)["is_free"] for node in self.clients), "a free slot")
        snapshot = self.begin(step, persist)
        self.copy(snapshot)
        self.wait_for_phase("committed", snapshot)
        return snapshot

    def wait_for_phase(self, phase: str, snapshot: SnapshotId, nodes: Iterable[int] | None = None) -> None:
        """By what the files say."""
        for node in range(self.num_nodes) if nodes is None else nodes:
            deadline = time.monotonic() + LATE_S
            while self.phase(node, snapshot) != phase:
                assert time.monotonic() < deadline, f"node {node} is not {phase} in time:\n{self.describe(snapshot)}"
                time.sleep(0.002)

    def describe(self, snapshot: SnapshotId) -> str:
        """How far a snapshot is, and what the agents have to say."""
        folders = [self.folder(node).path for node in range(self.num_nodes)]
        logs = [f"{self.phase(node, snapshot)}\n{(at / 'agent.log').read_text()}" for node, at in enumerate(folders)]
        return "\n".join(f"node {node}: {log}" for node, log in enumerate(logs))

    def phase(self, node: int, snapshot: SnapshotId) -> str:
        """As the files say it: whether there is an agent or not."""
        for index in range(self.num_slots):
            header = read_header(self.folder(node).path, index)
            if header is not None and header.snapshot == snapshot:
                return header.phase.value
        return "empty"

    def slot(self, node: int, snapshot: SnapshotId) -> SlotFiles:
        """The files of a snapshot on a node; not opened, but for the header."""
        folder = self.folder(node).path
        for path in sorted(folder.glob("*.head")):
            header = read_header(folder, int(path.stem))
            if header is not None and header.snapshot == snapshot:
                return SlotFiles(folder, int(path.stem), header)
        raise AssertionError(f"node {node} has no slot of {snapshot}")

    def files(self, node: int, snapshot: SnapshotId) -> dict[str, bytes]:
        """The bytes of a slot but for its head: data, parity and table."""
        slot = self.slot(node, snapshot)
        return {suffix: slot.path(suffix).read_bytes() for suffix in ("data", "parity", "table")}

    # --- Recovery. ---

    def plan(self) -> RecoveryPlan | None:
        statuses = [self.status(node) for node in range(self.num_nodes)]
        names = [entry.name for entry in fields(Held)]
        held = [[Held.from_json({name: slot[name] for name in names}) for slot in of["slots"]] for of in statuses]
        return plan_recovery(held)

    def recover(self) -> RecoveryPlan | None:
        """What trainers do that were started again: they look, read what they rely on, and rebuild what is lost.

        Returns:
            What was planned; every node has its part of it now.
        """
        self.number = 0
        while True:
            statuses = [self.status(node) for node in range(self.num_nodes)]
            plan = self.verified_plan()
            self.generation = 1 + max(status["generation"] for status in statuses)
            held = {SnapshotId(*slot["snapshot"]) for status in statuses for slot in status["slots"]}
            self.configure([] if plan is None else [snapshot for snapshot in held if snapshot <= plan.snapshot])
            if plan is None or self.plan() == plan:  # else agents gave up what was in flight, just before the fence
                break
        if plan is not None:
            self.rebuild(plan)
        return plan

    def verified_plan(self) -> RecoveryPlan | None:
        plan = self.plan()
        while plan is not None:
            for node in range(self.num_nodes):
                self.clients[node].ask("verify", snapshot=plan.snapshot)
            looked, plan = plan, self.plan()
            if plan is None or plan.snapshot == looked.snapshot:
                break
        return plan

    def rebuild(self, plan: RecoveryPlan) -> None:
        for position in plan.lost:
            self.clients[position].ask("rebuild", **self.rebuild_request(plan, position))

    def rebuild_request(self, plan: RecoveryPlan, position: int) -> dict[str, Any]:
        slots = self.status(min(plan.holders.values()))["slots"]
        header = next((slot for slot in slots if SnapshotId(*slot["snapshot"]) == plan.snapshot), None)
        assert header is not None, f"{plan}, and the agents have\n{self.describe(plan.snapshot)}"
        sources = {held: self.status(node)["address"] for held, node in plan.holders.items()}
        return {"header": header, "position": position, "sources": sources}

    def read(self, snapshot: SnapshotId) -> dict[str, bytes]:
        """Every tensor of a snapshot, as a restore reads it: of node 0 from its memory, of the others over agents."""
        parts = []
        local = {}
        for node in range(self.num_nodes):
            files = self.slot(node, snapshot)
            files.open(with_parity=False)
            parts += read_parts(files.memory)
            if node == 0:
                local[node] = files.memory
        addresses = {node: tuple(self.status(node)["address"]) for node in range(self.num_nodes)}
        source = SlotSource(snapshot, self.steps[snapshot], local, addresses, self.secret, self.generation)
        reader = CheckpointReader(manifest_of(self.steps[snapshot], self.generation, self.num_nodes, parts), source)
        try:
            return {name: reader.read_whole(name).numpy().tobytes() for name in reader.manifest.tensors}
        finally:
            reader.close()


@contextlib.contextmanager
def cluster(num_nodes: int, num_parity_shards: int, store: Location, **more: Any) -> Iterator[Cluster]:
    """Open agents; nothing of them is left afterwards."""
    with shared_memory() as root:
        nodes = Cluster(root, num_nodes, num_parity_shards, store, **more)
        try:
            nodes.open()
            yield nodes
        finally:
            nodes.close()
