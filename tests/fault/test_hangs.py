"""Ranks of a launched job that hang: they are found, all that can write where they are do so, and the job goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import runs
from support.launched import start_launcher, wait_for_step, workers

from windlass.data import loader
from windlass.errors import EXIT_DONE
from windlass.train.objectives.objective import Objective

NUM_RANKS, HUNG = 3, 1
NUM_STEPS = 60
TIMEOUT_S = 5.0


def sleep_once_asked(in_step: Path, in_evaluation: Path) -> None:
    """Has one rank of a job sleep, once each, where it should read a batch and where it should measure in an
    evaluation, as soon as a file asks it to. Runs in the launcher that the ranks are forked from."""
    loader.Loader.__next__ = sleepy(loader.Loader.__next__, in_step)  # type: ignore[method-assign]
    Objective.metric_sums = sleepy(Objective.metric_sums, in_evaluation)  # type: ignore[method-assign]


def sleepy(function: Callable[..., Any], asked: Path) -> Callable[..., Any]:
    def asleep_for_good(*arguments: Any) -> Any:
        if os.environ.get("RANK") == str(HUNG) and asked.exists():
            asked.unlink()
            time.sleep(3600)
        return function(*arguments)

    return asleep_for_good


def config_of(root: Path, name: str, *overrides: str) -> runs.Config:
    return runs.run_config(root, name, f"train.steps={NUM_STEPS}", "checkpoint.persist_every=20", *overrides)


def launch_and_hang(config: runs.Config, scratch: Path, is_stopped: bool) -> str:
    """Hangs a rank of the job: its process is stopped, or it sleeps, in a step and in the last evaluation.

    Returns:
        What the launcher prints to its end.
    """
    in_step, in_evaluation = scratch / "in_step", scratch / "in_evaluation"
    if not is_stopped:
        in_evaluation.touch()
    launcher = start_launcher(config, scratch, before=partial(sleep_once_asked, in_step, in_evaluation))
    try:
        wait_for_step(config, 22)
        if is_stopped:
            (victim,) = [rank for rank in workers(launcher) if rank.name() == f"windlass-{HUNG}"]
            victim.send_signal(signal.SIGSTOP)
        else:
            in_step.touch()
        code = launcher.wait(200)
    finally:
        if launcher.returncode is None:
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()
            launcher.wait()
    assert code == EXIT_DONE, launcher.output
    return launcher.output


@pytest.mark.parametrize(
    "is_stopped", [pytest.param(True, id="stopped", marks=pytest.mark.full), pytest.param(False, id="asleep")]
)
def test_a_job_goes_on_after_a_rank_has_hung(tmp_path: Path, is_stopped: bool) -> None:
    calm = runs.undisturbed(NUM_RANKS, like=config_of)
    launched = ("launch=torchrun", f"launch.nproc_per_node={NUM_RANKS}", f"launch.hang_timeout_s={TIMEOUT_S}")
    config = config_of(tmp_path, "hung", *launched)

    printed = launch_and_hang(config, tmp_path, is_stopped)

    hangs = runs.events(config, "hang")
    assert [hang["step"] == NUM_STEPS for hang in hangs] == ([False] if is_stopped else [False, True])
    for hang in hangs:
        assert TIMEOUT_S <= hang["seconds"] < 3 * TIMEOUT_S
        assert hang["num_waiting"] == NUM_RANKS - 1
        assert hang["silent"] == ([HUNG] if is_stopped else [])
        assert [place["rank"] for place in hang["not_waiting"]] == ([] if is_stopped else [HUNG])
    assert f"rank {HUNG} " in printed and "no step for" in printed
    for rank in range(NUM_RANKS):
        stacks = (Path(config.run_dir) / "logs" / f"rank{rank}.log").read_text()
        assert ("in asleep_for_good" in stacks) == (rank == HUNG and not is_stopped)
        assert ("windlass/train/loop.py" in stacks) == (rank != HUNG or not is_stopped)
    recovered = [event["step"] for event in runs.events(config, "recovered")]
    assert all(step >= least for step, least in zip(recovered, [20] if is_stopped else [20, 40], strict=True))
    runs.assert_same_training(config, calm)
