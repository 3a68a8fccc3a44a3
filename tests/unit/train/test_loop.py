"""What the loop makes of a step, in whole runs: of unequal ranks, of gradients that are not finite, beside a copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import nodes, runs
from support.losses import count_tokens
from support.ranks import run_ranks

from windlass.checkpoint.manager import Checkpointer
from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.data.loader import Loader
from windlass.errors import EXIT_DONE
from windlass.launch.worker import run_worker
from windlass.parallel import fsdp2
from windlass.parallel.fragment import local_tensor

NUM_STEPS, BROKEN_STEP = 4, 2


def figures(config: runs.Config, key: str) -> list[float]:
    return [record[key] for record in runs.metrics(config) if "train/loss" in record]


def train_on_ragged_rows(config: runs.Config) -> tuple[int, list[int]]:
    """A rank of which about every other row has few labels that count; its exit code, and how many count in each batch.

    What counts in a row depends on the row alone, and so not on the number of ranks.
    """
    following, counts = Loader.__next__, list[int]()

    def ragged(loader: Loader) -> Batch:
        batch = following(loader)
        has_few = batch.input_ids.sum(1) % 2 == 0
        batch.labels[has_few, 5:] = IGNORE_INDEX
        counts.append(count_tokens([batch]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__next__", ragged)
        return run_worker(config), counts


@pytest.mark.slow
def test_ranks_with_unequal_tokens_train_as_one_does(tmp_path: Path) -> None:
    """The norm of the gradients is of all ranks' sum over all ranks' tokens: a mean of means is not that."""
    configs: dict[int, runs.Config] = {}
    counts: dict[int, list[list[int]]] = {}
    for num_ranks in (1, 2):
        overrides = (f"train.batch_size={4 // num_ranks}", "train.grad_accum_steps=2", "checkpoint=none")
        configs[num_ranks] = runs.run_config(tmp_path, f"on{num_ranks}", f"train.steps={NUM_STEPS}", *overrides)
        of_ranks = run_ranks(train_on_ragged_rows, num_ranks, configs[num_ranks])
        assert [exit_code for exit_code, _ in of_ranks] == [EXIT_DONE] * num_ranks
        counts[num_ranks] = [of_batches for _, of_batches in of_ranks]
    of_batches = list(zip(*counts[2], strict=True))
    assert [sum(of_ranks) for of_ranks in of_batches] == counts[1][0], "the same rows"
    assert sum(max(of_ranks) > 2 * min(of_ranks) for of_ranks in of_batches) >= 2, of_batches
    for key in ("train/loss", "optim/grad_norm"):
        alone, together = (figures(configs[num_ranks], key) for num_ranks in (1, 2))
        assert len(alone) == NUM_STEPS
        assert together == pytest.approx(alone, rel=1e-4), key


def train_with_a_broken_gradient(config: runs.Config, bad: float) -> int:
    """A rank; in one step one number of the last rank's gradients is `bad`."""
    clip, num_steps = fsdp2.clip_grad_norm_, 0

    def broken(parameters: Any, *others: Any) -> torch.Tensor:
        nonlocal num_steps
        parameters, num_steps = list(parameters), num_steps + 1
        if num_steps == BROKEN_STEP and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            local_tensor(parameters[0].grad).view(-1)[0] = bad
        return clip(parameters, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "clip_grad_norm_", broken)
        return run_worker(config)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_with_one_gradient_that_is_not_finite_is_skipped_by_all(bad: float, tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "broken", f"train.steps={NUM_STEPS}", "checkpoint=none")
    assert run_ranks(train_with_a_broken_gradient, 2, config, bad) == [EXIT_DONE] * 2
    assert [event["step"] for event in runs.events(config, "skipped_step")] == [BROKEN_STEP]
    assert all(loss is not None and 0 < loss < 100 for loss in figures(config, "train/loss"))
    assert [norm is not None for norm in figures(config, "optim/grad_norm")] == [
        step != BROKEN_STEP for step in range(1, NUM_STEPS + 1)
    ]


def train_and_note(config: runs.Config) -> tuple[int, list[str]]:
    """A rank, and in what order it took snapshots, waited for their copies and changed weights."""
    noted: list[str] = []

    def noting(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def noted_action(*arguments: Any, **more: Any) -> Any:
            noted.append(name)
            return action(*arguments, **more)

        return noted_action

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Checkpointer, "snapshot"), (Checkpointer, "wait_staged"), (torch.optim.AdamW, "step")):
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        return run_worker(config), noted


@pytest.mark.slow
def test_weights_wait_for_the_copy_of_a_snapshot(tmp_path: Path) -> None:
    with nodes.shared_memory() as shm:
        lazy = ("checkpoint=lazy", "checkpoint.persist_every=2", f"checkpoint.shm_dir={shm}")
        config = runs.run_config(tmp_path, "lazy", f"train.steps={2 * NUM_STEPS}", *lazy)
        ((exit_code, noted),) = run_ranks(train_and_note, 1, config)
        nodes.wait_until(lambda: not list(shm.iterdir()), "the agent to leave", 10.0)
    assert exit_code == EXIT_DONE
    places = [place for place, name in enumerate(noted) if name == "snapshot"]
    assert len(places) == NUM_STEPS - 1, "and the last step is saved"
    for place in places:
        step = noted.index("step", place)
        assert "wait_staged" in noted[place:step], noted
