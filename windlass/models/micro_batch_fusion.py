"""Micro-batch fusion: a layer runs all micro-batches of a step before the next layer runs the first.

A loop over micro-batches needs every layer's weights twice a micro-batch, forward and backward. Where weights come from
a disk that is most of what is read. Here the micro-batches of a step are parts of one autograd graph, each layer runs
one after the other, and its weights are needed twice a step. It costs memory: a layer's input (and without activation
checkpointing all that it saves) of every micro-batch is there at the same time.

Losses and gradients have the same bits as those of the loop over micro-batches. Autograd runs what was recorded last
first, so a layer runs its micro-batches from the last to the first, and backward meets them from the first to the
last: every gradient is the sum of the micro-batches' in the loop's order. (Not so where layers add up parts of a
micro-batch, see `token_wise`. And dropout draws its masks in another order.)

Over ranks, `zero3` gathers weights and reduces gradients once a step, and so moves a G-th of the bytes of G
micro-batches; these are summed before ranks and not after, which changes the rounding. In bfloat16 they are summed in
bfloat16, as the gathered weights have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

MicroBatches = TypeVar("MicroBatches", torch.Tensor, list[torch.Tensor])
"""A batch, or the list of a step's micro-batches."""


def over_micro_batches(run: Callable[..., torch.Tensor], first: MicroBatches, *others: Any) -> MicroBatches:
    """`run(first, *others)`; where `first` is a list, of each of its micro-batches, the last one first.

    Args:
        others: a list has an entry a micro-batch; anything else goes to every micro-batch as it is.
    """
    if isinstance(first, torch.Tensor):
        return cast("MicroBatches", run(first, *others))
    outputs = [
        run(part, *(other[i] if isinstance(other, list) else other for other in others))
        for i, part in reversed(list(enumerate(first)))
    ]
    outputs.reverse()
    return cast("MicroBatches", outputs)
