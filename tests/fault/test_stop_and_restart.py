"""Requests to stop, workers that die, and launchers that bring them back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import runs
from support.launched import command_line, start_launcher, wait_for_step, workers

from windlass.errors import EXIT_DONE, EXIT_STOPPED

NUM_RANKS = 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint_and_the_rest_is_the_same(
    tmp_path: Path, number: signal.Signals
) -> None:
    calm = runs.undisturbed(NUM_RANKS, "train.steps=40", "checkpoint.persist_every=1000")
    config = runs.run_config(tmp_path, "stopped", "train.steps=40", "checkpoint.persist_every=1000")
    attempt = runs.start(config, NUM_RANKS)
    wait_for_step(config, 5)
    os.kill(attempt.processes[1].pid or 0, number)

    assert attempt.join() == [EXIT_STOPPED] * NUM_RANKS, runs.output(config)

    (stopped,) = runs.events(config, "preempted")
    assert [event["step"] for event in runs.events(config, "persisted")] == [stopped["step"]]
    assert "the same command resumes" in runs.output(config)
    assert runs.run(config, NUM_RANKS) == [EXIT_DONE] * NUM_RANKS
    assert runs.losses(config) == runs.losses(calm), "a stop trains no step twice and changes none"
    runs.assert_same_training(config, calm)


TELLS_ITS_THREADS = """
import runpy
from windlass import process
def end(code, end=process.end):
    print("threads", *sorted(set(process.thread_names())), flush=True)
    end(code)
process.end = end
runpy.run_module("windlass.train", run_name="__main__", alter_sys=True)
"""


def test_plain_torchrun_runs_the_same_loop_and_leaves_no_thread_of_torch(tmp_path: Path) -> None:
    """`torchrun -m windlass.train`: every rank composes the configuration, and the bits are those of any launcher.

    A thread of gloo that is left when the interpreter ends may abort the rank: see `windlass.process`.
    """
    calm = runs.undisturbed(NUM_RANKS)
    config = runs.run_config(tmp_path, "plain")
    script = tmp_path / "as_module.py"
    script.write_text(TELLS_ITS_THREADS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", str(script)]
    result = subprocess.run(
        [*torchrun, *command_line(config)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == EXIT_DONE, result.stderr
    assert "done    step 12" in result.stdout
    assert result.stdout.count("threads ") == NUM_RANKS and "pt_" not in result.stdout, result.stdout
    runs.assert_same_training(config, calm)
    assert not (tmp_path / "outputs").exists() and not (tmp_path / ".hydra").exists(), "Hydra writes nothing"


def torchrun_config(tmp_path: Path, name: str, *overrides: str) -> runs.Config:
    return runs.run_config(tmp_path, name, "launch=torchrun", f"launch.nproc_per_node={NUM_RANKS}", *overrides)


def test_the_torchrun_launcher_restarts_a_killed_worker_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    calm = runs.undisturbed(NUM_RANKS, "train.steps=60")
    config = torchrun_config(tmp_path, "restarted", "train.steps=60")
    launcher = start_launcher(config, scratch)
    wait_for_step(config, 5)
    victim = workers(launcher)[-1]
    victim.kill()

    assert launcher.wait(200) == EXIT_DONE, launcher.output
    assert [event["count"] for event in runs.events(config, "restart")] == [1]
    (recovered,) = runs.events(config, "recovered")
    assert recovered["source"] == "durable" and recovered["step"] >= 3
    runs.assert_same_training(config, calm)
    assert list(scratch.glob("windlass-*")) == [], "temporary folders are left"


def test_sigterm_to_the_launcher_saves_and_exits_75_and_leaves_no_process(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = torchrun_config(tmp_path, "stopped", "train.steps=4000", "checkpoint.persist_every=100000")
    launcher = start_launcher(config, scratch)
    wait_for_step(config, 5)
    ranks = workers(launcher)
    launcher.send_signal(signal.SIGTERM)

    assert launcher.wait() == EXIT_STOPPED, launcher.output
    (stopped,) = runs.events(config, "preempted")
    assert [event["step"] for event in runs.events(config, "persisted")] == [stopped["step"]]
    assert len(ranks) == NUM_RANKS and not any(rank.is_running() for rank in ranks)
    assert list(scratch.glob("windlass-*")) == []


def test_sigterm_while_workers_start_is_heard_too(tmp_path: Path) -> None:
    """The signal waits until they can listen."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = torchrun_config(tmp_path, "early", "train.steps=4000")
    launcher = start_launcher(config, scratch)
    while len(workers(launcher)) < NUM_RANKS:
        assert launcher.returncode is None
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait() == EXIT_STOPPED, launcher.output
    assert not (Path(config.run_dir) / "metrics.jsonl").exists() or len(runs.losses(config)) == 1


def test_workers_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = torchrun_config(tmp_path, "orphaned", "train.steps=4000", "checkpoint.persist_every=100000")
    launcher = start_launcher(config, scratch)
    wait_for_step(config, 5)
    ranks = workers(launcher)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    (ended,) = runs.events(config, "restarting")
    assert [event["step"] for event in runs.events(config, "persisted")] == [ended["step"]]
