from __future__ import annotations

import random

import numpy as np
import torch

from windlass.checkpoint.rng import capture_rng, restore_rng

CPU = torch.device("cpu")


def draw() -> tuple:
    """Of each generator; `gauss` and `standard_normal` hold a second number back."""
    return (
        torch.randn(5).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
    )


def test_all_generators_go_on_where_they_were() -> None:
    draw()
    states = capture_rng(CPU)
    expected = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
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
