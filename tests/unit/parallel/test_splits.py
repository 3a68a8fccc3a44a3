"""Fragments of tensors that are sharded over two and three mesh axes, against torch's own DTensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import windlass.optim
from windlass.checkpoint.tiling import tiling_problem
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.config import ParallelConfig
from windlass.parallel.fragment import fragment_of, local_tensor
from windlass.parallel.layout import is_sharded_evenly, layout_of, zeros_sharded_as

NAMES = ("a", "b", "c")
PLAIN: list[Placement] = [Replicate(), Shard(0), Shard(1)]
Case = tuple[tuple[int, int], tuple[Placement, ...]]


def strided(dim: int, split_factor: int) -> Placement:
    return _StridedShard(dim, split_factor=split_factor)


def cases_over(*sizes: int) -> list[Case]:
    """Shapes, even and not, with placements over a mesh of `sizes`."""
    last = sizes[-1]
    rows = torch.Size(sizes).numel() * 2
    cases: list[Case] = [
        (shape, p) for shape in ((rows, rows), (5, 7)) for p in itertools.product(PLAIN, repeat=len(sizes))
    ]
    inner = [(strided(0, last), Shard(0)), (strided(1, last), Shard(1))]
    for placements in inner if len(sizes) == 2 else [(first, *two) for first in PLAIN for two in inner]:
        cases += [((rows, rows), placements), ((7 * rows // 2, 7 * rows // 2), placements)]
    if len(sizes) == 3:
        both = sizes[1] * last
        cases += [
            ((rows, rows), (strided(0, both), Shard(0), Shard(0))),
            ((rows, rows), (strided(0, both), strided(0, last), Shard(0))),
            ((rows, rows), (strided(1, last), Shard(0), Shard(1))),
        ]
    return cases


@contextmanager
def grid_of(rank: int, *sizes: int) -> Iterator[DeviceMesh]:
    """The mesh as `rank` sees it; the other ranks do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=torch.Size(sizes).numel(), store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=NAMES[: len(sizes)])
    finally:
        dist.destroy_process_group()


def sharded(shape: tuple[int, ...], grid: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of which this rank's part holds nothing."""
    local_shape, _ = compute_local_shape_and_global_offset(shape, grid, placements)
    stride = torch.empty(shape, device="meta").stride()
    local = torch.empty(local_shape, device="meta")
    return DTensor.from_local(local, grid, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 3), (1, 3), (2, 2, 3)], ids=str)
def test_a_fragment_is_where_torch_says(sizes: tuple[int, ...]) -> None:
    num_ranks = torch.Size(sizes).numel()
    blocks: dict[int, list] = {}
    for rank in range(num_ranks):
        with grid_of(rank, *sizes) as grid:
            for number, (shape, placements) in enumerate(cases_over(*sizes)):
                tensor = sharded(shape, grid, placements)
                fragment = fragment_of("w", tensor)
                local_shape, offset = compute_local_shape_and_global_offset(shape, grid, placements)
                where = f"{shape} {placements} on rank {rank}"
                assert fragment.shape == local_shape, where
                assert not fragment.numel or fragment.offset == offset, where
                if not any(isinstance(placement, Replicate) for placement in placements):
                    blocks.setdefault(number, []).append((fragment.offset, fragment.shape))
                zeros = zeros_sharded_as(tensor)
                assert local_tensor(zeros).shape == local_shape and zeros.placements == tensor.placements
    for number, of_ranks in blocks.items():
        shape, placements = cases_over(*sizes)[number]
        assert tiling_problem(shape, of_ranks) is None, f"{shape} {placements}"


