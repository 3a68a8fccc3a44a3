"""Whole runs of ranks that are asked something in the middle: how each ends, and what the next attempt begins with."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from support import nodes, runs
from support.ranks import run_ranks

from windlass.data.batch import Batch
from windlass.data.loader import Loader
from windlass.errors import EXIT_DONE, EXIT_RESTART, EXIT_STOPPED
from windlass.launch.worker import run_worker
from windlass.outcome import OUTCOME_FILE

NUM_RANKS = 3
ASKED_AT = 5
"""The step in whose beginning ranks are asked: before they agree on it, so the last one."""


def train_and_be_asked(config: runs.Config, asked: Mapping[int, signal.Signals], shm: Path | None) -> int:
    """A rank whose process gets the signal that is there for its rank; a node of its own, with memory of its own."""
    rank = int(os.environ["RANK"])
    os.environ[OUTCOME_FILE] = f"{config.run_dir}.outcome"
    if shm is not None:
        config.checkpoint.shm_dir = str(shm / f"node{rank}")
        Path(config.checkpoint.shm_dir).mkdir(exist_ok=True)
    following, num_batches = Loader.__next__, 0

    def signalled(loader: Loader) -> Batch:
        nonlocal num_batches
        num_batches += 1
        if num_batches == ASKED_AT and rank in asked:
            signal.raise_signal(asked[rank])
        return following(loader)

    Loader.__next__ = signalled  # type: ignore[method-assign]
    return run_worker(config)


def run_nodes(
    config: runs.Config, num_ranks: int, asked: Mapping[int, signal.Signals], shm: Path | None = None
) -> list[int]:
    return run_ranks(train_and_be_asked, num_ranks, config, asked, shm, local_world_size=1)


def job(tmp_path: Path, name: str, nnodes: str, *overrides: str) -> runs.Config:
    launched = ("launch=torchrun", "launch.address=127.0.0.1:1", "launch.nproc_per_node=1", f"launch.nnodes={nnodes}")
    return runs.run_config(tmp_path, name, "checkpoint.persist_every=1000", *launched, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nnodes", "asked", "codes", "kind"),  # all else that may be asked: tests/unit/train/test_agreement.py
    [
        pytest.param(
            "2:3", {1: signal.SIGUSR1}, [EXIT_RESTART, EXIT_STOPPED, EXIT_RESTART], "leaving", id="one leaves"
        ),
        pytest.param("3", {1: signal.SIGUSR1}, [EXIT_STOPPED] * 3, "preempted", id="none may leave"),
        pytest.param("2:3", {2: signal.SIGTERM}, [EXIT_RESTART] * 3, "restarting", id="others come"),
    ],
)
def test_what_is_asked_of_some_decides_how_all_end(
    tmp_path: Path, nnodes: str, asked: dict[int, signal.Signals], codes: list[int], kind: str
) -> None:
    config = job(tmp_path, "asked", nnodes)
    assert run_nodes(config, NUM_RANKS, asked) == codes
    endings = [event for name in ("preempted", "leaving", "restarting") for event in runs.events(config, name)]
    assert [(event["kind"], event["step"]) for event in endings] == [(kind, ASKED_AT)]
    if kind == "leaving":
        assert endings[0]["nodes"] == [rank for rank, number in asked.items() if number == signal.SIGUSR1]
    assert runs.is_committed(config, ASKED_AT), "it is saved before anybody ends"
    assert max(runs.losses(config)) == ASKED_AT


@pytest.mark.slow
def test_those_that_stay_go_on_from_where_the_node_left(tmp_path: Path) -> None:
    config = job(tmp_path, "left", "2:3")
    run_nodes(config, NUM_RANKS, {1: signal.SIGUSR1})
    assert run_nodes(config, NUM_RANKS - 1, {}) == [EXIT_DONE] * 2
    assert [event["step"] for event in runs.events(config, "recovered")] == [ASKED_AT]
    losses = runs.losses(config)
    assert list(losses) == list(range(1, config.train.steps + 1))
    assert all(len(values) == 1 for values in losses.values()), "no step is trained twice"


@pytest.mark.slow
def test_a_restart_leaves_the_snapshot_agents_at_work(tmp_path: Path) -> None:
    """The attempt that comes finds the last step in memory."""
    with nodes.shared_memory() as shm:
        config = job(tmp_path, "kept", "2:3", "checkpoint=erasure", "checkpoint.num_parity_shards=1")
        assert run_nodes(config, NUM_RANKS, {0: signal.SIGTERM}, shm) == [EXIT_RESTART] * 3
        assert run_nodes(config, NUM_RANKS, {}, shm) == [EXIT_DONE] * 3
        (recovered,) = runs.events(config, "recovered")
        assert (recovered["step"], recovered["source"]) == (ASKED_AT, "local_ram")


@pytest.mark.slow
def test_without_checkpoints_nothing_is_saved(tmp_path: Path) -> None:
    config = job(tmp_path, "unsaved", "2:3", "checkpoint=none")
    assert run_nodes(config, NUM_RANKS, {0: signal.SIGTERM}) == [EXIT_RESTART] * 3
    assert not runs.checkpoints(config).exists()


@pytest.mark.slow
def test_a_run_that_stops_leaves_no_snapshot_agents(tmp_path: Path) -> None:
    with nodes.shared_memory() as shm:
        config = job(tmp_path, "stopped", "2:3", "checkpoint=erasure", "checkpoint.num_parity_shards=1")
        assert run_nodes(config, NUM_RANKS, {1: signal.SIGINT}, shm) == [EXIT_STOPPED] * 3
        nodes.wait_until(lambda: not list(shm.glob("node*/*")), "the agents to leave", 10.0)
