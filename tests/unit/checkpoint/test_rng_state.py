from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from support.ranks import run_ranks
from torch import nn

from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.rng import capture_rng, restore_rng
from windlass.parallel.config import ParallelConfig, Sharding

CPU = torch.device("cpu")


def draw() -> tuple:
    """Of each generator; `gauss` and `standard_normal` hold a second number back."""
    return (
        torch.randn(5).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
    )


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def test_all_generators_go_on_where_they_were() -> None:
    draw()
    states = capture_rng(CPU)
    expected = draw()
    seed(1)
    assert draw() != expected
    restore_rng(states, CPU)
    assert draw() == expected


def test_states_are_tensors_of_bytes() -> None:
    for name, state in capture_rng(CPU).items():
        assert state.dtype == torch.uint8, name
        assert state.ndim == 1, name


def test_capturing_draws_nothing() -> None:
    before = capture_rng(CPU)
    assert all(torch.equal(before[name], state) for name, state in capture_rng(CPU).items())


def draw_on_this_rank(directory: Path) -> tuple[tuple, tuple]:
    """What this rank draws after a checkpoint, and after that is restored."""
    mesh = ParallelConfig(name=Sharding.ddp).build(CPU)
    seed(mesh.rank)
    checkpointer = Checkpointer({"model": nn.Linear(2, 2)}, directory, mesh)
    checkpointer.save(1)
    expected = draw()
    seed(7)
    checkpointer.restore_latest()
    found = draw()
    mesh.stop()
    return expected, found


def test_each_rank_goes_on_with_its_own_generators(tmp_path: Path) -> None:
    (first, first_again), (second, second_again) = run_ranks(draw_on_this_rank, 2, tmp_path)
    assert first != second
    assert (first_again, second_again) == (first, second)
