"""The cross-entropy of the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.models.spec import Head
from windlass.train.objectives.objective import Objective


class NextToken(Objective):
    """Nats a token."""

    def loss_sum(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        return cross_entropy_sum(head.logits(hidden), batch.labels)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats, float32.

    Args:
        logits: (batch, seq_len, vocab_size), any float dtype.
        labels: int64 (batch, seq_len); `IGNORE_INDEX` does not count.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
