from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from windlass.errors import ConfigError
from windlass.parallel.config import Axis, Cut, ParallelConfig, Sharding
from windlass.parallel.zero import placement


@pytest.mark.parametrize(
    ("name", "num_replicas", "world_size", "local_world_size", "axes"),
    [
        ("none", None, 1, 1, {Axis.shard: 1}),
        ("ddp", None, 4, 4, {Axis.replicate: 4, Axis.shard: 1}),
        ("zero1", None, 4, 2, {Axis.shard: 4}),
        ("zero2", None, 4, 4, {Axis.shard: 4}),
        ("zero3", None, 1, 1, {Axis.shard: 1}),
        ("hsdp", None, 8, 4, {Axis.replicate: 2, Axis.shard: 4}),  # a replica a node
        ("hsdp", None, 4, 4, {Axis.replicate: 1, Axis.shard: 4}),
        ("hsdp", 4, 8, 8, {Axis.replicate: 4, Axis.shard: 2}),
        ("hsdp", 1, 8, 4, {Axis.replicate: 1, Axis.shard: 8}),
    ],
)
def test_ranks_are_laid_out(
    name: str, num_replicas: int | None, world_size: int, local_world_size: int, axes: dict[Axis, int]
) -> None:
    config = ParallelConfig(name=Sharding(name), num_replicas=num_replicas)
    assert list(config.mesh_axes(world_size, local_world_size).items()) == list(axes.items())


@given(st.sampled_from(list(Sharding)), st.integers(1, 64), st.integers(1, 8))
def test_every_rank_has_one_place(name: Sharding, world_size: int, local_world_size: int) -> None:
    try:
        axes = ParallelConfig(name=name).mesh_axes(world_size, local_world_size)
    except ConfigError:
        return
    assert math.prod(axes.values()) == world_size


def test_one_rank_cannot_be_many() -> None:
    with pytest.raises(ConfigError, match=r"trains on one rank, and 2 were started.*launch\.nproc_per_node=1"):
        ParallelConfig(name=Sharding.none).mesh_axes(2, 2)


def test_replicas_must_divide_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"must divide the number of ranks, 6.*choose one of 1, 2, 3, 6"):
        ParallelConfig(name=Sharding.hsdp, num_replicas=4).mesh_axes(6, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": Sharding.hsdp, "num_replicas": 0}, "must be at least 1"),
        ({"name": Sharding.zero3, "num_replicas": 2}, "is a setting of parallel=hsdp, not of parallel=zero3"),
        ({"timeout_s": 0.0}, r"parallel\.timeout_s=0\.0: must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("shape", "cut", "num_shards", "dim"),
    [
        ((8, 16), Cut.longer_dim, 4, 1),
        ((16, 8), Cut.longer_dim, 4, 0),
        ((8, 8), Cut.longer_dim, 4, 0),  # the first of equals
        ((8, 18), Cut.longer_dim, 4, 0),  # 18 does not divide by 4
        ((7, 9), Cut.longer_dim, 4, 0),  # nothing divides: rows may be uneven
        ((8, 16), Cut.dim0, 4, 0),
        ((16,), Cut.longer_dim, 4, 0),
        ((5,), Cut.longer_dim, 4, 0),
        ((2, 3, 12), Cut.longer_dim, 4, 2),
        ((8, 16), Cut.longer_dim, 1, 1),
    ],
)
def test_where_a_parameter_is_cut(shape: tuple[int, ...], cut: Cut, num_shards: int, dim: int) -> None:
    assert placement(torch.empty(shape, device="meta"), cut, num_shards) == Shard(dim)
