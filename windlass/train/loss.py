"""The loss as a sum over tokens, to be divided by the number of tokens of the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from windlass.train.data.loader import IGNORE_INDEX, Batch


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, float32.

    Args:
        logits: (batch, seq_len, vocab_size), any float dtype.
        labels: int64 (batch, seq_len); `IGNORE_INDEX` does not count.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def count_tokens(batches: Sequence[Batch]) -> int:
    """How many labels of `batches` count."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)


def forward_loss_sum(model: nn.Module, batch: Batch, mask_documents: bool) -> torch.Tensor:
    """`cross_entropy_sum` of the model on `batch`; with `mask_documents` no token attends across a border."""
    logits = model(batch.input_ids, batch.document_ids if mask_documents else None)
    return cross_entropy_sum(logits, batch.labels)
