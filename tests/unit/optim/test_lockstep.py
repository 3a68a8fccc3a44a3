from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from windlass.optim.lockstep import (
    Exchange,
    Sum,
    Update,
    all_gather,
    gather_to_owners,
    reduce_scatter,
    run_in_lockstep,
    scatter_from_owners,
    sum_over_ranks,
)
from windlass.parallel.collectives import COMM
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.layout import Layout, Split


def whole(index: int, shape: tuple[int, ...] = (2, 7, 3)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))


def test_alone_every_request_is_answered_by_what_it_sent() -> None:
    found = []

    def update() -> Update:
        found.extend((yield Sum(torch.tensor([1.0, 2.0]))))
        found.extend((yield Exchange([torch.tensor([3.0])], [(1,)])))
        found.append((yield from gather_to_owners(torch.ones(2, 3, 4), Layout((3, 4)), [0, 0])))

    run_in_lockstep([((), update())])
    assert [tensor.flatten().tolist() for tensor in found] == [[1.0, 2.0], [3.0], [1.0] * 24]


def exchange_run(dim: int) -> dict[str, Any]:
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    group, rank, num_ranks = dist.group.WORLD, mesh.rank, mesh.world_size
    layout = Layout((7, 3), (Split(dim, group, rank, num_ranks),))
    span = layout.span()
    found: dict[str, Any] = {}

    def update(index: int) -> Update:
        tensor = whole(index)
        local = tensor.narrow(dim + 1, span.start, span.stop - span.start)
        found[f"gather {index}"] = torch.equal((yield from all_gather(local, layout)), tensor)
        total = yield from reduce_scatter(tensor * (rank + 1), layout)
        expected = (local * sum(range(1, num_ranks + 1))).to(total)
        found[f"scatter {index}"] = torch.allclose(total, expected, rtol=1e-6)
        owners = [index % num_ranks, (index + 1) % num_ranks]
        owned = yield from gather_to_owners(local, layout, owners)
        mine = [position for position, owner in enumerate(owners) if owner == rank]
        found[f"own {index}"] = torch.equal(owned, tensor[mine])
        back = yield from scatter_from_owners(owned, layout, owners)
        found[f"back {index}"] = torch.equal(back, local)
        everywhere = yield from scatter_from_owners(owned, layout.of((7, 3), None), owners)
        found[f"everywhere {index}"] = torch.equal(everywhere, tensor)
        if index:  # not all updates take as many steps
            found[f"sum {index}"] = float((yield from sum_over_ranks(torch.tensor([1.0 + rank])))[0])

    COMM.calls_by_kind.clear()
    run_in_lockstep(((group,), update(index)) for index in range(3))
    found["calls"] = dict(COMM.calls_by_kind)
    mesh.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_updates_ask_of_other_ranks(num_ranks: int, dim: int) -> None:
    for found in run_ranks(exchange_run, num_ranks, dim):
        calls = found.pop("calls")
        sums = [found.pop(f"sum {index}") for index in (1, 2)]
        assert sums == [sum(range(1, num_ranks + 1))] * 2
        assert all(found.values()), found
        assert calls == {"all_to_all": 5, "all_reduce": 1}, "one collective a step, however many updates there are"


def mixed_run() -> list[list[float]]:
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    found: list[list[float]] = []

    def update(dtype: torch.dtype) -> Update:
        total = yield from sum_over_ranks(torch.tensor([[0.5, 1.5]], dtype=dtype))
        assert total.dtype == dtype and total.shape == (1, 2)
        found.append(total.flatten().tolist())

    run_in_lockstep(((dist.group.WORLD,), update(dtype)) for dtype in (torch.float32, torch.float64, torch.float32))
    mesh.stop()
    return found


def test_sums_of_several_dtypes() -> None:
    assert run_ranks(mixed_run, 2) == [[[1.0, 3.0]] * 3] * 2


def test_an_error_in_an_update_comes_out() -> None:
    def update() -> Update:
        yield Sum(torch.ones(1))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run_in_lockstep([((), update())])
