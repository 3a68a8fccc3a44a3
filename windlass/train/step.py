"""One step: forward, backward and update. The loop and the forecast run it; the mock step runs all but the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from windlass.data.batch import Batch
from windlass.data.config import Borders
from windlass.models.spec import Head, Model, Reduction
from windlass.train.objectives.objective import Objective

if TYPE_CHECKING:
    from windlass.train.build import StepParts


Around = Callable[[int, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Stepped:
    """The result of a step.

    Args:
        loss_sum: of this rank's micro-batches, 0-dim, on the device.
        grad_norm: before clipping, over all ranks, 0-dim.
        is_finite: the gradients were finite on all ranks; else the step was skipped, and the weights are as they were.
        stall_s: what was waited before the update.
    """

    loss_sum: Tensor
    grad_norm: Tensor
    is_finite: bool
    stall_s: float


def run_step(
    parts: StepParts,
    batches: Sequence[Batch],
    num_targets: Callable[[], int],
    before_update: Callable[[], float] = lambda: 0.0,
    around: Around = lambda number, num_passes: nullcontext(),
) -> Stepped:
    """Runs `batches` through the model and updates it with the gradients of their mean loss.

    Args:
        batches: this rank's micro-batches of the step, on its device.
        num_targets: gives what the summed losses are divided by: the targets of all ranks together. Called when the
            first forward pass is over.
        before_update: called when gradients are there and weights are about to change; returns seconds that it waited.
        around: see `forward_backward`.
    """
    engine = parts.engine
    loss_sum = forward_backward(parts, batches, num_targets, around)
    grad_norm = engine.grad_norm()
    stall_s = before_update()
    is_finite = engine.all_ranks_finite(grad_norm)
    if is_finite:
        engine.step()
    engine.zero_grad()
    return Stepped(loss_sum, grad_norm, is_finite, stall_s)


def forward_backward(
    parts: StepParts,
    batches: Sequence[Batch],
    num_targets: Callable[[], int],
    around: Around = lambda number, num_passes: nullcontext(),
) -> Tensor:
    """Leaves the gradients of the mean loss of `batches`.

    Args:
        around: gives what is entered around a forward and backward pass, of its number and how many there are.

    Returns:
        The summed loss, 0-dim, on the device.
    """
    engine, passes = parts.engine, parts.passes(list(batches))
    loss_sum = torch.zeros((), device=parts.mesh.device)
    for number, micro_batches in enumerate(passes):
        with around(number, len(passes)):
            engine.begin_micro_step(is_last=number == len(passes) - 1)
            with parts.activations_offloaded():
                loss_sums = forward(parts.model, parts.objective, micro_batches, parts.mask_documents)
            engine.backward([micro_loss_sum / num_targets() for micro_loss_sum in loss_sums])
            loss_sum += sum(micro_loss_sum.detach() for micro_loss_sum in loss_sums)
            del loss_sums
    return loss_sum


def forward(
    model: Model, objective: Objective, batches: Sequence[Batch], mask_documents: bool, keep_logits: bool = True
) -> list[Tensor]:
    """The summed loss of each micro-batch, in one pass that they share.

    Of several, only one micro-batch's logits, or gradients of the head, exist at a time: backward computes those of the
    others again.

    Args:
        batches: one, or as many as shall share a pass where the model fuses micro-batches; on the model's device.
        mask_documents: no token attends across a border between documents.
        keep_logits: those of the first micro-batch, the last to run forward and the first backward, until then; else
            they too are computed again.

    Returns:
        float32, 0-dim. One backward pass must be of all of them.
    """
    reductions = [reduction(objective, batch, number > 0 or not keep_logits) for number, batch in enumerate(batches)]
    input_ids = [batch.input_ids for batch in batches]
    document_ids = [batch.document_ids for batch in batches]
    if len(batches) == 1:
        return [model(input_ids[0], document_ids[0] if mask_documents else None, reductions[0])]
    return model(input_ids, document_ids if mask_documents else None, reductions)


def reduction(objective: Objective, batch: Batch, recompute: bool) -> Reduction:
    """Makes the loss of `batch` of hidden states and head; with `recompute` it keeps only those for backward."""

    def loss_sum(hidden: Tensor, head: Head) -> Tensor:
        return objective.loss_sum(hidden, head, batch)

    def recomputed(hidden: Tensor, head: Head) -> Tensor:
        return _Recomputed.apply(loss_sum, head, hidden, head.weight, head.bias)

    return recomputed if recompute else loss_sum


class _Recomputed(torch.autograd.Function):
    """A reduction that runs without gradients, and again in backward.

    `checkpoint` would run it with gradients both times, and losses in chunks make theirs in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, reduce: Reduction, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.reduce, ctx.scale, ctx.soft_cap = reduce, head.scale, head.soft_cap
        ctx.save_for_backward(hidden, weight, bias)
        return reduce(hidden, head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
        ]
        hidden, weight, bias = inputs
        assert hidden is not None and weight is not None
        with torch.enable_grad():
            result = ctx.reduce(hidden, Head(weight, bias, ctx.scale, ctx.soft_cap))
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, grads[0]))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)


def made_up_batch(objective: Objective, batch_size: int, seq_len: int) -> Batch:
    """A batch as the objective makes it, of tokens that are all 0."""
    shape = (batch_size, seq_len + objective.lookahead)
    return objective.make_batch(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int32), Borders.none)
