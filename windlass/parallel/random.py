"""Random numbers that a rank can make for just the fragment it holds.

Element e of a tensor is a function of (seed, name, e) alone, through the counter-based generator Philox (Parallel
Random Numbers: As Easy as 1, 2, 3; 2011), so neither the number of ranks nor the sharding changes it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from windlass.parallel.fragment import Fragment

ELEMENTS_PER_BLOCK = 8
"""A Philox 4x64 counter gives four 64-bit words; each makes two normals."""
CHUNK_ELEMENTS = 1 << 22


def fill_normal_(local: torch.Tensor, fragment: Fragment, *, seed: int, std: float) -> None:
    """Fills `local`, which holds `fragment`, with its part of a global N(0, std^2) tensor.

    The elements are numbered along the longest dim first: that is the dim which is usually sharded, and then a
    rank's numbers are one run of the counter, and it makes no more than it keeps. Normals come from Box-Muller over
    23-bit uniforms, so none is beyond 5.8 standard deviations.
    """
    if local.numel() == 0:
        return
    major = max(range(local.ndim), key=lambda dim: fragment.global_shape[dim])
    row_numel = math.prod(fragment.global_shape) // fragment.global_shape[major]
    rows = torch.movedim(local, major, 0)
    row_shape = [size for dim, size in enumerate(fragment.global_shape) if dim != major]
    row_slices = tuple(part for dim, part in enumerate(fragment.slices) if dim != major)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // row_numel)
    key = _key(seed, fragment.name)
    for start in range(0, rows.shape[0], rows_per_chunk):
        count = min(rows_per_chunk, rows.shape[0] - start)
        first = (fragment.offset[major] + start) * row_numel
        values = _normals(key, first, count * row_numel).view(count, *row_shape)
        rows[start : start + count].copy_(values[(slice(None), *row_slices)].mul_(std))


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


def _normals(key: int, first: int, count: int) -> torch.Tensor:
    """Standard normals number `first` to `first + count`, float32."""
    first_block, skipped = divmod(first, ELEMENTS_PER_BLOCK)
    num_blocks = -(-(skipped + count) // ELEMENTS_PER_BLOCK)
    generator = np.random.Philox(key=key).advance(first_block)
    words = generator.random_raw(num_blocks * 4).view(np.uint32)
    # The middle of one of 2^23 equal intervals: never 0, whose logarithm is infinite, and exact in float32.
    uniforms = torch.from_numpy((words >> np.uint32(9)).astype(np.float32)).add_(0.5).mul_(2.0**-23).view(-1, 2)
    radius = uniforms[:, 0].log().mul_(-2).sqrt_()
    angle = uniforms[:, 1] * (2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    return pairs.view(-1)[skipped : skipped + count]
