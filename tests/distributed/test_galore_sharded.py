"""GaLore and Natural GaLore over ranks: the weights of one process, no drift, and no more memory or bytes than said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.optimizers import gradient, state_numel
from support.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import windlass.optim
from windlass.optim import lockstep
from windlass.parallel.collectives import COMM
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.fragment import fragment_of, local_tensor

SHAPES = [(34, 49), (49, 34), (40, 40), (3, 64), (40, 40), (34, 49)]
RANK, INTERVAL, NUM_STEPS, HISTORY = 2, 4, 10, 3


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy()


def train(kind: str, cuts: tuple[str, ...], keys: dict[str, Any], max_gathered_numel: int) -> dict[str, Any]:
    """All shapes, cut along "long", "short" or both of their dims in turn, on the ranks that there are."""
    lockstep.MAX_GATHERED_NUMEL = max_gathered_numel
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    parameters = []
    for index, shape in enumerate(SHAPES * len(cuts)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(index % len(SHAPES)))
        is_wide = shape[0] < shape[1]
        dim = int(is_wide) if cuts[index // len(SHAPES)] == "long" else int(not is_wide)
        cut = value if mesh.device_mesh is None else distribute_tensor(value, mesh.device_mesh, [Shard(dim)])
        parameters.append(nn.Parameter(cut))
    group = {"params": parameters, "rank": RANK, "update_interval": INTERVAL, **keys}
    optimizer = getattr(windlass.optim, kind)([group], lr=1e-2, weight_decay=0.1)
    traffic = []
    for step in range(NUM_STEPS):
        for index, parameter in enumerate(parameters):
            value = gradient(tuple(parameter.shape), step, index % len(SHAPES))
            parameter.grad = torch.zeros_like(parameter)
            local_tensor(parameter.grad).copy_(value[fragment_of("", parameter).slices])
        bytes_before, calls_before = COMM.total_bytes, COMM.calls_by_kind.total()
        optimizer.step()
        traffic.append((COMM.total_bytes - bytes_before, COMM.calls_by_kind.total() - calls_before))
    states = [optimizer.state[parameter] for parameter in parameters]
    result = {
        "weights": [whole(parameter) for parameter in parameters],
        "projectors": [whole(state["projector"]) for state in states],
        "numel": state_numel(optimizer),
        "traffic": traffic,
    }
    mesh.stop()
    return result


CASES = [
    ("GaLore", {"shard_projector": False}),
    ("GaLore", {"shard_projector": True}),
    ("NaturalGaLore", {"history": HISTORY, "damping": 0.5}),
]
NO_LIMIT, TIGHT = 1 << 25, 2000


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("kind", "keys"), CASES, ids=["whole projector", "cut projector", "natural"])
def test_sharded_matrices_follow_those_of_one_process(kind: str, keys: dict[str, Any], num_ranks: int) -> None:
    reference = run_ranks(train, 1, kind, ("long",), keys, NO_LIMIT)[0]
    results = run_ranks(train, num_ranks, kind, ("long", "short"), keys, TIGHT)
    for result in results:
        for index, projector in enumerate(result["projectors"]):
            assert np.array_equal(projector, reference["projectors"][index % len(SHAPES)]), index
        for index, weight in enumerate(result["weights"]):
            np.testing.assert_allclose(weight, reference["weights"][index % len(SHAPES)], rtol=0, atol=1e-6)


def moments() -> int:
    return sum(2 * RANK * max(shape) for shape in SHAPES)


def projectors() -> int:
    return sum(RANK * min(shape) for shape in SHAPES)


@pytest.mark.parametrize("cut", ["long", "short"])
def test_the_ranks_share_the_state(cut: str) -> None:
    for kind, keys in CASES:
        total = sum(result["numel"] for result in run_ranks(train, 2, kind, (cut,), keys, NO_LIMIT))
        copies = 1 if keys.get("shard_projector") else 2
        expected = moments() + copies * projectors()
        if kind == "NaturalGaLore":
            expected += moments() // 2 * HISTORY + 2 * len(SHAPES) * 2 * HISTORY**2
        assert total == expected, (kind, keys)


def test_between_refreshes_what_is_said_is_sent_and_no_more() -> None:
    def between(kind: str, cut: str, keys: dict[str, Any], limit: int = NO_LIMIT) -> set[tuple[int, int]]:
        """Bytes that the two ranks send together, and calls; of each step that is no refresh."""
        one, other = (result["traffic"] for result in run_ranks(train, 2, kind, (cut,), keys, limit))
        steps = [step for step in range(NUM_STEPS) if step % INTERVAL]
        assert all(one[step][1] == other[step][1] for step in steps)
        return {(one[step][0] + other[step][0], one[step][1]) for step in steps}

    assert between("GaLore", "long", {}, TIGHT) == {(0, 0)}
    assert between("GaLore", "long", {"shard_projector": True}) == {(4 * projectors(), 1)}
    # R to the rank of its rows, and the direction back; that is as many elements as the two moments have.
    assert between("GaLore", "short", {"shard_projector": True}) == {(4 * moments(), 2)}
    assert between("NaturalGaLore", "long", {"history": HISTORY}) == {(2 * 8 * HISTORY * len(SHAPES), 1)}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_refresh_gathers_each_gradient_once_in_waves(num_ranks: int) -> None:
    for limit in (NO_LIMIT, TIGHT):
        results = run_ranks(train, num_ranks, "GaLore", ("long",), {}, limit)
        refreshes = [result["traffic"][0] for result in results]
        gradients = sum(shape[0] * shape[1] for shape in SHAPES)
        # All but what an owner has already; less than a share of each where shards are uneven.
        sent = sum(bytes_sent for bytes_sent, _ in refreshes) / 4
        expected = (gradients / num_ranks + projectors()) * (num_ranks - 1)
        assert sent == pytest.approx(expected, rel=0.05)
        calls = {count for _, count in refreshes}
        assert len(calls) == 1
        num_waves = calls.pop() // 2
        assert num_waves == (1 if limit == NO_LIMIT else {2: 3, 4: 2}[num_ranks])
