"""Layer-major micro-batches: a layer runs all micro-batches of a step before the next layer runs the first.

A loop over micro-batches needs every layer's weights twice a micro-batch, forward and backward. Where weights come from
a disk that is most of what is read. Here the micro-batches of a step are slices of one autograd graph, each layer runs
slice after slice, and its weights are needed twice a step. What it costs is memory: a layer's input (and without
activation checkpointing all that it saves) of every slice is there at the same time.

Losses and gradients have the same bits as those of the loop over micro-batches. Autograd runs what was recorded last
first, so a layer runs its slices from the last to the first, and backward meets them from the first to the last: every
gradient is the sum of the slices' in the loop's order. (Not so where layers add up parts of a slice, see `token_wise`.
And dropout draws its masks in another order.)

Over ranks, `zero3` gathers weights and reduces gradients once a step, and so moves a G-th of the bytes of G
micro-batches; slices are summed before ranks and not after, which changes the rounding. In bfloat16 they are summed in
bfloat16, as the gathered weights have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Slices = TypeVar("Slices", torch.Tensor, list[torch.Tensor])
"""A batch, or the list of a step's micro-batches."""


def over_slices(run: Callable[..., torch.Tensor], first: Slices, *others: Any) -> Slices:
    """`run(first, *others)`; where `first` is a list, of each of its slices, the last one first.

    Args:
        others: a list has an entry a slice; anything else goes to every slice as it is.
    """
    if isinstance(first, torch.Tensor):
        return cast("Slices", run(first, *others))
    outputs = [
        run(part, *(other[i] if isinstance(other, list) else other for other in others))
        for i, part in reversed(list(enumerate(first)))
    ]
    outputs.reverse()
    return cast("Slices", outputs)
