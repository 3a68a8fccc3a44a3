"""What snapshots cost in memory, network, open files and threads: of trainers and of agents, over many snapshots."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from support.ranks import run_ranks
from torch import nn

from windlass.checkpoint import Checkpointer
from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.snapshot.saver import HEAD_BYTES
from windlass.parallel.config import ParallelConfig, Sharding

NUM_RANKS = 4
WARM_UP = 4
"""Snapshots until both slots have been used, twice."""
STEADY = 110
"""Snapshots until allocators have what they need, and an agent's list of events is full."""
PARTS = 5
"""Of the snapshots, after each of which memory is looked at."""
LATE_S = 60.0


@dataclass
class Usage:
    """Of one process."""

    rss_bytes: int
    num_files: int
    num_threads: int

    @staticmethod
    def of(pid: int) -> Usage:
        process = psutil.Process(pid)
        return Usage(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass
class Costs:
    """Of one rank and its agent."""

    state_bytes: int
    """S: what this rank has to say."""
    slot_bytes: int
    """All files of the agent's slots."""
    sent_bytes: int
    """Parity that the agent sent, a snapshot."""
    samples: list[tuple[Usage, Usage]]
    """(trainer, agent) after the warm-up, and after each further part of the snapshots."""


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="windlass-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def cost(folder: Path, shm_dir: Path, num_parity_shards: int, size: int, num_snapshots: int, warm_up: int) -> Costs:
    """On one of `NUM_RANKS` ranks, each a node: snapshots of replicated layers of size x size, and what they cost."""
    mesh = ParallelConfig(name=Sharding.ddp).build(torch.device("cpu"))
    model = nn.ModuleList([nn.Linear(size, size, bias=False) for _ in range(2 * NUM_RANKS)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # without temporaries, which make RSS restless
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpointer = Checkpointer(
        {"model": model, "optimizer": optimizer},
        folder,
        mesh,
        num_parity_shards=num_parity_shards,
        failure_domain="rank",
        persist_every=10,
        shm_dir=shm_dir,
        lease_s=30.0,
    )
    snapshot_and_step(checkpointer, optimizer, range(1, 1 + warm_up))
    assert checkpointer.snapshots is not None
    memory = checkpointer.snapshots.coordinator
    client = AgentClient(memory.agents.folder.connect())
    before = client.ask("status")
    samples = [(Usage.of(os.getpid()), Usage.of(before["pid"]))]
    for part in range(PARTS):
        first, last = (1 + warm_up + number * num_snapshots // PARTS for number in (part, part + 1))
        snapshot_and_step(checkpointer, optimizer, range(first, last))
        samples.append((Usage.of(os.getpid()), Usage.of(before["pid"])))
    after = client.ask("status")
    client.close()
    files = [
        path for path in memory.agents.folder.path.iterdir() if path.suffix in (".data", ".parity", ".table", ".head")
    ]
    result = Costs(
        sum(piece.tensor.nbytes for piece in checkpointer.objects.pieces()),
        sum(path.stat().st_size for path in files),
        (after["sent_bytes"]["parity"] - before["sent_bytes"]["parity"]) // num_snapshots,
        samples,
    )
    checkpointer.close()
    mesh.stop()
    return result


def snapshot_and_step(checkpointer: Checkpointer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A snapshot of each of `steps`, committed before the next is taken; the last one is written, where it is to be."""
    deadline = 0.0
    for step in steps:
        deadline = time.monotonic() + LATE_S
        while not checkpointer.snapshot(step):
            assert time.monotonic() < deadline, "an agent does not become free"
        checkpointer.wait_staged()
        optimizer.step()
        committed: set[int] = set()
        while step not in committed:
            assert time.monotonic() < deadline, f"step {step} is not committed"
            committed |= {event["step"] for event in checkpointer.poll() if event["kind"] == "snapshot_committed"}
            time.sleep(0.002)
    assert checkpointer.snapshots is not None
    while not checkpointer.snapshots.coordinator.is_idle():
        assert time.monotonic() < deadline, "an agent does not end its work"
        time.sleep(0.002)
    checkpointer.mesh.barrier()


@pytest.mark.parametrize("num_parity_shards", [pytest.param(1, marks=pytest.mark.full), 2])
def test_memory_and_network_are_what_was_promised(tmp_path: Path, shm_dir: Path, num_parity_shards: int) -> None:
    m, k = num_parity_shards, NUM_RANKS - num_parity_shards
    ranks = run_ranks(cost, NUM_RANKS, tmp_path, shm_dir, m, 1024, 3, WARM_UP, fresh=True)
    largest = max(rank.state_bytes for rank in ranks)  # S
    assert largest > 24e6
    # A node's data is cut into k chunks of whole blocks, behind a description.
    padded = largest + 2 * HEAD_BYTES + k * BLOCK_BYTES
    for rank in ranks:
        assert rank.slot_bytes <= 2 * largest * (1 + m / k) * 1.03 + 64e6
        assert 2 * largest * (1 + m / k) <= rank.slot_bytes <= 2 * padded * (1 + m / k) + BLOCK_BYTES
        assert m * largest <= rank.sent_bytes <= m * padded
    assert not list(shm_dir.iterdir()), "the agents have left something behind"


@pytest.mark.full
def test_a_full_block_is_sent_m_times_within_two_percent(tmp_path: Path, shm_dir: Path) -> None:
    """The size is such that padding is small, as it is for every node of some hundred MB."""
    m, k = 1, NUM_RANKS - 1
    ranks = run_ranks(cost, NUM_RANKS, tmp_path, shm_dir, m, 1140, 3, WARM_UP, fresh=True)
    largest = max(rank.state_bytes for rank in ranks)
    for rank in ranks:
        assert rank.sent_bytes == pytest.approx(m * largest, rel=0.02)
        assert rank.slot_bytes <= 2 * largest * (1 + m / k) * 1.03


def check_drift(ranks: list[Costs], limit: float) -> None:
    drifts = {}
    for number, rank in enumerate(ranks):
        for who, of_samples in zip(("trainer", "agent"), zip(*rank.samples, strict=True), strict=True):
            before, after = of_samples[0], of_samples[-1]
            drifts[f"{who} {number}"] = after.rss_bytes / before.rss_bytes - 1
            print(f"{who} {number}: RSS {[round(usage.rss_bytes / 1e6, 2) for usage in of_samples]} MB")
            for key in ("num_files", "num_threads"):
                # An agent may just be writing its lease, or a chunk.
                assert getattr(after, key) <= getattr(before, key) + 2, (who, key, of_samples)
    assert max(drifts.values()) < limit, drifts


@pytest.mark.full
def test_nothing_grows_from_snapshot_to_snapshot(tmp_path: Path, shm_dir: Path) -> None:
    check_drift(run_ranks(cost, NUM_RANKS, tmp_path, shm_dir, 1, 256, 60, 40, fresh=True), 0.03)


@pytest.mark.soak
def test_nothing_grows_over_500_snapshots(tmp_path: Path, shm_dir: Path) -> None:
    check_drift(run_ranks(cost, NUM_RANKS, tmp_path, shm_dir, 1, 512, 500, STEADY, fresh=True), 0.01)
