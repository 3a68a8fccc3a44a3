"""Steps that are skipped in a row: when they end a run, and what is kept of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from support import nodes, runs
from support.ranks import run_ranks

from windlass.checkpoint.durable.manifest import Manifest, committed_steps, step_folder
from windlass.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError
from windlass.launch.worker import run_worker
from windlass.outcome import OUTCOME_FILE, reported_outcome
from windlass.parallel import fsdp2
from windlass.parallel.fragment import local_tensor
from windlass.train.config import TrainConfig

ALL = range(1, 1000)


def train(config: runs.Config, broken: Collection[int], stop_at: int | None = None, begins_at: int = 0) -> int:
    """A rank; the last one's gradients are not finite in the steps `broken`. It is asked to stop in `stop_at`."""
    clip, step = fsdp2.clip_grad_norm_, begins_at

    def breaking(parameters: Any, *others: Any) -> torch.Tensor:
        nonlocal step
        parameters, step = list(parameters), step + 1
        if step in broken and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            local_tensor(parameters[0].grad).view(-1)[0] = torch.nan
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return clip(parameters, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "clip_grad_norm_", breaking)
        return run_worker(config)


def train_with_a_launcher(config: runs.Config, broken: Collection[int]) -> tuple[int, int | None]:
    """And what it leaves for the launcher."""
    os.environ[OUTCOME_FILE] = f"{config.run_dir}.outcome"
    code = train(config, broken)
    outcome = reported_outcome()
    return code, None if outcome is None else outcome.exit_code


def configured(tmp_path: Path, name: str, *overrides: str) -> runs.Config:
    usual = ("train.max_skipped_steps=3", "checkpoint.persist_every=2", "checkpoint.keep=1")
    return runs.run_config(tmp_path, name, *usual, *overrides)


def saved(config: runs.Config) -> list[int]:
    return committed_steps(Path(config.run_dir) / "checkpoints")


def message(config: runs.Config) -> str:
    return (Path(config.run_dir) / "logs" / "rank0.log").read_text()


@pytest.mark.slow
def test_so_many_in_a_row_end_the_run_on_all_ranks_and_for_good(tmp_path: Path) -> None:
    config = configured(tmp_path, "diverging")
    assert run_ranks(train_with_a_launcher, 2, config, range(6, 1000)) == [(EXIT_USER_ERROR, EXIT_USER_ERROR)] * 2
    assert [event["step"] for event in runs.events(config, "skipped_step")] == [6, 7, 8]
    assert [event["step"] for event in runs.events(config, "diverged")] == [8]
    assert not runs.events(config, "done")
    assert saved(config) == [4], "that of step 6 would have pushed it out"
    folder = step_folder(Path(config.run_dir) / "checkpoints", 4)
    said = message(config)
    assert "train.max_skipped_steps=3: steps 6 to 8 were skipped" in said
    assert said.endswith("; or set train.max_skipped_steps=6 if such steps are to be expected.\n")
    assert f"another run_dir, resume={folder} and a lower optim.lr, such as optim.lr=0.0002" in said
    # What the message advises.
    other = configured(tmp_path, "other", f"resume={folder}", "optim.lr=0.0002", "train.steps=6")
    assert run_ranks(train, 1, other, ()) == [EXIT_DONE]
    assert [record["step"] for record in runs.metrics(other) if "train/loss" in record] == [5, 6]


@pytest.mark.full
def test_fewer_end_nothing_and_the_checkpoint_comes_after_them(tmp_path: Path) -> None:
    config = configured(tmp_path, "recovering", "train.steps=5", "checkpoint.keep=0")
    assert run_ranks(train, 1, config, (1, 2, 4)) == [EXIT_DONE]
    assert saved(config) == [3, 5]


@pytest.mark.slow
def test_a_stop_among_them_deletes_nothing_and_the_next_attempt_counts_on(tmp_path: Path) -> None:
    config = configured(tmp_path, "stopped")
    assert run_ranks(train, 1, config, range(4, 1000), 4) == [EXIT_STOPPED]
    assert saved(config) == [2, 5], "the newest alone would be of weights that may be broken"
    assert run_ranks(train, 1, config, ALL) == [EXIT_USER_ERROR]
    assert [event["step"] for event in runs.events(config, "skipped_step")] == [4, 5, 6]
    assert saved(config) == [2, 5]
    assert f"resume={step_folder(Path(config.run_dir) / 'checkpoints', 2)} and" in message(config)


@pytest.mark.full
def test_a_run_whose_steps_were_all_skipped_is_not_done(tmp_path: Path) -> None:
    config = configured(tmp_path, "nothing", "train.steps=2")
    assert run_ranks(train, 1, config, ALL) == [EXIT_USER_ERROR]
    assert not runs.events(config, "done") and saved(config) == []
    assert "steps 1 to 2 were skipped" in message(config)
    assert "there is no checkpoint from before them. Fix: begin again in another run_dir" in message(config)
    assert message(config).endswith("such as optim.lr=0.0002.\n"), "more skipped steps would not help"


@pytest.mark.full
def test_a_run_may_go_on_for_ever(tmp_path: Path) -> None:
    config = configured(tmp_path, "for_ever", "train.max_skipped_steps=null", "train.steps=9")
    assert run_ranks(train, 1, config, range(3, 1000)) == [EXIT_DONE]
    assert saved(config) == [2, 9], "what is done is saved, and nothing deleted for it"


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lazy", "erasure"])
def test_agents_keep_what_was_before(kind: str, tmp_path: Path) -> None:
    with nodes.shared_memory() as shm:
        overrides = [f"checkpoint={kind}", f"checkpoint.shm_dir={shm}"]
        if kind == "erasure":
            overrides += ["checkpoint.failure_domain=rank", "checkpoint.num_parity_shards=1"]
            overrides += ["checkpoint.snapshot_every=1"]
        num_ranks = 1 + (kind == "erasure")
        config = configured(tmp_path, kind, *overrides)
        assert run_ranks(train, num_ranks, config, range(4, 1000), 4) == [EXIT_STOPPED] * num_ranks
        assert saved(config) == [2, 5]
        state = Manifest.read(step_folder(Path(config.run_dir) / "checkpoints", 5)).objects["train"]
        assert state["skipped_in_a_row"] == 2
        nodes.wait_until(lambda: not list(shm.iterdir()), "the agent to leave", 10.0)


@pytest.mark.parametrize("value", [0, -3])
def test_a_number_below_one_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_skipped_steps={value}: must be at least 1\. Fix: set .*=10, or null"):
        TrainConfig(max_skipped_steps=value)
