from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.parallel.fragment import (
    Fragment,
    ReplicaShare,
    Tier,
    empty_like_global,
    fragment_of,
    local_tensor,
)


def block(global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> Fragment:
    return Fragment("w", global_shape, offset, shape, torch.float32)


@st.composite
def two_blocks(draw: Any) -> tuple[Fragment, Fragment]:
    """Any two blocks of one tensor, empty ones among them."""
    global_shape = tuple(draw(st.lists(st.integers(0, 6), min_size=0, max_size=3)))
    blocks = []
    for _ in range(2):
        offset = tuple(draw(st.integers(0, size)) for size in global_shape)
        shape = tuple(draw(st.integers(0, size - start)) for size, start in zip(global_shape, offset, strict=True))
        blocks.append(block(global_shape, offset, shape))
    return blocks[0], blocks[1]


@given(two_blocks())
def test_overlap_is_what_both_hold(blocks: tuple[Fragment, Fragment]) -> None:
    one, other = blocks
    numbers = torch.arange(torch.Size(one.global_shape).numel()).view(one.global_shape)
    in_both = set(numbers[one.slices].flatten().tolist()) & set(numbers[other.slices].flatten().tolist())
    found = one.overlap(other)
    if found is None:
        assert not in_both
        return
    mine, theirs = numbers[one.slices][found[0]], numbers[other.slices][found[1]]
    assert torch.equal(mine, theirs)
    assert set(mine.flatten().tolist()) == in_both


@given(two_blocks())
def test_overlap_is_symmetric(blocks: tuple[Fragment, Fragment]) -> None:
    one, other = blocks
    found = one.overlap(other)
    assert other.overlap(one) == (None if found is None else found[::-1])


def test_slices_index_the_global_tensor() -> None:
    part = block((4, 5), (1, 2), (2, 3))
    assert part.slices == (slice(1, 3), slice(2, 5))
    assert part.numel == 6


@pytest.mark.parametrize(("shape", "numel"), [((), 1), ((0,), 0), ((3, 0), 0), ((2, 3, 4), 24)])
def test_a_plain_tensor_is_its_own_whole(shape: tuple[int, ...], numel: int) -> None:
    part = fragment_of("x", torch.zeros(shape, dtype=torch.int16))
    assert part == Fragment("x", shape, (0,) * len(shape), shape, torch.int16, Tier.host)
    assert part.numel == numel


def test_the_local_part_of_a_plain_tensor_is_itself_without_autograd() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    local = local_tensor(weight)
    assert not local.requires_grad
    local.fill_(2.0)
    assert weight.tolist() == [2.0, 2.0, 2.0]


def test_ranks_share_what_they_all_hold_by_its_bytes() -> None:
    tensors = [torch.zeros(6, 2000), torch.zeros(2, 2000), torch.zeros(2, 2000), torch.zeros(3, 2000), torch.zeros(1)]
    shares = [ReplicaShare(rank, 2) for rank in range(2)]
    included = [[share.includes(tensor) for tensor in tensors] for share in shares]
    assert included[0] == [not mine for mine in included[1]], "one of them speaks for each"
    assert included[0] == [True, False, False, False, True], "as many bytes each as can be, small ones apart"


def test_what_is_said_together_counts_together() -> None:
    first, second = ReplicaShare(0, 2), ReplicaShare(1, 2)
    small = torch.zeros(2000)
    assert first.includes(small, num_bytes=10**6) and not second.includes(small, num_bytes=10**6)
    for _ in range(3):
        assert second.includes(small) and not first.includes(small), "until it has as much to say"


def test_an_empty_like_has_the_shape_and_another_dtype() -> None:
    like = empty_like_global(torch.nn.Parameter(torch.zeros(2, 3)), torch.bfloat16)
    assert (like.shape, like.dtype, like.requires_grad) == ((2, 3), torch.bfloat16, False)
