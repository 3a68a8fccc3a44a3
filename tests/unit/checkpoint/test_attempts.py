"""Attempts of a job that follow each other: what they go on from, and with which agent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.agents import shared_memory
from support.checkpoints import Training

from windlass.checkpoint.agent.listing import list_agents
from windlass.parallel.mesh import Mesh


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_snapshot_is_given_up_after_two_resumes_that_made_no_step(tmp_path: Path, mesh: Mesh, num_steps: int) -> None:
    with shared_memory() as shm:
        settings = {"kind": "erasure", "shm_dir": shm, "lease_s": 60.0, "persist_every": 1000}
        training = Training()
        checkpointer = training.checkpointer(tmp_path, mesh, **settings)
        for step in (1, 2):
            training.run(1)
            checkpointer.snapshot(step)
            checkpointer.wait_staged()
            while not any(event["kind"] == "snapshot_committed" for event in checkpointer.poll()):
                time.sleep(0.002)
        seen = []
        for _ in range(3):
            attempt = Training()
            checkpointer = attempt.checkpointer(tmp_path, mesh, **settings)
            restored = checkpointer.restore_latest()
            assert restored is not None
            seen.append(restored.step)
            for _ in range(num_steps):
                checkpointer.wait_staged()
                attempt.run(1)
        checkpointer.close()
    # The second wait comes after a step: that one step was made is known then.
    assert seen == ([2, 2, 2] if num_steps == 2 else [2, 2, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("lazy", "erasure"), ("erasure", "lazy")])
def test_an_attempt_of_another_kind_goes_on_from_what_the_agent_holds(
    tmp_path: Path, mesh: Mesh, kinds: tuple[str, str]
) -> None:
    """Its agent has another number of slots, so another one takes over."""
    with shared_memory() as shm:
        first = Training()
        checkpointer = first.checkpointer(tmp_path, mesh, kind=kinds[0], shm_dir=shm, persist_every=1000)
        first.run(3)
        checkpointer.snapshot(3)
        checkpointer.wait_staged()
        while not any(event["kind"] == "snapshot_committed" for event in checkpointer.poll()):
            time.sleep(0.002)
        second = Training(seed=5)
        checkpointer = second.checkpointer(tmp_path, mesh, kind=kinds[1], shm_dir=shm, persist_every=1000)
        restored = checkpointer.restore_latest()
        assert restored is not None and (restored.step, restored.source) == (3, "local_ram")
        assert second.bits() == first.bits()
        for step in (4, 5, 6):
            second.run(1)
            assert checkpointer.snapshot(step)
            checkpointer.wait_staged()
            while not any(event["kind"] == "snapshot_committed" for event in checkpointer.poll()):
                time.sleep(0.002)
        (agent,) = list_agents(shm)
        checkpointer.close()
        assert agent.step == 6
