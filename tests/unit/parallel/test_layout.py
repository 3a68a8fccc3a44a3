from __future__ import annotations

import pytest
import torch
from support.ranks import run_ranks
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.layout import Layout, layout_of, zeros_over


def test_a_plain_tensor_is_whole() -> None:
    layout = layout_of(torch.zeros(3, 5))
    assert layout == Layout((3, 5)) and layout.local_shape() == (3, 5)
    assert layout.of((5, 2), 0).dim is None
    zeros = zeros_over(torch.zeros(3, 5, dtype=torch.bfloat16), (5, 2), 0)
    assert type(zeros) is torch.Tensor and zeros.shape == (5, 2) and zeros.dtype == torch.float32


def mesh_of(num_replicas: int | None = None):
    sharding = Sharding.zero3 if num_replicas is None else Sharding.hsdp
    return ParallelConfig(name=sharding, num_replicas=num_replicas).build(torch.device("cpu"))


def look(shape: tuple[int, ...], dim: int, num_replicas: int | None) -> dict:
    mesh = mesh_of(num_replicas)
    placements = [Shard(dim)] if num_replicas is None else [Replicate(), Shard(dim)]
    tensor = distribute_tensor(torch.arange(torch.Size(shape).numel()).view(shape), mesh.device_mesh, placements)
    layout = layout_of(tensor)
    state = zeros_over(tensor, (7, 2), 0)
    same = zeros_over(tensor, (7, 2), None)
    result = {
        "rank": layout.rank,
        "num_ranks": layout.num_ranks,
        "span": layout.span(),
        "shapes": [layout.local_shape(rank) for rank in range(layout.num_ranks)],
        "local": tuple(tensor.to_local().shape),
        "state": (tuple(state.shape), tuple(state.to_local().shape), state.placements == (*placements[:-1], Shard(0))),
        "state_layout": layout.of((7, 2), 0).local_shape(),
        "same": type(same) is torch.Tensor,
    }
    mesh.stop()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (2, 9)])
def test_a_shard_is_where_torch_puts_it(shape: tuple[int, int], dim: int) -> None:
    results = run_ranks(look, 4, shape, dim, None)
    for rank, result in enumerate(results):
        assert (result["rank"], result["num_ranks"]) == (rank, 4)
        assert result["shapes"][rank] == result["local"]
        assert result["state"] == ((7, 2), result["state_layout"], True)
        assert result["same"]
    assert sum(result["span"].stop - result["span"].start for result in results) == shape[dim]
    assert [result["state_layout"][0] for result in results] == [2, 2, 2, 1]


@pytest.mark.slow
def test_replicas_are_not_part_of_a_layout() -> None:
    results = run_ranks(look, 4, (8, 4), 0, 2)
    assert [(result["rank"], result["num_ranks"]) for result in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
