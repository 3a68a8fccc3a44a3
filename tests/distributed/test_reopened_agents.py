"""Snapshots go on after an agent died, in whatever order the agents hear of each other again."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from torch import nn

from windlass.checkpoint.agent.listing import list_agents
from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.parallel.config import ParallelConfig, Sharding

LATE_S = 2.5
"""Longer than the new agent takes to reach the one that has not heard of it yet."""


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="windlass-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def snapshots_after_a_lost_agent(folder: Path, shm_dir: Path) -> list[tuple[str, int]]:
    mesh = ParallelConfig(name=Sharding.ddp).build(torch.device("cpu"))
    checkpointer = Checkpointer(
        {"model": nn.Linear(600, 600)},
        folder,
        mesh,
        num_parity_shards=1,
        failure_domain="rank",
        shm_dir=shm_dir,
        snapshot_every=1,
        persist_every=100,
    )
    outcomes = _take(checkpointer, 1)
    if mesh.rank == 0:
        lost = next(agent for agent in list_agents(shm_dir) if agent.path.endswith("-r1"))
        assert lost.pid is not None
        os.kill(lost.pid, signal.SIGKILL)
        _tell_late(checkpointer)
    mesh.barrier()
    outcomes += _take(checkpointer, 2) + _take(checkpointer, 3)
    checkpointer.close()
    mesh.stop()
    return outcomes


def _tell_late(checkpointer: Checkpointer) -> None:
    """This rank's agent hears last who its new peer is."""
    assert checkpointer.snapshots is not None
    group: AgentClients = checkpointer.snapshots.coordinator.agents
    ask = group.ask

    def ask_late(do: str, *others: Any, **fields: Any) -> dict[str, Any]:
        if do == "configure":
            time.sleep(LATE_S)
        return ask(do, *others, **fields)

    group.ask = ask_late  # type: ignore[method-assign]


def _take(checkpointer: Checkpointer, step: int) -> list[tuple[str, int]]:
    """What comes of a snapshot."""
    checkpointer.snapshot(step)
    outcomes: list[tuple[str, int]] = []
    while not outcomes:
        outcomes = [(event["kind"], event["step"]) for event in checkpointer.poll()]
        time.sleep(0.01)
    checkpointer.mesh.barrier()
    return outcomes


def test_snapshots_go_on_though_an_agent_hears_late_of_its_new_peer(tmp_path: Path, shm_dir: Path) -> None:
    for outcomes in run_ranks(snapshots_after_a_lost_agent, 2, tmp_path, shm_dir):
        assert outcomes == [("snapshot_committed", 1), ("snapshot_skipped", 2), ("snapshot_committed", 3)]
    deadline = time.monotonic() + 20
    while list(shm_dir.iterdir()) and time.monotonic() < deadline:  # agents leave after they have answered
        time.sleep(0.05)
    assert not list(shm_dir.iterdir())
