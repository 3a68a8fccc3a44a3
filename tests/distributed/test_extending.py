"""The model, the objective and the optimizer of docs/extending.md, as a user adds them: from outside of windlass."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import data_overrides

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
STEPS, EVERY = 24, 4
SMALL = (
    *("model=tiny_gpt", "model.width=32", "objective=z_loss", "optim=lion", "optim.warmup_steps=2"),
    *("train.batch_size=2", "train.seq_len=32", "train.log_every=1", "train.eval_every=0", "train.eval_samples=8"),
    *("train.device=cpu", "metrics.report=false", f"checkpoint.persist_every={EVERY}", f"train.steps={STEPS}"),
)


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment in which windlass knows the page's module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_windlass.py").write_text("\n\n".join(blocks))
    return {**os.environ, "PYTHONPATH": str(tmp_path), "WINDLASS_PLUGINS": "my_windlass", "OMP_NUM_THREADS": "1"}


def command(verb: str, *overrides: str) -> list[str]:
    return [str(Path(sys.executable).with_name("windlass")), verb, *SMALL, *data_overrides(), *overrides]


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}


def kill_at(run: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """Kills the launcher, and with it its group, once the run has gone beyond `step` and has a checkpoint."""
    metrics, events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
    deadline = time.monotonic() + 240

    def is_there() -> bool:
        num_steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        return num_steps > step and '"persisted"' in events.read_text()

    while not is_there():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


@pytest.mark.parametrize(
    "overrides",
    [
        ("offload=ssd", "offload.weights=streamed", "train.grad_accum_steps=2", "data.borders=attention"),
        pytest.param(
            ("launch=torchrun", "launch.nproc_per_node=2", "parallel=zero3", "offload=ssd", "checkpoint=lazy"),
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("launch=torchrun", "launch.nproc_per_node=2", "parallel=zero2", "train.activation_checkpoint=full"),
            marks=pytest.mark.full,
        ),
    ],
    ids=["streamed", "zero3", "zero2"],
)
def test_they_train_and_go_on_after_a_kill_with_the_same_losses(
    overrides: tuple[str, ...], plugin: dict[str, str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("train", *overrides, f"run_dir={whole}"), env=plugin, check=True, capture_output=True)
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1)) and all(map(math.isfinite, expected.values()))
    assert expected[STEPS] < expected[1] - 0.3
    again = command("train", *overrides, f"run_dir={killed}")
    with subprocess.Popen(again, env=plugin, start_new_session=True, stdout=subprocess.DEVNULL) as run:
        kill_at(run, killed, EVERY + 2)
    subprocess.run(again, env=plugin, check=True, capture_output=True)
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    (recovered,) = (event["step"] for event in events if event["kind"] == "recovered")
    assert recovered >= EVERY and "skipped_step" not in {event["kind"] for event in events}
    assert losses(killed) == expected
    evaluated = json.loads((killed / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < evaluated["val/accuracy"] < 1 and math.isfinite(evaluated["val/loss"])


def test_what_they_cannot_do_is_refused(plugin: dict[str, str], tmp_path: Path) -> None:
    refused = ("train.activation_checkpoint=fraction", "train.activation_fraction=0.5", f"run_dir={tmp_path / 'run'}")
    ended = subprocess.run(command("train", *refused), env=plugin, check=False, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "train.activation_checkpoint=fraction: cannot be had with TinyGPT" in ended.stderr


def test_a_plugin_that_is_not_there_is_named(plugin: dict[str, str], tmp_path: Path) -> None:
    plugin["WINDLASS_PLUGINS"] = "my_windlas"
    ended = subprocess.run(command("train"), env=plugin, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "WINDLASS_PLUGINS=my_windlas: cannot be imported" in ended.stderr


@pytest.mark.full
def test_the_page_runs_as_printed_and_is_forecast(plugin: dict[str, str], tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for text in (block, block.replace("windlass train", "windlass plan").replace("run_dir=runs/mine", "--ranks 2")):
        subprocess.run(["bash", "-ec", text], cwd=tmp_path, env={**plugin, "PATH": path}, check=True)
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").exists()
