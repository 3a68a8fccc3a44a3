"""A micro-batch, and what makes one of windows of the token stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from windlass.data.config import Borders

IGNORE_INDEX = -100
"""The label of a token that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Batch:
    """Sequences of T tokens.

    Args:
        input_ids: int64 [B, T].
        labels: int64 [B, T], e.g. the token after each; `IGNORE_INDEX` where it does not count.
        document_ids: int32 [B, T], rises by one at each border between documents in a sequence, from 0.
        others: what else the objective needs, by name; the first dim of each is B.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from page-locked memory the copy is asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        input_ids, labels, document_ids = map(move, (self.input_ids, self.labels, self.document_ids))
        return Batch(input_ids, labels, document_ids, {name: move(tensor) for name, tensor in self.others.items()})


class BatchMaker(Protocol):
    """An objective's part in making batches."""

    @property
    def lookahead(self) -> int:
        """Tokens behind a sequence that its labels need."""
        ...

    def make_batch(
        self, tokens: np.ndarray, documents: np.ndarray, borders: Borders, counts: np.ndarray | None = None
    ) -> Batch:
        """Makes a batch of samples.

        Args:
            tokens: int64 [B, T + lookahead].
            documents: int32 of the same shape, the number of each token's document in its window, from 0.
            borders: with `Borders.none` a label may be of another document than its input.
            counts: bool of the same shape, True for tokens that may be labels; None: all may, and it is left out.
        """
        ...


class NextTokens:
    """Labels are the tokens one further."""

    lookahead = 1

    def make_batch(
        self, tokens: np.ndarray, documents: np.ndarray, borders: Borders, counts: np.ndarray | None = None
    ) -> Batch:
        """With `Borders.none` the last token of a document is to predict the first of the next; otherwise no label
        counts whose input is of another document."""
        labels = tokens[:, 1:].copy()
        if borders != Borders.none:
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
        if counts is not None:
            labels[~counts[:, 1:]] = IGNORE_INDEX
        input_ids, document_ids = tokens[:, :-1].copy(), documents[:, :-1].copy()
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(document_ids))
