"""Erasure coding where ISA-L cannot be loaded: the field of `erasure.py` in torch's integer operations."""

from __future__ import annotations

import numpy as np
import torch

_BLOCK_BYTES = 32 << 10


class TorchEngine:
    """Eight bytes a word and no table. By Horner's rule over the bits of the coefficients, highest first:

    target = (...((sum of sources with bit 7) * 2 + sum of sources with bit 6) * 2 + ...) + sum of sources with bit 0.
    Seven doublings a row, however many sources. Blocks are copied to where they stay in a cache, aligned to words.
    """

    name = "torch"

    def __init__(self, polynomial: int) -> None:
        self._reduction = polynomial & 0xFF

    def multiply(self, coefficients: np.ndarray, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        self._run(coefficients, sources, targets, accumulate=False)

    def add(self, coefficients: np.ndarray, source: np.ndarray, targets: list[np.ndarray]) -> None:
        self._run(coefficients, [source], targets, accumulate=True)

    def _run(
        self, coefficients: np.ndarray, sources: list[np.ndarray], targets: list[np.ndarray], accumulate: bool
    ) -> None:
        words = torch.zeros(len(sources) + 3, _BLOCK_BYTES // 8, dtype=torch.int64)
        staging = words.view(torch.uint8).numpy()
        *inputs, total, high, low = words
        result = staging[len(sources)]
        for start in range(0, targets[0].size, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, targets[0].size - start)
            part = slice(start, start + size)
            for stage, source in zip(staging, sources, strict=False):
                stage[:size] = source[part]
            for row, target in zip(coefficients.tolist(), targets, strict=True):
                _horner(row, inputs, total, high, low, self._reduction)
                if accumulate:
                    np.bitwise_xor(target[part], result[:size], out=target[part])
                else:
                    target[part] = result[:size]


def _horner(
    row: list[int],
    inputs: list[torch.Tensor],
    total: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    reduction: int,
) -> None:
    """total = the sum of the products of `row` and `inputs`, words of 8 bytes; `high` and `low` are room to work in.

    Args:
        reduction: the polynomial of the field without its highest bit.
    """
    total.zero_()
    top = max(row).bit_length() - 1
    for bit in range(top, -1, -1):
        if bit != top:  # doubles each byte: shifts it, and subtracts the polynomial where a bit fell out
            torch.bitwise_right_shift(total, 7, out=high)
            high.bitwise_and_(0x0101010101010101).mul_(reduction)
            torch.bitwise_and(total, 0x7F7F7F7F7F7F7F7F, out=low)
            torch.bitwise_left_shift(low, 1, out=low)
            torch.bitwise_xor(low, high, out=total)
        for coefficient, source in zip(row, inputs, strict=True):
            if coefficient >> bit & 1:
                total.bitwise_xor_(source)
