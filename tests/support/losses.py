"""The loss of the next token of a model's micro-batches, as a step computes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from windlass.data.batch import Batch
from windlass.models.spec import Model
from windlass.train.objectives.config import NextTokenConfig
from windlass.train.step import forward

NEXT_TOKEN = NextTokenConfig().build()


def count_tokens(batches: Sequence[Batch]) -> int:
    return sum(map(NEXT_TOKEN.num_targets, batches))


def forward_loss_sum(model: Model, batch: Batch, mask_documents: bool) -> Tensor:
    return forward(model, NEXT_TOKEN, [batch], mask_documents)[0]


def forward_loss_sums(
    model: Model, batches: Sequence[Batch], mask_documents: bool, keep_logits: bool = True
) -> list[Tensor]:
    return forward(model, NEXT_TOKEN, batches, mask_documents, keep_logits)