@pytest.mark.parametrize(
    ("shape", "placements", "message"),
    [
        ((12, 12), (strided(0, 2), Shard(0)), "the split factor 2 is not the number of parts"),
        ((12, 12), (strided(0, 3), Shard(1)), "the split factor 3 is not the number of parts"),
        ((12, 12), (Shard(0), strided(0, 2)), "the split factor 2 is not the number of parts"),
        ((10, 10), (strided(0, 3), Shard(0)), "takes a dim 0 that divides by 3"),
        ((12, 12), (Shard(0), Partial()), "no partial sums"),
    ],
)
def test_several_blocks_and_partial_sums_are_refused_by_name(
    shape: tuple[int, int], placements: tuple[Placement, ...], message: str
) -> None:
    with grid_of(0, 2, 3) as grid:
        tensor = DTensor.from_local(
            torch.empty(1, device="meta"), grid, placements, run_check=False, shape=torch.Size(shape), stride=(12, 1)
        )
        for ask in (lambda: fragment_of("block.up", tensor), lambda: layout_of(tensor, "block.up")):
            with pytest.raises(ValueError, match=rf"^block\.up .*{message}"):
                ask()


def test_a_layout_says_if_all_have_as_much() -> None:
    with grid_of(0, 2, 3) as grid:
        assert is_sharded_evenly(sharded((12, 5), grid, (Shard(0), Shard(0))))
        assert not is_sharded_evenly(sharded((9, 5), grid, (Shard(0), Shard(0))))
        assert not is_sharded_evenly(sharded((12, 5), grid, (Shard(0), Shard(1))))
        assert is_sharded_evenly(sharded((5, 9), grid, (Replicate(), Shard(1))))
        assert len(layout_of(sharded((12, 5), grid, (Shard(0), Shard(1)))).groups) == 2


@pytest.mark.parametrize("kind", ["Apollo", "GaLore", "NaturalGaLore", "Muon", "Cosmos"])
def test_optimizers_that_exchange_blocks_refuse_a_second_axis_by_name(kind: str) -> None:
    options = {"rank": 2} if kind in ("Apollo", "GaLore", "NaturalGaLore") else {}
    with grid_of(0, 2, 2) as grid:
        once, twice = (
            torch.nn.Parameter(distribute_tensor(torch.zeros(8, 8), grid, placements))
            for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(1)))
        )
        optimizer = getattr(windlass.optim, kind)([{"params": [("block.gate", once)], **options}])
        with pytest.raises(ValueError, match=rf"^block\.up .*{kind} takes matrices .* over one mesh axis"):
            optimizer.add_param_group({"params": [("block.up", twice)], **options})
        assert len(optimizer.param_groups) == 1
        adamw = {} if options else {"algorithm": "adamw"}
        optimizer.add_param_group({"params": [("block.up", twice)], **adamw})


def test_a_gradient_that_is_sharded_otherwise_is_refused_by_name() -> None:
    with grid_of(0, 2, 2) as grid:
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(8, 8), grid, [Shard(0), Shard(1)]))
        weight.grad = distribute_tensor(torch.ones(8, 8), grid, [Shard(0), Partial()])
        optimizer = windlass.optim.SGDSaI([("block.up", weight)])
        with pytest.raises(RuntimeError, match=r"^block\.up is sharded as .*, and its gradient sharded as"):
            optimizer.step()
        assert not optimizer.state


def compare(*sizes: int) -> int:
    """The number of cases of which each rank's fragment holds what its part does, and `full_tensor` the whole."""
    mesh = ParallelConfig().build(torch.device("cpu"))
    grid = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES[: len(sizes)])
    cases = cases_over(*sizes)
    for shape, placements in cases:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        tensor = distribute_tensor(whole, grid, placements)
        fragment = fragment_of("w", tensor)
        assert torch.equal(whole[fragment.slices], tensor.to_local()), f"{shape} {placements}"
        assert torch.equal(tensor.full_tensor(), whole)
        if not any(isinstance(placement, Replicate) for placement in placements):
            blocks = all_gather_object((fragment.offset, fragment.shape), mesh.world)
            assert tiling_problem(shape, blocks) is None
    mesh.stop()
    return len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), pytest.param((2, 2, 2), marks=pytest.mark.full)], ids=str)
def test_a_fragment_holds_what_its_rank_holds(sizes: tuple[int, ...]) -> None:
    assert (
        run_ranks(compare, torch.Size(sizes).numel(), *sizes) == [len(cases_over(*sizes))] * torch.Size(sizes).numel()
    )
