"""Each way to exit once, by the command that is installed, as a user starts it: 0, 1, 2 and 75."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import commands, runs
from support.launched import start_launcher, wait_for_step, workers

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR

ENDLESS = ("train.steps=100000", "checkpoint.persist_every=100000")
TWO_WORKERS = ("launch=torchrun", "launch.nproc_per_node=2")


def start(config: runs.Config, tmp_path: Path) -> commands.Command:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return start_launcher(config, scratch, is_exec=True)


@pytest.mark.parametrize(
    "launch", [pytest.param((), id="local"), pytest.param(TWO_WORKERS, id="torchrun", marks=pytest.mark.full)]
)
def test_done(tmp_path: Path, launch: tuple[str, ...]) -> None:
    """A report is drawn, unless it is not wanted."""
    config = runs.run_config(tmp_path, "done", f"metrics.report={not launch}", *launch)
    command = start(config, tmp_path)
    assert command.wait() == EXIT_DONE, command.output
    runs.assert_same_training(config, runs.undisturbed(2 if launch else 1))
    report = Path(config.run_dir) / "report.html"
    said = f"report  windlass report {config.run_dir}" if launch else f"report  {report}"
    assert said in command.output and report.exists() != bool(launch)


def test_refused(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "refused", "data.path=/nowhere")
    command = start(config, tmp_path)
    assert command.wait() == EXIT_USER_ERROR
    assert "windlass: error: data.path=/nowhere" in command.output and "Traceback" not in command.output


def test_stopped_after_a_checkpoint(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "stopped", *ENDLESS)
    command = start(config, tmp_path)
    wait_for_step(config, 3)
    command.send_signal(signal.SIGTERM)
    assert command.wait() == EXIT_STOPPED, command.output
    (stopped,) = runs.events(config, "preempted")
    assert stopped["step"] >= 3 and runs.is_committed(config, stopped["step"])


def test_a_worker_dies_too_often(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "dying", *ENDLESS, *TWO_WORKERS, "launch.max_restarts=0")
    command = start(config, tmp_path)
    wait_for_step(config, 3)
    workers(command)[0].kill()
    assert command.wait() == EXIT_FAILURE
    assert "died (SIGKILL) and launch.max_restarts=0 is used up" in command.output
    assert "Traceback" not in command.output
