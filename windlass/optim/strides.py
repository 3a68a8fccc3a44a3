"""Where the elements of a tensor lie in memory, for kernels that go through memory and know no strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one piece of memory, in whatever order: each place holds one, and there is no gap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in _dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def shares_no_memory(tensor: Tensor) -> bool:
    """True if no two elements lie in one place, as they do in what `expand` returns. Such a tensor may be written to.

    False too for the few odd cuts of memory (`as_strided`) of which it is hard to tell.
    """
    span = 0  # from the first element to the last, over the dims so far
    for stride, size in _dims(tensor):
        if stride <= span:
            return False
        span += stride * (size - 1)
    return True


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dims along which there is more than one element, the smallest stride first."""
    if tensor.numel() == 0:
        return []
    return sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a dense copy of it."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or a copy of it with the strides of `like`, which is dense and of the same shape."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def put_back(originals: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    """Writes what was computed in copies into what they are copies of."""
    for original, copy in zip(originals, used, strict=True):
        if copy is not original:
            original.copy_(copy)
