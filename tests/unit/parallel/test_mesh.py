"""A mesh of named axes: who is where, and who talks to whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from windlass.parallel.config import DATA_AXES, Axis, ParallelConfig, Sharding
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.fragment import ReplicaShare
from windlass.parallel.mesh import Mesh

AXES = {Axis.replicate: 2, Axis.shard: 3, Axis.tensor: 2}
GRID = torch.arange(12).view(2, 3, 2)


@contextmanager
def mesh_of(rank: int, axes: dict[Axis, int]) -> Iterator[Mesh]:
    """The mesh as `rank` sees it; the other ranks do not exist."""
    num_ranks = torch.Size(axes.values()).numel()
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        yield Mesh.lay_out(RankEnvironment(rank, num_ranks, rank, num_ranks), axes, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def members(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


@pytest.mark.parametrize("rank", [0, 5, 11])
def test_groups_are_the_ranks_along_the_axes(rank: int) -> None:
    replicate, shard, tensor = (int(place) for place in torch.argwhere(rank == GRID)[0])
    with mesh_of(rank, AXES) as mesh:
        assert [mesh.coordinate(axis) for axis in AXES] == [replicate, shard, tensor]
        expected = {
            (Axis.replicate,): GRID[:, shard, tensor],
            (Axis.shard,): GRID[replicate, :, tensor],
            (Axis.tensor,): GRID[replicate, shard],
            (Axis.replicate, Axis.shard): GRID[:, :, tensor],
            (Axis.tensor, Axis.replicate): GRID[:, shard],
            (Axis.shard, Axis.tensor): GRID[replicate],
        }
        for axes, ranks in expected.items():
            assert members(mesh.group_over(*axes)) == ranks.flatten().tolist(), axes
            assert mesh.size(*axes) == ranks.numel()
            assert ranks.flatten()[mesh.coordinate(*axes)] == rank
        assert mesh.group_over(*Axis) is mesh.world is dist.group.WORLD
        assert mesh.group_over() is None


def test_ranks_that_share_samples_have_one_data_position() -> None:
    positions = []
    for rank in range(12):
        with mesh_of(rank, AXES) as mesh:
            assert mesh.num_data_ranks == 6
            assert members(mesh.data_group) == GRID[:, :, rank % 2].flatten().tolist()
            assert mesh.fsdp_mesh is not None and mesh.fsdp_mesh.mesh.tolist() == GRID[:, :, rank % 2].tolist()
            positions.append((mesh.data_rank, mesh.counts_samples))
    assert [position for position, _ in positions] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [position for position, counts in positions if counts] == list(range(6)), "each counts once"


@pytest.mark.parametrize("sharding", [Sharding.ddp, Sharding.zero3, Sharding.hsdp])
def test_a_mesh_of_data_axes_is_fsdps_mesh(sharding: Sharding) -> None:
    axes = ParallelConfig(name=sharding).mesh_axes(4, 2)
    with mesh_of(3, axes) as mesh:
        assert mesh.fsdp_mesh is mesh.device_mesh
        assert mesh.data_group is mesh.world is mesh.group_over(*DATA_AXES)
        assert (mesh.data_rank, mesh.num_data_ranks, mesh.counts_samples) == (3, 4, True)


def test_axes_that_are_not_all_ranks_are_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="are not 4 ranks"):
        Mesh.lay_out(RankEnvironment(0, 4, 0, 4), {Axis.shard: 2}, torch.device("cpu"))


@pytest.mark.slow  # the first DTensors of a process
def test_one_rank_speaks_for_what_is_not_sharded_over_an_axis_of_the_run() -> None:
    """A parameter that tensor parallelism left alone is a DTensor over FSDP2's axes alone."""
    replicas = []
    for rank in range(4):
        with mesh_of(rank, {Axis.shard: 2, Axis.tensor: 2}) as mesh:
            assert mesh.fsdp_mesh is not None and mesh.device_mesh is not None
            share = ReplicaShare(rank, 4, mesh.device_mesh)
            local = torch.zeros(2, 3)
            alone = DTensor.from_local(local, mesh.fsdp_mesh, [Shard(0)], run_check=False)
            repeated = DTensor.from_local(local, mesh.device_mesh, [Shard(0), Replicate()], run_check=False)
            parts = DTensor.from_local(local, mesh.device_mesh, [Shard(0), Shard(1)], run_check=False)
            replicas.append([share.replicas(tensor) for tensor in (alone, repeated, parts, local)])
    assert [of_rank[0] for of_rank in replicas] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [of_rank[1] for of_rank in replicas] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [of_rank[2] for of_rank in replicas] == [(0, 1)] * 4
    assert [of_rank[3] for of_rank in replicas] == [(0, 4), (1, 4), (2, 4), (3, 4)]
