"""The loss of micro-batches as sums over tokens, to be divided by the number of tokens of the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from windlass.data.loader import IGNORE_INDEX, Batch
from windlass.models.loss import cross_entropy_sum


def count_tokens(batches: Sequence[Batch]) -> int:
    """How many labels of `batches` count."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)


def forward_loss_sum(model: nn.Module, batch: Batch, mask_documents: bool) -> torch.Tensor:
    """`cross_entropy_sum` of the model on `batch`; with `mask_documents` no token attends across a border."""
    logits = model(batch.input_ids, batch.document_ids if mask_documents else None)
    return cross_entropy_sum(logits, batch.labels)


def forward_loss_sums(
    model: nn.Module, batches: Sequence[Batch], mask_documents: bool, keep_logits: bool = True
) -> list[torch.Tensor]:
    """`forward_loss_sum` of each micro-batch, in one layer-major pass.

    Of several, only one micro-batch's logits exist at a time: backward computes those of the others again.

    Args:
        model: a `Llama`, cut or whole.
        batches: the micro-batches of a step, or some of them, on the model's device.
        mask_documents: no token attends across a border between documents.
        keep_logits: those of the first micro-batch, with which backward begins, until then; else they too are computed
            again.

    Returns:
        A sum a micro-batch, float32, 0-dim. One backward pass must be of all of them:
        `torch.autograd.backward([loss_sum / num_tokens for loss_sum in loss_sums])`.
    """
    if len(batches) == 1 and keep_logits:
        return [forward_loss_sum(model, batches[0], mask_documents)]
    input_ids = [batch.input_ids for batch in batches]
    document_ids = [batch.document_ids for batch in batches] if mask_documents else None
    return model(input_ids, document_ids, [batch.labels for batch in batches], keep_logits)
