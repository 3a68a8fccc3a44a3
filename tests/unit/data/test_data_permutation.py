from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.data.permutation import permute


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65_537])
def test_every_position_once(size: int) -> None:
    for seed in (0, 1, 2**63):
        values = permute(np.arange(size), size, seed)
        assert (np.sort(values) == np.arange(size)).all()


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 2**45),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 2**40),
    data=st.data(),
)
def test_does_not_depend_on_what_is_asked_together(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30, unique=True)))
    together = permute(positions, size, seed, epoch)
    assert together.dtype == np.int64
    assert ((together >= 0) & (together < size)).all()
    assert len(set(together.tolist())) == len(positions)
    single = [int(permute(np.array([p]), size, seed, np.array([epoch]))[0]) for p in positions]
    assert together.tolist() == single


def test_each_epoch_and_seed_has_its_own() -> None:
    size = 10_000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 10, "two random permutations share about one place"
    both = permute(np.tile(np.arange(size), 2), size, 0, np.repeat([0, 1], size))
    assert (both == np.concatenate(orders[:2])).all()


def test_looks_random() -> None:
    size = 3000
    orders = np.stack([permute(np.arange(size), size, 7, epoch) for epoch in range(200)])
    # Where a position lands, over epochs and in thirds of the range: chi-square with 2 degrees of freedom.
    for position in (0, 1, 1499, 2999):
        counts = np.bincount(orders[:, position] // 1000, minlength=3)
        assert ((counts - 200 / 3) ** 2 / (200 / 3)).sum() < 18.4, "p = 0.0001"
    steps = np.abs(np.diff(orders, axis=1))
    assert steps.mean() == pytest.approx(size / 3, rel=0.01), "neighbours stay no neighbours"
    correlation = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 0.01


def test_refuses_positions_outside() -> None:
    with pytest.raises(AssertionError):
        permute(np.array([5]), 5, 0)
