"""What a worker leaves for its launcher, and how it refuses what it cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from windlass.conf.compose import compose
from windlass.conf.store import save_config
from windlass.errors import ConfigError
from windlass.launch import worker
from windlass.launch.config import LaunchConfig, LaunchKind
from windlass.outcome import OUTCOME_FILE, STOP_FILE, Outcome, report_outcome, reported_outcome
from windlass.train import __main__ as train_main
from windlass.train.build import choose_device, require_compiler
from windlass.train.config import Device

Captured = pytest.CaptureFixture[str]


def test_without_a_launcher_the_code_is_the_workers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTCOME_FILE, raising=False)
    assert report_outcome(75) == 75
    assert reported_outcome() is None


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_launcher_finds_the_code_and_the_worker_exits_with_0(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    assert reported_outcome() is None
    assert report_outcome(code) == 0
    assert reported_outcome() == Outcome(code)
    assert [path.name for path in tmp_path.iterdir()] == ["outcome"]


def test_a_worker_is_heard_by_its_first_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    monkeypatch.setenv("RANK", "1")
    report_outcome(2, "what rank 1 met")
    report_outcome(2)  # as every worker does at its end
    assert reported_outcome() == Outcome(2, "what rank 1 met", rank=1)


def test_a_worker_that_starts_after_a_request_to_stop_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(worker.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "no such file")])
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    assert worker.main() == 0
    assert reported_outcome() == Outcome(75, has_begun=False)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_without_a_compiler_there_is_no_compiling(
    device: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"train.compile=True: needs a compiler.*name one in {variable}"):
        require_compiler(torch.device(device))
    monkeypatch.setenv(variable, sys.executable)
    require_compiler(torch.device(device))


@pytest.mark.parametrize(("wanted", "is_refused"), [("cuda", True), ("auto", False)])
def test_two_ranks_do_not_share_one_gpu(wanted: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(ConfigError, match="2 ranks need a GPU each, and torch finds 1 here"):
            choose_device(Device(wanted))
    else:
        assert choose_device(Device(wanted)).type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert choose_device(Device(wanted)).type == "cuda"


@pytest.mark.slow
def test_bad_data_is_refused_with_2_and_a_message(tmp_path: Path, capsys: Captured) -> None:
    config = compose(["data=text", f"data.path={tmp_path}/nothing", f"run_dir={tmp_path}/run"])
    assert worker.run_worker(config) == 2
    error = capsys.readouterr().err
    assert error.startswith("windlass: error: data.path=")
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_missing_device_is_refused_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = compose(["train.device=cuda", f"run_dir={tmp_path}/run"])
    assert worker.run_worker(config) == 2
    assert "train.device=cuda: 1 ranks need a GPU each, and torch finds 0 here" in capsys.readouterr().err


def test_other_failures_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(worker, "prepared_folder", fail)
    with pytest.raises(ZeroDivisionError):
        worker.run_worker(compose([f"run_dir={tmp_path}/run"]))


@pytest.mark.slow
def test_a_worker_process_that_refuses_is_not_started_again(tmp_path: Path) -> None:
    """It exits with 0, which torch's agent takes for done, and leaves 2 for windlass's launcher."""
    config = compose(["data=text", f"data.path={tmp_path}/nothing", f"run_dir={tmp_path}/run"])
    save_config(config, tmp_path / "config.yaml")
    result = subprocess.run(
        [sys.executable, "-m", "windlass.launch.worker", str(tmp_path / "config.yaml")],
        env={**os.environ, OUTCOME_FILE: str(tmp_path / "outcome")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("windlass: error: data.path=")
    assert result.stderr.count("data.path=") == 1
    assert json.loads((tmp_path / "outcome").read_text())["exit_code"] == 2


def test_a_worker_that_is_started_after_a_refusal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(worker.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "no such file")])
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    report_outcome(2)
    assert worker.main() == 0


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_under_torchrun_only_rank_0_tells_of_a_typo(
    rank: str, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["python -m windlass.train", "train.step=5"])
    assert train_main.main() == 2
    assert ("did you mean train.steps?" in capsys.readouterr().err) is says


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc_per_node": 0}, r"launch\.nproc_per_node=0: must be at least 1"),
        ({"nproc_per_node": 2}, r"launch=local trains on one rank, in this process. Fix: choose launch=torchrun"),
        ({"max_restarts": -1}, r"launch\.max_restarts=-1: must not be negative"),
    ],
)
def test_launch_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchConfig(**settings)
    assert LaunchConfig(name=LaunchKind.torchrun, nproc_per_node=2).nproc_per_node == 2
