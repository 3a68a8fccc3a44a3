"""The loss, and what else an objective reports, on batches that are not trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from windlass.data.batch import Batch
from windlass.models.spec import Model, Reduction
from windlass.parallel.collectives import all_reduce
from windlass.parallel.mesh import Mesh
from windlass.train.objectives.objective import Objective


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    """Means over `num_targets`, by the names of `Objective.metrics`."""
    num_targets: int
    seconds: float

    @property
    def loss(self) -> float:
        return self.metrics["loss"]


@torch.no_grad()
def evaluate(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    mask_documents: bool,
    mesh: Mesh,
    goes_on: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The metrics over all ranks' `batches`, exact per target. Every rank must bring the same number of batches.

    Args:
        goes_on: called after each batch.
    """
    begin = time.perf_counter()
    # float64: the sum of many batches must not depend on how they were dealt to ranks.
    totals = torch.zeros(len(objective.metrics) + 1, dtype=torch.float64, device=mesh.device)
    model.eval()
    for batch in batches:
        moved = batch.to(mesh.device)
        documents = moved.document_ids if mask_documents else None
        totals[:-1] += model(moved.input_ids, documents, _metric_sums(objective, moved))
        totals[-1] += objective.num_targets(batch)
        goes_on()
    model.train()
    all_reduce(totals, mesh.data_group)
    *sums, num_targets = totals.tolist()
    means = [metric_sum / max(1.0, num_targets) for metric_sum in sums]
    return Evaluation(dict(zip(objective.metrics, means, strict=True)), int(num_targets), time.perf_counter() - begin)


def _metric_sums(objective: Objective, batch: Batch) -> Reduction:
    return lambda hidden, head: objective.metric_sums(hidden, head, batch)
