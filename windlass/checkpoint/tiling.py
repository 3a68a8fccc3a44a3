"""Checks that blocks make up a tensor, each element in one of them; every reader asks before it reads. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Sizes = tuple[int, ...]

MAX_DIMS = 64
"""As torch has."""
MAX_ELEMENTS = 2**60
"""Bytes of such a tensor still fit in 64 bits."""
MAX_CUT_DIMS = 8
"""A block has 2^n corners where n dims are cut; ranks cut one to three."""


def shape_problem(shape: Sizes) -> str | None:
    """Why `shape` is no tensor's, as a clause; None if it is one's."""
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dims, and at most {MAX_DIMS} are read"
    if any(size < 0 or size > MAX_ELEMENTS for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        return f"has the shape {list(shape)}, which is no tensor's"
    return None


def tiling_problem(shape: Sizes, blocks: Sequence[tuple[Sizes, Sizes]]) -> str | None:
    """Why `blocks` do not tile a tensor of `shape` exactly, as a clause; None if they do.

    The corners of blocks, each with its sign, are the mixed derivative of how often each element is covered, and say
    it all: they add up to the corners of the tensor if, and only if, every element is covered once. That takes time
    linear in the blocks, however they are cut.

    Args:
        blocks: (offset, shape) of each, in elements a dim. Empty ones are allowed.
    """
    problem = shape_problem(shape)
    if problem is not None:
        return problem
    if len(blocks) == 1 and blocks[0] == ((0,) * len(shape), shape):
        return None
    for offset, size in blocks:
        if not _is_inside(shape, offset, size):
            return f"has a part of shape {list(size)} at {list(offset)}, which lies outside of {list(shape)}"
    num_elements = sum(math.prod(size) for _, size in blocks)
    total = math.prod(shape)
    if num_elements < total:
        return f"lacks {total - num_elements} of its {total} elements"
    if num_elements > total:
        return "has parts that overlap"
    cut = [dim for dim, size in enumerate(shape) if any(block[dim] != size for _, block in blocks)]
    if len(cut) > MAX_CUT_DIMS:
        return f"is cut along {len(cut)} dims, and at most {MAX_CUT_DIMS} are read"
    corners: dict[Sizes, int] = {}
    _add_corners(corners, [0] * len(cut), [shape[dim] for dim in cut], 1)
    for offset, size in blocks:
        _add_corners(corners, [offset[dim] for dim in cut], [size[dim] for dim in cut], -1)
    return "has parts that overlap" if total and any(corners.values()) else None


def _is_inside(shape: Sizes, offset: Sizes, size: Sizes) -> bool:
    return len(offset) == len(size) == len(shape) and all(
        0 <= start <= start + length <= whole for start, length, whole in zip(offset, size, shape, strict=True)
    )


def _add_corners(corners: dict[Sizes, int], offset: Sequence[int], size: Sequence[int], weight: int) -> None:
    ends = [((start, 1), (start + length, -1)) for start, length in zip(offset, size, strict=True)]
    for corner in itertools.product(*ends):
        place = tuple(position for position, _ in corner)
        corners[place] = corners.get(place, 0) + weight * math.prod(sign for _, sign in corner)
