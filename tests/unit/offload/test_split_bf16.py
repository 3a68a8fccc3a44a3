"""float32 weights as bfloat16 and a rest: both come back, to the bit, and the upper half is torch's own rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from windlass.offload.split_bf16 import BLOCK_NUMEL, add_rest, split

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149


def of_bits(bits: Tensor) -> Tensor:
    """The floats of int64 bit patterns, those that are NaN left out."""
    values = bits.to(torch.int32).view(torch.float32)
    return values[~values.isnan()]


def check(values: Tensor) -> Tensor:
    """Splits and joins; returns the ties that were rounded down."""
    high = torch.empty(values.numel(), dtype=torch.bfloat16)
    low = torch.empty(values.numel(), dtype=torch.int16)
    before = values.clone()
    lowered = split(values, high, low)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32)), "it is read and not changed"
    assert torch.equal(high.view(torch.int16), values.reshape(-1).to(torch.bfloat16).view(torch.int16))
    joined = high.float().view(values.shape)
    add_rest(joined, low, lowered)
    assert torch.equal(joined.view(torch.int32), values.view(torch.int32))
    return lowered


@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_upper_half_comes_back(lower: int) -> None:
    """With lower halves on each side of what rounds up, and at it."""
    values = of_bits((torch.arange(1 << 16) << 16) + lower)
    assert values.numel() >= (1 << 16) - (1 << 8)
    lowered = check(values)
    is_even = (values.view(torch.int32) >> 16) % 2 == 0
    expected = is_even.nonzero().squeeze(1) if lower == 0x8000 else torch.empty(0, dtype=torch.int64)
    assert torch.equal(lowered, expected), "of the ties, those whose upper half is even are rounded down"


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=50))
def test_any_bits_come_back(bits: list[int]) -> None:
    check(of_bits(torch.tensor(bits, dtype=torch.int64)))


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("-inf"), LARGEST, -LARGEST, SMALLEST, -SMALLEST, 1.0])
def test_the_ends_of_the_range_come_back(value: float) -> None:
    """The largest floats are rounded to infinity, and come back from it."""
    assert check(torch.tensor([value])).numel() == 0


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_tensors_of_several_blocks_come_back(extra: int) -> None:
    generator = torch.Generator().manual_seed(extra + 1)
    bits = torch.randint(0, 1 << 32, (2 * BLOCK_NUMEL + extra,), generator=generator)
    bits[::1000] = bits[::1000] & ~0xFFFF | 0x8000  # ties in each block
    values = bits.to(torch.int32).view(torch.float32)
    values[values.isnan()] = 0.0
    lowered = check(values)
    assert set((lowered // BLOCK_NUMEL).tolist()) == set(range(2)), "indexes are of the whole tensor"
    assert len(lowered) < values.numel() / 1000, "and few"


def test_any_shape_is_taken_and_nothing_at_all() -> None:
    check(torch.randn(7, 3, 5))
    assert check(torch.empty(0)).numel() == 0
