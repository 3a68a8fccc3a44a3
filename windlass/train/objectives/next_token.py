"""The cross-entropy of the next token."""

from __future__ import annotations

from torch import Tensor

from windlass.data.batch import Batch
from windlass.models.spec import Head
from windlass.train.objectives.cross_entropy import cross_entropy_sum
from windlass.train.objectives.objective import Objective


class NextToken(Objective):
    """Nats a token."""

    def loss_sum(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        return cross_entropy_sum(hidden, head, batch.labels)
