"""Cut over two ranks too, what becomes of a matrix does not depend on which others step at the same time."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import CASES, gradient, make, parameters_of
from support.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.fragment import local_tensor

SHAPES = [*[(34, 49)] * 3, (49, 34), (65, 129), (65, 129), (3, 64), (7,), (7,)]
NUM_STEPS = 6  # beyond an update interval
TOGETHER = [list(range(len(SHAPES)))]
APART = [[8], [0], [6, 3, 1], [2, 5], [4, 7]]


def run(dim: int) -> dict[str, list[str]]:
    """What differs between steps on all parameters at once and in parts, by the optimizer's name."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    assert mesh.device_mesh is not None

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh.device_mesh, [Shard(dim if tensor.ndim > 1 else 0)])

    def trained(name: str, parts: list[list[int]]) -> dict[str, torch.Tensor]:
        parameters = [nn.Parameter(cut(parameter.detach())) for parameter in parameters_of(SHAPES)]
        optimizer = make(name, parameters[:7], parameters[7:], weight_decay=0.1)
        for step in range(NUM_STEPS):
            for part in parts:
                for index in part:
                    parameters[index].grad = cut(gradient(SHAPES[index], step, index))
                optimizer.step()
                optimizer.zero_grad()
        return {
            f"{index} {key}": local_tensor(value)
            for index, parameter in enumerate(parameters)
            for key, value in {"weight": parameter, **optimizer.state[parameter]}.items()
        }

    differing = {}
    for name in CASES:
        together, apart = trained(name, TOGETHER), trained(name, APART)
        assert together.keys() == apart.keys()
        differing[name] = [key for key in together if not torch.equal(together[key], apart[key])]
    mesh.stop()
    return differing


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_give_the_same_bits(dim: int) -> None:
    for differing in run_ranks(run, 2, dim):
        assert differing == {name: [] for name in CASES}
