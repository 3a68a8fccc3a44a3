"""The validation loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from windlass.data.loader import Batch
from windlass.parallel.collectives import all_reduce
from windlass.parallel.mesh import Mesh
from windlass.parallel.zero import Sharder
from windlass.train.loss import count_tokens, forward_loss_sum


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy over `num_tokens`, nats a token."""
    num_tokens: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sharder: Sharder,
    batches: Iterable[Batch],
    mask_documents: bool,
    mesh: Mesh,
    goes_on: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The loss over all ranks' `batches`, exact per token. Every rank must bring the same number of batches.

    Args:
        goes_on: called after each batch.
    """
    begin = time.perf_counter()
    # float64: the sum of many batches must not depend on how they were dealt to ranks.
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    model.eval()
    for batch in batches:
        totals[0] += forward_loss_sum(model, batch.to(mesh.device), mask_documents)
        totals[1] += count_tokens([batch])
        goes_on()
    model.train()
    sharder.free_gathered(model)
    all_reduce(totals, mesh.data_group)
    loss_sum, num_tokens = totals.tolist()
    return Evaluation(loss_sum / max(1.0, num_tokens), int(num_tokens), time.perf_counter() - begin)
