"""float32 weights as two halves of 16 bits: what a bfloat16 pass computes with, and the rest.

The upper half is the weight rounded to bfloat16, to nearest and ties to even as torch rounds it, so that a pass over
it has the bits of one over the float32 weight. The lower half is the float32's lower 16 bits. The two give the float32
back, but for a tie, a lower half of 0x8000: whether it was rounded up or down is not in them. One weight of 65,536 is a
tie, and every second of these was rounded down; the places of those are kept beside the halves. (Rounding half up, as
others do, needs no such list, and computes with other bits than a run whose weights are in memory.)
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = -0x8000
"""The lower half of a tie, as an int16."""
BLOCK_NUMEL = 1 << 20
"""Elements that are treated at a time, so that temporaries are small whatever the size of the tensor."""


def split(values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Writes the halves of `values`, which must not be NaN.

    Args:
        values: contiguous float32.
        high: bfloat16 of as many elements; gets `values.to(torch.bfloat16)`, to the bit.
        low: int16 of as many elements; gets the lower halves' bits.

    Returns:
        int64, the flat indexes of ties that were rounded down, which `add_rest` needs.
    """
    values, high, low = values.reshape(-1), high.reshape(-1), low.reshape(-1)
    lowered = []
    for start in range(0, values.numel(), BLOCK_NUMEL):
        part = slice(start, start + BLOCK_NUMEL)
        bits = values[part].view(torch.int32)
        high[part].copy_(values[part])
        low[part].copy_(bits)  # wraps: the lower 16 bits
        ties = (low[part] == TIE).nonzero().squeeze(1)
        is_lowered = (bits[ties] >> 16) == high[part].view(torch.int16)[ties].to(torch.int32)
        lowered.append(ties[is_lowered] + start)
    return torch.cat(lowered) if lowered else torch.empty(0, dtype=torch.int64, device=values.device)


def add_rest(values: Tensor, low: Tensor, lowered: Tensor) -> None:
    """Makes of float32 `values` that hold the upper halves, widened, those that `split` took apart, in place."""
    values, low = values.reshape(-1), low.reshape(-1)
    bits = values.view(torch.int32)
    for start in range(0, values.numel(), BLOCK_NUMEL):
        part = slice(start, start + BLOCK_NUMEL)
        # A lower half of 0x8000 and more is negative as an int16: adding it takes the rounding up back.
        bits[part].add_(low[part].to(torch.int32))
    bits[lowered] += 1 << 16
