"""Ranks of a launched job that hang: they are found, all that can write where they are do so, and the job goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from support import runs
from support.launched import start_launcher, wait_for_step, workers

from windlass.errors import EXIT_DONE

NUM_RANKS, HUNG = 3, 1
TIMEOUT_S = 5.0

FALLS_ASLEEP = """
import os, time

def sleep_once_asked():
    import windlass.train.data.loader as loader
    import windlass.train.evaluate as evaluate

    def sleepy(function, asked):
        def asleep_for_good(*arguments):
            if os.environ.get("RANK") == "{rank}" and os.path.exists(asked):
                os.unlink(asked)
                time.sleep(3600)
            return function(*arguments)

        return asleep_for_good

    loader.Loader.__next__ = sleepy(loader.Loader.__next__, "{asked_in_step}")
    evaluate.count_tokens = sleepy(evaluate.count_tokens, "{asked_in_evaluation}")

os.register_at_fork(after_in_child=sleep_once_asked)
"""
"""A `sitecustomize.py` for the processes of a job: once each, one rank sleeps where it should read a batch, and where
it should count what it has evaluated."""


def config_of(root: Path, name: str, *overrides: str) -> runs.Config:
    return runs.run_config(root, name, "train.steps=120", "checkpoint.persist_every=20", *overrides)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> runs.Config:
    """The same run, which nothing disturbed."""
    config = config_of(tmp_path_factory.mktemp("hangs"), "calm")
    assert runs.run(config, NUM_RANKS) == [EXIT_DONE] * NUM_RANKS
    return config


def launch_and_hang(config: runs.Config, scratch: Path, is_stopped: bool) -> str:
    """Hangs a rank of the job: its process is stopped, or it sleeps, in a step and in the last evaluation.

    Returns:
        What the launcher prints to its end.
    """
    asked = {f"asked_{where}": scratch / where for where in ("in_step", "in_evaluation")}
    (scratch / "sitecustomize.py").write_text(FALLS_ASLEEP.format(rank=HUNG, **asked))
    if not is_stopped:
        asked["asked_in_evaluation"].touch()
    path = os.pathsep.join([str(scratch), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    launcher = start_launcher(config, scratch, PYTHONPATH=path)
    try:
        wait_for_step(config, 22)
        if is_stopped:
            (victim,) = [rank for rank in workers(launcher) if rank.name() == f"windlass-{HUNG}"]
            victim.send_signal(signal.SIGSTOP)
        else:
            asked["asked_in_step"].touch()
        printed, _ = launcher.communicate(timeout=200)
    finally:
        if launcher.poll() is None:
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()
            launcher.wait()
    assert launcher.returncode == EXIT_DONE, printed
    return printed


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "asleep"])
def test_a_job_goes_on_after_a_rank_has_hung(calm: runs.Config, tmp_path: Path, is_stopped: bool) -> None:
    launched = ("launch=torchrun", f"launch.nproc_per_node={NUM_RANKS}", f"launch.hang_timeout_s={TIMEOUT_S}")
    config = config_of(Path(calm.run_dir).parent, f"hung-{is_stopped}", *launched)

    printed = launch_and_hang(config, tmp_path, is_stopped)

    hangs = runs.events(config, "hang")
    assert [hang["step"] // 100 for hang in hangs] == ([0] if is_stopped else [0, 1])
    for hang in hangs:
        assert TIMEOUT_S <= hang["seconds"] < 2 * TIMEOUT_S
        assert hang["num_waiting"] == NUM_RANKS - 1
        assert hang["silent"] == ([HUNG] if is_stopped else [])
        assert [place["rank"] for place in hang["not_waiting"]] == ([] if is_stopped else [HUNG])
    assert f"rank {HUNG} " in printed and "no step for" in printed
    for rank in range(NUM_RANKS):
        stacks = (Path(config.run_dir) / "logs" / f"rank{rank}.log").read_text()
        assert ("in asleep_for_good" in stacks) == (rank == HUNG and not is_stopped)
        assert ("windlass/train/loop.py" in stacks) == (rank != HUNG or not is_stopped)
    recovered = [event["step"] for event in runs.events(config, "recovered")]
    assert all(step >= least for step, least in zip(recovered, [20] if is_stopped else [20, 100], strict=True))
    expected, seen = runs.losses(calm), runs.losses(config)
    assert {step: set(values) for step, values in seen.items()} == {
        step: set(values) for step, values in expected.items()
    }
    assert runs.newest_digest(config) == runs.newest_digest(calm)
