from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import windlass.text
from windlass.conf.compose import compose
from windlass.conf.dotted_keys import flatten
from windlass.conf.store import to_plain
from windlass.errors import ConfigError, RunFolderError
from windlass.train import run_folder
from windlass.train.run_folder import LOCK_FILE, RunFolder, changed_keys, refuse_another_run

HOLD = """
import sys
from pathlib import Path
from windlass.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.0)


def test_the_folder_is_made_with_one_for_logs(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "deep" / "run"):
        assert (tmp_path / "deep" / "run" / "logs").is_dir()


@pytest.mark.usefixtures("impatient")
def test_a_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=rf"is in use by process {other.pid} on .*choose another run_dir"):
            RunFolder(tmp_path)
        other.communicate("")
    with RunFolder(tmp_path):
        pass


@pytest.mark.usefixtures("impatient")
def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.kill()
        other.wait()
    with RunFolder(tmp_path):
        assert str(other.pid) not in (tmp_path / LOCK_FILE).read_text()


def test_a_lock_that_is_let_go_in_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunFolder(tmp_path)
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        first.close()

    monkeypatch.setattr(run_folder.time, "sleep", nap)
    RunFolder(tmp_path).close()
    assert len(naps) == 1


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"run_dir=.*cannot be written: Not a directory.*choose another run_dir"):
        RunFolder(tmp_path / "file" / "run")


def test_keys_are_flattened() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_changed_keys_are_those_that_differ() -> None:
    before = {"a": {"b": 1, "c": 2}, "gone": 3}
    now = {"a": {"b": 1, "c": 5}, "new": 4}
    assert changed_keys(before, now) == {"a.c": (2, 5), "gone": (3, None), "new": (None, 4)}
    assert changed_keys(now, now) == {}


def refuse(path: Path, *overrides: str) -> None:
    refuse_another_run(path, to_plain(compose()), to_plain(compose(overrides)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "train.steps=900",
        "train.batch_size=2",
        "train.grad_accum_steps=4",
        "train.eval_every=7",
        "train.activation_checkpoint=full",
        "parallel=zero1",
        "launch=torchrun",
        "checkpoint.keep=5",
        "data.prefetch=9",
        "data.num_workers=3",
        "data.cache_dir=elsewhere",
        "metrics.console=plain",
        "resume=elsewhere",
    ],
)
def test_a_run_goes_on_with_other_speed_length_and_layout(override: str, tmp_path: Path) -> None:
    refuse(tmp_path, override)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("optim.lr=0.5", "optim.lr", 0.002, 0.5),
        ("optim.betas=[0.5,0.6]", "optim.betas", [0.9, 0.95], [0.5, 0.6]),
        ("model.num_layers=9", "model.num_layers", 4, 9),
        ("train.seed=3", "train.seed", 0, 3),
        ("train.seq_len=64", "train.seq_len", 256, 64),
        ("train.dtype=bfloat16", "train.dtype", "float32", "bfloat16"),
        ("train.max_norm=null", "train.max_norm", 1.0, None),
        ("data.borders=none", "data.borders", "loss", "none"),
    ],
)
def test_a_run_that_would_compute_something_else_is_refused(
    override: str, key: str, old: object, new: object, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        refuse(tmp_path, override)
    assert (raised.value.key, raised.value.value) == (key, new)
    assert f"{tmp_path} holds a run with {key}={old}" in raised.value.rule
    assert f"resume={tmp_path}" in raised.value.fix
    assert f"set {windlass.text.override(key, old)} to go on" in raised.value.fix


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    """Root may write everywhere, so the test becomes another user for a moment."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(RunFolderError, match="cannot be written: Permission denied"):
            RunFolder(folder)
    finally:
        os.seteuid(user)
    assert list(folder.iterdir()) == []
