"""Runs that begin from a checkpoint that was imported."""

from __future__ import annotations

from pathlib import Path

import torch
from support.runs import losses, output, run, run_config

from windlass.checkpoint.durable.manifest import step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.cli import main
from windlass.conf.schema import Config


def command(*arguments: object) -> None:
    assert main(["ckpt", *map(str, arguments)]) == 0


def losses_of(config: Config) -> dict[int, float]:
    return {step: values[0] for step, values in losses(config).items()}


def test_runs_begin_from_what_was_exported_and_imported(tmp_path: Path) -> None:
    first = run_config(tmp_path, "first", "train.steps=6", "optim=adamw")
    assert run(first, num_ranks=2) == [0, 0], output(first)
    checkpoint = step_folder(Path(first.run_dir) / "checkpoints", 3)

    # A DCP folder has everything, so another run goes on as if it were the first, to the bit.
    command("export", checkpoint, "--format", "dcp", "--output", tmp_path / "dcp")
    command("import", tmp_path / "dcp", "--format", "dcp", "--output", tmp_path / "from_dcp")
    on = run_config(tmp_path, "on", "train.steps=6", "optim=adamw", f"resume={tmp_path / 'from_dcp'}")
    assert run(on, num_ranks=2) == [0, 0], output(on)
    expected = losses_of(first)
    assert losses_of(on) == {step: expected[step] for step in (4, 5, 6)}

    # A Hugging Face folder has weights alone: the first loss is theirs, and the run counts from its own step 1.
    command("export", Path(first.run_dir), "--format", "hf", "--output", tmp_path / "hf")
    command("import", tmp_path / "hf", "--format", "hf", "--output", tmp_path / "from_hf")
    anew = run_config(tmp_path, "anew", "train.steps=3", "optim=muon", f"resume={tmp_path / 'from_hf'}")
    assert run(anew, num_ranks=2) == [0, 0], output(anew)
    assert sorted(losses_of(anew)) == [1, 2, 3]
    assert losses_of(anew)[1] < losses_of(first)[1]  # the same batch, before and after training
    with_optimizer = open_checkpoint(step_folder(Path(anew.run_dir) / "checkpoints", 3))
    assert with_optimizer.manifest.objects["optimizer"]["class"] == "Muon"

    # At a later step, on another number of ranks.
    command("import", tmp_path / "hf", "--format", "hf", "--output", tmp_path / "later", "--step", 2)
    later = run_config(tmp_path, "later_run", "train.steps=4", "optim=adamw", f"resume={tmp_path / 'later'}")
    assert run(later, num_ranks=1) == [0], output(later)
    assert sorted(losses_of(later)) == [3, 4]
    weights, imported = (
        open_checkpoint(step_folder(tmp_path / name, step)) for name, step in (("first/checkpoints", 6), ("later", 2))
    )
    for name in imported.manifest.tensors:
        assert torch.equal(imported.read_whole(name), weights.read_whole(name)), name


def test_a_run_does_not_take_an_imports_folder_for_its_own(tmp_path: Path) -> None:
    first = run_config(tmp_path, "first", "train.steps=3", "optim=adamw")
    assert run(first, num_ranks=1) == [0], output(first)
    command("export", Path(first.run_dir), "--format", "hf", "--output", tmp_path / "hf")
    command("import", tmp_path / "hf", "--format", "hf", "--output", tmp_path / "own" / "checkpoints")
    own = run_config(tmp_path, "own", "train.steps=3", "optim=adamw")
    assert run(own, num_ranks=1) == [2]
    assert "choose another run_dir" in output(own)
