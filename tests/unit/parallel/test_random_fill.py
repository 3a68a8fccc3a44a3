"""Every cut of a tensor is filled with just its part of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.parallel import random
from windlass.parallel.fragment import Fragment
from windlass.parallel.random import fill_normal_


def filled(
    global_shape: tuple[int, ...],
    slices: tuple[slice, ...] | None = None,
    *,
    name: str = "w",
    seed: int = 0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    slices = slices or tuple(slice(0, size) for size in global_shape)
    offset, shape = tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices)
    local = torch.full(shape, torch.nan, dtype=dtype)
    fill_normal_(local, Fragment(name, global_shape, offset, shape, dtype), seed=seed, std=std)
    return local


@st.composite
def cuts(draw: Any) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    global_shape = tuple(draw(st.lists(st.integers(1, 23), min_size=1, max_size=3)))
    slices = []
    for size in global_shape:
        low, high = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        slices.append(slice(low, high))
    return global_shape, tuple(slices)


@given(cuts(), st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_any_cut_equals_its_slice_of_the_whole(cut: tuple, chunk_elements: int) -> None:
    global_shape, slices = cut
    whole = filled(global_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "CHUNK_ELEMENTS", chunk_elements)
        part = filled(global_shape, slices)
    assert torch.equal(part, whole[slices])
    assert not whole.isnan().any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_together_hold_the_whole(dim: int, num_ranks: int) -> None:
    shape = (1001, 130)
    whole = filled(shape)
    chunk = -(-shape[dim] // num_ranks)
    parts = []
    for rank in range(num_ranks):
        low = min(shape[dim], chunk * rank)
        kept = slice(low, min(shape[dim], low + chunk))
        parts.append(filled(shape, (kept, slice(0, 130)) if dim == 0 else (slice(0, 1001), kept)))
    assert torch.equal(torch.cat(parts, dim), whole)


def test_a_transposed_view_is_filled_like_a_plain_one() -> None:
    local = torch.empty(7, 5).t()
    fill_normal_(local, Fragment("w", (5, 7), (0, 0), (5, 7), torch.float32), seed=0, std=1.0)
    assert torch.equal(local, filled((5, 7)))


def test_the_numbers_are_normal() -> None:
    values = filled((1000, 997), std=3.0).double()
    count = values.numel()
    assert abs(values.mean()) < 5 * 3 / count**0.5
    assert values.std().item() == pytest.approx(3.0, rel=5e-3)
    standard = values / 3
    assert (standard**3).mean().item() == pytest.approx(0.0, abs=0.02)
    assert (standard**4).mean().item() == pytest.approx(3.0, abs=0.05)
    assert standard.abs().max() < 5.8
    assert ((standard.abs() < 1).double().mean()).item() == pytest.approx(0.6827, abs=3e-3)


def test_neighbours_are_independent() -> None:
    values = filled((400_000,)).double()
    for lag in (1, 2, 3, 4, 8):
        assert abs((values[lag:] * values[:-lag]).mean()) < 0.01, lag


def test_seeds_and_names_give_other_numbers() -> None:
    first = filled((1000,))
    assert torch.equal(first, filled((1000,)))
    for other in (filled((1000,), seed=1), filled((1000,), name="v")):
        assert abs((first * other).mean()) < 0.2
        assert not torch.equal(first, other)


def test_a_seed_and_a_name_do_not_run_together() -> None:
    assert not torch.equal(filled((8,), seed=1, name="1/w"), filled((8,), seed=11, name="w"))


def test_nothing_is_drawn_from_the_global_generators() -> None:
    state = torch.get_rng_state()
    filled((10, 10))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_without_a_part_draws_nothing() -> None:
    assert filled((3, 4), (slice(3, 3), slice(0, 4))).shape == (0, 4)
