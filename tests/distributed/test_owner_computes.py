"""Muon, COSMOS and SGD-SaI over ranks: the weights of one rank, equal shares of state and work, known traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.optimizers import gradient, parameters_of, state_numel
from support.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import windlass.optim
from windlass.optim.matrix_stack import MatrixStack
from windlass.parallel.collectives import COMM
from windlass.parallel.config import ParallelConfig, Sharding

UNEVEN = [(34, 49), (49, 34), (40, 40), (3, 64), (34, 49)]
EVEN = [(32, 48), (48, 32), (40, 40), (4, 64), (32, 48), (32, 48)]
RANK = 4
NUM_STEPS = 4


def run(kind: str, shapes: list, dim: int, options: dict, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if mesh.device_mesh is None else distribute_tensor(tensor, mesh.device_mesh, [Shard(dim)])

    parameters = [nn.Parameter(cut(parameter.detach())) for parameter in parameters_of(shapes, dtype)]
    optimizer = getattr(windlass.optim, kind)(parameters, lr=1e-2, **options)
    batches: list[MatrixStack] = []
    update = optimizer.update
    optimizer.update = lambda batch: batches.append(batch) or update(batch)
    sent = []
    for step in range(NUM_STEPS):
        for index, parameter in enumerate(parameters):
            parameter.grad = cut(gradient(tuple(parameter.shape), step, index).to(dtype))
        before = COMM.total_bytes
        optimizer.step()
        sent.append(COMM.total_bytes - before)
    whole = [(parameter if mesh.device_mesh is None else parameter.full_tensor()).detach() for parameter in parameters]
    work = [sum(batch.cost for batch in batches for owner in batch.owners if owner == rank) for rank in range(4)]
    mesh.stop()
    weights = [weight.float().numpy().copy() for weight in whole]
    return {"weights": weights, "sent": sent, "state_numel": state_numel(optimizer), "work": work}


@pytest.mark.parametrize(
    ("kind", "options", "dtype", "atol"),
    [
        ("Muon", {}, torch.float32, 0.0),
        ("Muon", {"nesterov": False}, torch.bfloat16, 0.0),
        # The bits of float32 products depend on how matrices lie in memory, one by one or stacked.
        ("Cosmos", {"rank": RANK}, torch.float32, 1e-6),
        ("Cosmos", {"rank": RANK, "compat": True}, torch.float32, 1e-6),
        ("SGDSaI", {}, torch.float32, 0.0),
    ],
)
def test_ranks_compute_what_one_does(kind: str, options: dict, dtype: torch.dtype, atol: float) -> None:
    alone = run_ranks(run, 1, kind, UNEVEN, 0, options, dtype)[0]
    for num_ranks, dim in ((2, 0), (4, 0), (4, 1)):
        results = run_ranks(run, num_ranks, kind, UNEVEN, dim, options, dtype)
        for result in results:
            for shape, found, expected in zip(UNEVEN, result["weights"], alone["weights"], strict=True):
                assert abs(found - expected).max() <= atol, f"{shape} on {num_ranks} ranks, cut along {dim}"
        replicated = len(UNEVEN) * (num_ranks - 1) if kind == "SGDSaI" else 0
        assert sum(result["state_numel"] for result in results) == alone["state_numel"] + replicated


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", ["Muon", "Cosmos"])
def test_a_step_sends_each_matrix_to_its_owner_and_back(kind: str, num_ranks: int) -> None:
    """Of even cuts, where each rank has the documented 1/N."""
    results = run_ranks(run, num_ranks, kind, EVEN, 0, {"rank": RANK} if kind == "Cosmos" else {})
    if kind == "Muon":
        num_bytes = sum(2 * 2 * a * b for a, b in EVEN)
        state_numel = sum(a * b for a, b in EVEN)
    else:
        num_bytes = sum(4 * (3 * a * b + 2 * RANK * (a + b + RANK)) for a, b in EVEN)
        state_numel = sum(a * b + RANK * (a + b + RANK) for a, b in EVEN)
    for of_step in zip(*(result["sent"] for result in results), strict=True):
        assert sum(of_step) == num_bytes * (num_ranks - 1) // num_ranks
    assert [result["state_numel"] for result in results] == [state_numel // num_ranks] * num_ranks
    work = results[0]["work"]
    largest = NUM_STEPS * 40 * 40 * 40
    assert max(work) - min(work[:num_ranks]) <= largest, "no rank has a matrix too many"


def test_sgd_sai_sends_two_numbers_a_tensor_and_never_again() -> None:
    for result in run_ranks(run, 2, "SGDSaI", UNEVEN, 1, {}):
        assert result["sent"] == [8 * 2 * len(UNEVEN), 0, 0, 0], "an all-reduce over two ranks carries its size"
