"""Whole runs of four ranks over gloo, one of which is slow: it is named, soon, and no other is."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from support import runs
from support.ranks import run_ranks

from windlass.data.batch import Batch
from windlass.data.loader import Loader
from windlass.errors import EXIT_DONE
from windlass.launch.worker import run_worker
from windlass.models.llama import Block

NUM_RANKS = 4
LATE_S = 0.2
STEPS, LATE_STEPS = 24, 12


class Delay:
    """Makes a rank slow, from its first step on, in one place of each of so many steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def sleep(self) -> None:
        if self.left > 0:
            self.left -= 1
            time.sleep(LATE_S)

    def in_data(self) -> None:
        following = Loader.__next__

        def late(loader: Loader) -> Batch:
            self.sleep()
            return following(loader)

        Loader.__next__ = late  # type: ignore[method-assign]

    def in_forward(self) -> None:
        """In the first layer alone, and not in evaluations."""

        def hook(module: torch.nn.Module, *_: object) -> None:
            if isinstance(module, Block) and module.training and module is firsts.setdefault("layer", module):
                self.sleep()

        firsts: dict[str, torch.nn.Module] = {}
        torch.nn.modules.module.register_module_forward_pre_hook(hook)


def train_late(config: runs.Config, late_rank: int, place: str) -> int:
    if int(os.environ["RANK"]) == late_rank:
        delay = Delay(LATE_STEPS)
        delay.in_data() if place == "data" else delay.in_forward()
    return run_worker(config)


@pytest.mark.parametrize(
    ("overrides", "late_rank", "place"),
    [
        (("parallel=zero3",), 2, "forward"),
        pytest.param(("parallel=zero3",), 0, "data", marks=pytest.mark.full),
        pytest.param(("parallel=ddp",), 0, "forward", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_is_200_ms_late_is_named_within_10_steps(
    tmp_path: Path, overrides: tuple[str, ...], late_rank: int, place: str
) -> None:
    config = runs.run_config(tmp_path, "slow", f"train.steps={STEPS}", "checkpoint=none", *overrides)
    assert run_ranks(train_late, NUM_RANKS, config, late_rank, place, local_world_size=2) == [EXIT_DONE] * NUM_RANKS

    (named,) = runs.events(config, "straggler")
    assert (named["rank"], named["node"]) == (late_rank, late_rank // 2)
    assert named["step"] <= 10
    assert named["seconds"] >= 0.75 * LATE_S
    (over,) = runs.events(config, "straggler_over")
    assert over["rank"] == late_rank and over["step"] > LATE_STEPS


def train_with_noise(config: runs.Config) -> int:
    """Every batch takes half a second, and up to 50 ms longer at random: more than this machine's other work adds."""
    following = Loader.__next__

    def noisy(loader: Loader) -> Batch:
        time.sleep(0.5 + 0.05 * random.random())
        return following(loader)

    Loader.__next__ = noisy  # type: ignore[method-assign]
    return run_worker(config)


@pytest.mark.full
def test_nobody_is_named_where_all_are_as_fast(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "noisy", "train.steps=20", "checkpoint=none", "parallel=zero3")
    assert run_ranks(train_with_noise, NUM_RANKS, config) == [EXIT_DONE] * NUM_RANKS
    assert runs.events(config, "straggler") == []
