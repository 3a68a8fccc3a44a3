"""A snapshot of four ranks, in memory or on disk, is read back into two, three and six."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import nodes, runs
from support.ranks import run_ranks
from support.snapshots import Protected
from test_reshard import delivered_once, samples_of

from windlass.errors import EXIT_DONE

BEFORE = 4
PARITY = {2: 1, 3: 1, 4: 2, 6: 2}
"""Number of nodes -> parity shards."""


def node_memory(shm: Path) -> Path:
    """Of the machine of this rank."""
    return shm / f"node{int(os.environ['RANK']) // int(os.environ['LOCAL_WORLD_SIZE'])}"


def take(directory: Path, shm: Path, num_parity_shards: int) -> list[tuple[str, str]]:
    """Step 1 on disk and step 2 in memory. Returns the digests of both."""
    node_memory(shm).mkdir(exist_ok=True)
    state = Protected(directory)
    assert state.protect(node_memory(shm), num_parity_shards=num_parity_shards) is None
    assert state.checkpointer is not None
    state.advance()
    digests = [state.digests()]
    state.checkpointer.save(1)
    state.advance()
    digests.append(state.digests())
    state.snapshot(2)
    state.mesh.stop()
    return digests


def restore(directory: Path, shm: Path, num_parity_shards: int) -> tuple[int, str, tuple[str, str]]:
    """Into a model of other weights: step, source and digests."""
    state = Protected(directory, seed=99)
    state.advance()
    restored = state.protect(node_memory(shm), num_parity_shards=num_parity_shards)
    assert restored is not None
    digests = state.digests()
    state.close()
    state.mesh.stop()
    return restored.step, restored.source, digests


@pytest.mark.parametrize(
    ("is_one_machine", "sources"),
    [
        # Of four nodes two are no more; those that come have nothing.
        pytest.param(False, {2: "parity", 3: "parity", 6: "local_ram"}, id="nodes"),
        pytest.param(
            True, {2: "local_ram", 3: "local_ram", 6: "local_ram"}, id="ranks of one machine", marks=pytest.mark.full
        ),
    ],
)
def test_four_ranks_become_two_three_and_six(tmp_path: Path, is_one_machine: bool, sources: dict[int, str]) -> None:
    with nodes.shared_memory() as shm, nodes.shared_memory() as stage:
        directory = tmp_path / "checkpoints"
        local_ranks = BEFORE if is_one_machine else 1
        parity = 0 if is_one_machine else PARITY[BEFORE]
        on_disk, in_memory = run_ranks(take, BEFORE, directory, shm, parity, local_world_size=local_ranks)[0]
        for shm_dir in shm.iterdir():
            nodes.Node(shm_dir).kill_agent()
        for num_ranks, source in sources.items():
            parity, local_ranks = (0, num_ranks) if is_one_machine else (PARITY[num_ranks], 1)
            for number in range(num_ranks // local_ranks):
                kept, copy = shm / f"node{number}", stage / f"node{number}"
                if kept.is_dir():
                    shutil.copytree(kept, copy, ignore=shutil.ignore_patterns("*.sock"))
                copy.mkdir(exist_ok=True)
            from_memory = run_ranks(restore, num_ranks, directory, stage, parity, local_world_size=local_ranks)
            assert from_memory == [(2, source, in_memory)] * num_ranks
            for shm_dir in stage.iterdir():
                nodes.Node(shm_dir).wait_until_left()
            from_disk = run_ranks(restore, num_ranks, directory, stage, parity, local_world_size=local_ranks)
            assert from_disk == [(1, "durable", on_disk)] * num_ranks
            for shm_dir in stage.iterdir():
                nodes.Node(shm_dir).wait_until_left()
                shm_dir.rmdir()


ATTEMPTS = [(4, 3, 1, 6), (2, 3, 2, 12), (3, 4, 1, 18), (6, 2, 1, 24)]
"""Ranks, batch size, micro-steps, and the step that the attempt is to reach, at the least."""


@pytest.mark.full
def test_nodes_may_come_and_go_between_lives_and_every_sample_is_seen_once(tmp_path: Path) -> None:
    """4 -> 2 -> 3 -> 6 nodes at a global batch of 12, from memory to memory."""
    common = ("model.dropout=0.0", "data.borders=none", "train.steps=24")
    calm = nodes.undisturbed(BEFORE, "train.batch_size=3", *common)

    with nodes.cluster(6) as cluster:
        for num_nodes, batch_size, accumulation, step in ATTEMPTS:
            config = nodes.erasure_config(
                tmp_path,
                "changing",
                f"train.batch_size={batch_size}",
                f"train.grad_accum_steps={accumulation}",
                f"checkpoint.num_parity_shards={PARITY[num_nodes]}",
                *common,
            )
            attempt = cluster.start(config, num_nodes)
            if (num_nodes, batch_size, accumulation, step) == ATTEMPTS[-1]:
                assert attempt.join() == [EXIT_DONE] * num_nodes, runs.output(config)
            else:
                reached(cluster, attempt, step)
    recovered = runs.events(config, "recovered")
    assert [event["source"] for event in recovered] == ["parity", "local_ram", "local_ram"]
    ends = [event["step"] for event in recovered] + [config.train.steps]
    kept = [(*attempt[:3], end) for attempt, end in zip(ATTEMPTS, ends, strict=True)]
    assert all(end >= attempt[3] for attempt, end in zip(ATTEMPTS, ends, strict=True))

    runs.assert_close_training(config, calm, atol=1e-3)
    assert samples_of(runs.checkpoints(config)) == 24 * 12 == samples_of(runs.checkpoints(calm))
    assert delivered_once(config, kept)


def reached(cluster: nodes.Cluster, attempt: runs.Attempt, step: int) -> None:
    """Kills the trainers once every node of theirs has committed `step`."""
    num_nodes = len(attempt.processes)
    nodes.wait_until(
        lambda: all(node.committed() >= step for node in cluster.nodes[:num_nodes]) or not attempt.is_alive(), "a step"
    )
    assert attempt.is_alive()
    nodes.kill_trainers(attempt)
