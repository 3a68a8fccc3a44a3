"""How many parity shards an attempt has whose job may shrink."""

from __future__ import annotations

import pytest
import torch

from windlass.conf.compose import compose
from windlass.parallel.config import Axis
from windlass.parallel.mesh import Mesh
from windlass.train.build import num_parity_shards

TORCHRUN = ["launch=torchrun", "launch.address=a:1", "checkpoint=erasure", "checkpoint.num_parity_shards=2"]


def mesh(world_size: int, local_world_size: int) -> Mesh:
    return Mesh(
        rank=0,
        local_rank=0,
        world_size=world_size,
        local_world_size=local_world_size,
        axes={Axis.shard: world_size},
        device=torch.device("cpu"),
        world=None,
        device_mesh=None,
    )


@pytest.mark.parametrize(("world_size", "local", "kept"), [(8, 2, 2), (6, 2, 2), (4, 2, 1), (3, 1, 2), (2, 2, 0)])
def test_a_job_that_may_shrink_keeps_what_its_nodes_allow(world_size: int, local: int, kept: int) -> None:
    elastic = compose([*TORCHRUN, "launch.nnodes=1:4"])
    assert num_parity_shards(elastic, mesh(world_size, local)) == kept


def test_ranks_of_one_machine_may_be_what_is_lost() -> None:
    elastic = compose([*TORCHRUN, "launch.nnodes=1:4", "checkpoint.failure_domain=rank"])
    assert num_parity_shards(elastic, mesh(2, 2)) == 1


def test_a_job_of_fixed_nodes_is_refused_later_and_not_changed() -> None:
    assert num_parity_shards(compose([*TORCHRUN, "launch.nnodes=2"]), mesh(4, 2)) == 2


def test_other_checkpoints_have_none() -> None:
    assert num_parity_shards(compose(["checkpoint=lazy"]), mesh(4, 2)) == 0
