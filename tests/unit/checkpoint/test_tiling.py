"""Blocks tile a tensor: compared with counting how often each element is covered."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.tiling import shape_problem, tiling_problem

Block = tuple[tuple[int, ...], tuple[int, ...]]


def cut(shape: tuple[int, ...], num_cuts: int, rng: random.Random) -> list[Block]:
    """A tensor of `shape`, cut again and again along any dim of any block; some blocks are empty."""
    blocks: list[Block] = [((0,) * len(shape), shape)]
    for _ in range(num_cuts if shape else 0):
        offset, size = blocks.pop(rng.randrange(len(blocks)))
        dim = rng.randrange(len(shape))
        first = rng.randint(0, size[dim])
        blocks.append((offset, (*size[:dim], first, *size[dim + 1 :])))
        second = (*offset[:dim], offset[dim] + first, *offset[dim + 1 :])
        blocks.append((second, (*size[:dim], size[dim] - first, *size[dim + 1 :])))
    rng.shuffle(blocks)
    return blocks


def covers_once(shape: tuple[int, ...], blocks: list[Block]) -> bool:
    count = np.zeros(shape, np.int64)
    for offset, size in blocks:
        inside = all(o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offset, size, shape, strict=True))
        if not inside:
            return False
        count[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] += 1
    return bool((count == 1).all())


@settings(max_examples=150, deadline=None)
@given(shape=st.lists(st.integers(0, 6), max_size=4), seed=st.integers(), num_cuts=st.integers(0, 9), data=st.data())
def test_it_says_what_counting_says(shape: list[int], seed: int, num_cuts: int, data: st.DataObject) -> None:
    blocks = cut(tuple(shape), num_cuts, random.Random(seed))
    assert tiling_problem(tuple(shape), blocks) is None
    number = data.draw(st.integers(0, len(blocks) - 1))
    offset, size = blocks[number]
    if shape:  # one block is moved or resized, or takes the place of another
        dim, by = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(-2, 2))
        moved = (*offset[:dim], offset[dim] + by, *offset[dim + 1 :])
        resized = (*size[:dim], size[dim] + by, *size[dim + 1 :])
        blocks[number] = data.draw(st.sampled_from([(moved, size), (offset, resized), *blocks]))
    else:
        blocks = data.draw(st.sampled_from([[], blocks * 2]))
    assert (tiling_problem(tuple(shape), blocks) is None) == covers_once(tuple(shape), blocks)


@pytest.mark.parametrize(
    ("shape", "blocks", "says"),
    [
        ((4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))], "overlap"),
        ((4, 2), [((0, 0), (3, 2)), ((1, 0), (3, 2))], "overlap"),
        ((4, 2), [((0, 0), (2, 2))], "lacks 4 of its 8 elements"),
        ((4, 2), [((-1, 0), (4, 2))], "lies outside of"),
        ((4, 2), [((0, 0), (-4, -2))], "lies outside of"),
        ((4, 2), [((0,), (8,))], "lies outside of"),
        ((), [], "lacks 1 of its 1 elements"),
        ((-4, -4), [((0, 0), (-4, -4))], "no tensor's"),
        ((2**40, 2**40), [((0, 0), (2**40, 2**40))], "no tensor's"),
        ((1,) * 65, [((0,) * 65, (1,) * 65)], "65 dims"),
    ],
)
def test_each_fault_is_named(shape: tuple[int, ...], blocks: list[Block], says: str) -> None:
    problem = tiling_problem(shape, blocks)
    assert problem is not None and says in problem


def test_many_dims_do_not_make_it_slow() -> None:
    """A block has 2^n corners in n dims that are cut."""
    shape = (2,) * 60
    halves = [((0,) * 60, (1,) * 60)] * 2**10
    begin = time.process_time()
    assert tiling_problem(shape, halves) is not None
    assert time.process_time() - begin < 0.5
    assert shape_problem(shape) is None
    whole = [((0,) * 60, (1, *(2,) * 59)), ((1, *(0,) * 59), (1, *(2,) * 59))]
    assert tiling_problem(shape, whole) is None, "59 of them are not cut"


def test_time_is_linear_in_the_parts() -> None:
    blocks = [((3 * i, 2 * j), (3, 2)) for i, j in itertools.product(range(100), range(100))]
    random.Random(0).shuffle(blocks)
    begin = time.process_time()
    assert tiling_problem((300, 200), blocks) is None
    assert time.process_time() - begin < 0.5
    blocks[7] = blocks[8]
    assert tiling_problem((300, 200), blocks) == "has parts that overlap"
