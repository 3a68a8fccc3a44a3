"""The seam between losses and everything else: an objective is what training makes small.

A loss is a sum over targets, to be divided by the number of targets of the whole global batch, over all micro-batches
and ranks. So it is exact per target however tokens are dealt out, and a mean of means is nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from windlass.data.batch import IGNORE_INDEX, Batch, NextTokens
from windlass.models.spec import Head


class Objective(NextTokens):
    """A loss, what its batches have, and what an evaluation reports. Derived classes give `loss_sum` at least.

    Batches have the next token for a label; derived classes may make others, see `windlass.data.batch.BatchMaker`.

    Args:
        config: the dataclass that it is registered with.
    """

    metrics: Sequence[str] = ("loss",)
    """The means over targets that an evaluation reports; `metrics.jsonl` has it as `val/NAME`. The first is `loss`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def num_targets(self, batch: Batch) -> int:
        """The number of targets that the loss of `batch` is a sum over: its labels that count."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def loss_sum(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        """The loss summed over the targets of `batch`: float32, 0-dim.

        Args:
            hidden: (batch, seq_len, hidden_size).
        """
        raise NotImplementedError

    def metric_sums(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        """The metrics, each summed over the targets of `batch`: as many as `metrics` names. Without gradients."""
        return torch.stack([self.loss_sum(hidden, head, batch)])
