"""The `windlass` command: exit codes, and what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import windlass
from windlass.checkpoint.durable.chunk_file import chunk_name
from windlass.checkpoint.durable.manifest import Manifest
from windlass.checkpoint.manager import Checkpointer
from windlass.cli import main
from windlass.parallel.config import ParallelConfig, Sharding

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    mesh = ParallelConfig(name=Sharding.none).build(torch.device("cpu"))
    model = torch.nn.Linear(3, 2)
    checkpointer = Checkpointer({"model": model}, tmp_path / "run" / "checkpoints", mesh)
    checkpointer.save(1)
    torch.nn.init.zeros_(model.bias)
    checkpointer.save(2)
    return tmp_path / "run"


def chunks_of(checkpoint: Path) -> set[Path]:
    return {checkpoint.parent / chunk_name(sha256) for sha256 in Manifest.read(checkpoint).chunks}


def damage(run_dir: Path) -> None:
    (path,) = chunks_of(run_dir / "checkpoints" / "step-00000002") - chunks_of(
        run_dir / "checkpoints" / "step-00000001"
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["ckpt"], ["ckpt", "prune"], ["report"], ["--nothing"]])
def test_a_command_that_is_none_is_the_users_mistake(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: windlass" in capsys.readouterr().err


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"windlass {windlass.__version__}\n"


def test_help_names_every_command_and_exit_code(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("train", "report", "doctor", "ckpt", "data", "75 stopped on request", "2 your input is at fault"):
        assert word in re.sub(r"\s+", " ", text)


def test_help_imports_nothing_slow() -> None:
    """Not torch, pyarrow or Hydra: a command line should answer at once."""
    code = (
        "import sys; from windlass.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'pyarrow', 'hydra', 'omegaconf', 'numpy', 'rich'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_typo_ends_with_2_one_line_and_no_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "windlass.cli", "train", "train.step=5"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "windlass: error: train.step=5: is no key of this configuration. Fix: did you mean train.steps? "
        "`windlass train --cfg job` prints every key.\n"
    )


@pytest.mark.slow
def test_a_typo_is_found_without_torch() -> None:
    code = (
        "import sys; from windlass.cli import main; code = main(['train', 'train.step=5'])\n"
        "sys.exit(0 if code == 2 and 'torch' not in sys.modules else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_cfg_job_prints_the_configuration(capsys: Captured) -> None:
    assert main(["train", "--cfg", "job", "train.steps=41", "model=llama_60m"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 41" in printed
    assert "name: llama_60m" in printed


@pytest.mark.slow
def test_train_help_lists_groups_keys_and_examples(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", "--help"])
    assert not raised.value.code
    text = capsys.readouterr().out
    for line in ("parallel: ddp, hsdp, none, zero1, zero2, zero3", "grad_accum_steps: 1", "windlass train -m"):
        assert line in text


def test_ckpt_list(run_dir: Path, capsys: Captured) -> None:
    assert main(["ckpt", "list", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "size", "shared", "ranks", "written", "path"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]


def test_ckpt_list_json(run_dir: Path, capsys: Captured) -> None:
    assert main(["ckpt", "list", "--json", str(run_dir)]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [1, 2]


def test_ckpt_verify_of_sound_ones(run_dir: Path, capsys: Captured) -> None:
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["sound", "sound"]


def test_ckpt_verify_of_a_damaged_one(run_dir: Path, capsys: Captured) -> None:
    damage(run_dir)
    assert main(["ckpt", "verify", str(run_dir)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["ckpt", "verify", "--json", str(run_dir)]) == 1
    assert [row["is_sound"] for row in json.loads(capsys.readouterr().out)] == [True, False]
    assert main(["ckpt", "verify", str(run_dir / "checkpoints" / "step-00000001")]) == 0


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_checkpoint_whose_name_gives_orders_to_a_terminal(action: str, run_dir: Path, capsys: Captured) -> None:
    named = run_dir.with_name("run\x1b]0;owned\x07\rsound")
    run_dir.rename(named)
    assert main(["ckpt", action, str(named)]) == 0
    printed = capsys.readouterr().out
    assert r"run\x1b]0;owned\x07\rsound" in printed
    assert not {"\x1b", "\x07", "\r"} & set(printed)


@pytest.mark.parametrize("action", ["list", "verify"])
def test_ckpt_of_a_missing_path(action: str, tmp_path: Path, capsys: Captured) -> None:
    assert main(["ckpt", action, str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("windlass: error: ")
    assert str(tmp_path / "nothing") in captured.err


def test_report_of_a_missing_folder(tmp_path: Path, capsys: Captured) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("windlass: error: ")
    assert str(tmp_path / "nothing") in error
    assert error.count("\n") == 1


def test_an_interrupt_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("windlass.launch.main.train", interrupt)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "windlass: interrupted\n"


def test_the_exit_code_of_training_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("windlass.launch.main.train", lambda arguments: given.append(arguments) or 75)
    assert main(["train", "train.steps=3"]) == 75
    assert given == [["train.steps=3"]]


def test_other_failures_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("windlass.launch.main.train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


@pytest.mark.parametrize("module", ["windlass.cli", "windlass.train"])
def test_the_working_directory_is_no_place_for_modules(module: str, tmp_path: Path) -> None:
    """What lies there may be the user's text, or a stranger's. What PYTHONPATH names stays."""
    here, named = tmp_path / "here", tmp_path / "named"
    for folder, word in ((here, "found in the working directory"), (named, "found by PYTHONPATH")):
        folder.mkdir()
        for name in ("hydra", "argparse", "threading"):
            (folder / f"{name}.py").write_text(f"import os; os.write(1, b'{word}'); os._exit(0)")
    for name in ("argparse", "threading"):
        (named / f"{name}.py").unlink()
    result = subprocess.run(
        [sys.executable, "-m", module, "train", "train.steps=1"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(named)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "found by PYTHONPATH", result.stderr


def test_a_working_directory_that_is_gone_is_one_message(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m windlass.cli train"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    message = f"windlass: error: working directory={gone}: was removed. Fix: cd to another one.\n"
    assert (result.returncode, result.stderr) == (2, message)
