"""The loss of logits as a sum over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
"""The label of a token that does not count, as in `torch.nn.functional.cross_entropy`."""


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, float32.

    Args:
        logits: (batch, seq_len, vocab_size), any float dtype.
        labels: int64 (batch, seq_len); `IGNORE_INDEX` does not count.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
