"""The cross-entropy of hidden states against a head, without logits of all tokens at once.

Logits and their gradients exist for a chunk of tokens at a time, in one buffer that all chunks use. A chunk makes its
gradients at once, so that nothing is computed twice: backward only multiplies them by the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from windlass.data.batch import IGNORE_INDEX
from windlass.models.spec import Head
from windlass.models.values import has_values

_CHUNK_BYTES = 64 << 20
"""The size of a chunk's logits: float32, vocab_size for each token."""
_MIN_TOKENS = 256
"""The fewest tokens of a chunk: each chunk reads the weight twice, and reads and writes its gradient."""
_ROWS_BYTES = 8 << 20
"""The size of the products, in half precision, that join the weight's gradient at a time."""


def cross_entropy_sum(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats, float32: in float32 whatever the dtype of `hidden`, but for the products.

    A token that does not count costs nothing. There is one backward pass: it uses up the gradients.

    Args:
        hidden: (..., hidden_size), any float dtype.
        labels: int64 (...), of the vocabulary; `IGNORE_INDEX` does not count.
    """
    inputs = hidden.flatten(0, -2), head.weight, head.bias
    needs_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _CrossEntropy.apply(*inputs, labels.flatten(), head.scale, head.soft_cap, needs_gradients)


class _CrossEntropy(torch.autograd.Function):
    """The sum, and with it the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        soft_cap: float | None,
        needs_gradients: bool,
    ) -> Tensor:
        rows = _counted(labels)
        counted, labels = (hidden, labels) if rows is None else (hidden[rows], labels[rows])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needed = [needs_gradients and is_needed for is_needed in ctx.needs_input_grad[:3]]
        gradients = [
            torch.empty_like(counted) if needed[0] else None,
            torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None,
            torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needed[2] else None,
        ]
        loss_sum = _in_chunks(counted, labels, (weight, bias), (scale, soft_cap), gradients)
        if rows is not None and gradients[0] is not None:
            gradients[0] = torch.zeros_like(hidden).index_copy_(0, rows, gradients[0])
        ctx.gradients = gradients
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through a summed cross-entropy, which keeps gradients for one")
        found, ctx.gradients = ctx.gradients, None
        scaled = [None if x is None else x.mul_(grads[0]).to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None


def _counted(labels: Tensor) -> Tensor | None:
    """The places of the labels that count; None where all do. Waits for the device."""
    if not has_values(labels):
        return None
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return None if len(rows) == len(labels) else rows


def _in_chunks(
    hidden: Tensor,
    labels: Tensor,
    projection: tuple[Tensor, Tensor | None],
    bounds: tuple[float, float | None],
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """The summed loss; `gradients` (of hidden, weight and bias) get theirs where they are not None."""
    weight, bias = projection
    scale, soft_cap = bounds
    vocab_size, num_tokens = len(weight), len(hidden)
    cast = weight.detach().to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    size = min(max(_CHUNK_BYTES // (4 * vocab_size), _MIN_TOKENS), num_tokens)
    buffer = torch.empty(size, vocab_size, dtype=wide, device=hidden.device)
    # Products of half precision have a place of their own, and then the gradients of the logits as products take them.
    narrow = buffer if hidden.dtype == wide else torch.empty_like(buffer, dtype=hidden.dtype)
    slopes = torch.empty_like(buffer) if soft_cap is not None and any(x is not None for x in gradients) else None
    loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
    for begin in range(0, num_tokens, max(1, size)):
        tokens, targets = hidden[begin : begin + size], labels[begin : begin + size, None]
        logits = buffer[: len(tokens)]
        half = logits if narrow is buffer else narrow[: len(tokens)]
        torch.mm(tokens, cast.T, out=half)
        if half is not logits:
            logits.copy_(half)
        if bias is not None:
            logits.add_(bias)
        slope = None if slopes is None else slopes[: len(tokens)]
        _bound(logits, scale, soft_cap, slope)
        logits.sub_(logits.amax(1, keepdim=True))
        chosen = logits.gather(1, targets)
        sums = logits.exp_().sum(1, keepdim=True)
        loss_sum += (sums.log() - chosen).sum()
        if all(gradient is None for gradient in gradients):
            continue
        # From here on these are the gradients of the products: probabilities less 1 for the label.
        logits.div_(sums).scatter_add_(1, targets, torch.full_like(chosen, -1.0))
        if slope is not None:
            logits.mul_(slope)
        if scale != 1.0:
            logits.mul_(scale)
        if half is not logits:
            half.copy_(logits)
        part = None if gradients[0] is None else gradients[0][begin : begin + size]
        _add_gradients(logits, half, tokens, cast, (part, *gradients[1:]))
    return loss_sum


def _bound(logits: Tensor, scale: float, soft_cap: float | None, slope: Tensor | None) -> None:
    """Scales and caps in place; `slope` gets the derivative of the cap."""
    if scale != 1.0:
        logits.mul_(scale)
    if soft_cap is None:
        return
    logits.div_(soft_cap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1.0)
    logits.mul_(soft_cap)


def _add_gradients(
    wide: Tensor, half: Tensor, tokens: Tensor, weight: Tensor, gradients: Sequence[Tensor | None]
) -> None:
    """Adds a chunk's to those of weight and bias, and writes that of its hidden states."""
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        torch.mm(half, weight, out=of_hidden)
    if of_bias is not None:
        of_bias.add_(wide.sum(0))
    if of_weight is None:
        return
    if of_weight.dtype == half.dtype:
        of_weight.addmm_(half.T, tokens)
        return
    num_rows = max(1, _ROWS_BYTES // (tokens.shape[1] * tokens.element_size()))
    for begin in range(0, len(of_weight), num_rows):
        of_weight[begin : begin + num_rows].add_(half[:, begin : begin + num_rows].T @ tokens)
