"""What clipping costs in memory, and what it makes of gradients of low precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.optimizers import make
from support.ranks import run_ranks
from torch import nn
from torch.profiler import ProfilerActivity, profile

from windlass.parallel.clip_grad import CHUNK_NUMEL, clip_grad_norm_, total_norm
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.mesh import Mesh, all_ranks_finite

MIB = 1 << 20
STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T,
    "part of the columns": lambda tensor: tensor[:, :900],
    "every other row": lambda tensor: tensor[::2],
    "one long row": lambda tensor: tensor.view(1, -1)[:, ::2],
}


def parameters_with(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def most_bytes(action: Callable[[], object]) -> int:
    """The most memory that torch allocated above what there was, at any time of `action`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_the_measure_of_memory_sees_temporaries() -> None:
    one = torch.ones(3 * MIB, dtype=torch.bfloat16)
    assert most_bytes(lambda: torch.linalg.vector_norm(one, dtype=torch.float32)) >= 4 * one.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_temporaries_are_small_whatever_the_gradients_are(
    strides: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, mesh: Mesh
) -> None:
    whole = torch.randn(1500, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameters = parameters_with([strides(whole), strides(whole.clone())])
    expected = math.sqrt(2) * float(strides(whole).double().norm())
    norms: list[torch.Tensor] = []
    assert most_bytes(lambda: norms.append(clip_grad_norm_(parameters, 1.0, mesh))) <= MIB
    assert norms[0].dtype == torch.float32
    assert float(norms[0]) == pytest.approx(expected, rel=1e-3)
    clipped = torch.cat([parameter.grad.double().flatten() for parameter in parameters if parameter.grad is not None])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-2)


def test_a_bfloat16_norm_is_not_rounded_to_bfloat16() -> None:
    ones = torch.ones(3 * CHUNK_NUMEL + 5, dtype=torch.bfloat16)
    assert float(total_norm([ones])) == pytest.approx(math.sqrt(len(ones)), rel=1e-6)
    assert float(total_norm([ones[:1], 0.05 * ones[:1]])) == pytest.approx(math.hypot(1, 0.05), rel=1e-4)


def test_large_bfloat16_gradients_are_finite() -> None:
    assert float(total_norm([torch.full((2000,), 1e17, dtype=torch.bfloat16)])) == pytest.approx(4.47e18, rel=1e-2)


def test_dtypes_may_be_mixed_and_shards_empty() -> None:
    tensors = [torch.full((4,), 2.0), torch.empty(0, dtype=torch.bfloat16), torch.full((9,), 1.0).bfloat16()]
    assert float(total_norm(tensors)) == 5.0
    assert float(total_norm([*reversed(tensors), torch.empty(0)])) == 5.0
    assert float(total_norm([])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_and_touches_neither_weights_nor_state(
    bad: float, dtype: torch.dtype, mesh: Mesh
) -> None:
    """`windlass.train.loop` makes no step then (tests/fault/test_bad_input.py)."""
    gradients = [torch.ones(600, 500).to(dtype), torch.ones(7).to(dtype)]
    parameters = parameters_with(gradients)
    optimizer = make("apollo", parameters[:1], parameters[1:])
    optimizer.step()
    state = {id(p): {key: value.clone() for key, value in optimizer.state[p].items()} for p in parameters}
    weights = [parameter.detach().clone() for parameter in parameters]
    gradients[0][-1, -1] = bad
    assert not all_ranks_finite(clip_grad_norm_(parameters, 1.0, mesh), mesh)
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.equal(parameter.detach(), weight)
        assert all(torch.equal(value, state[id(parameter)][key]) for key, value in optimizer.state[parameter].items())


def votes(sharding: Sharding) -> list[bool]:
    """What a rank decides, of norms of which none is bad, then that of the last rank alone."""
    mesh = ParallelConfig(name=sharding).build(torch.device("cpu"))
    found = []
    for bad in (1.0, torch.inf, torch.nan):
        norm = torch.tensor(bad if mesh.rank == mesh.world_size - 1 else 1.0)
        found.append(all_ranks_finite(norm, mesh))
    mesh.stop()
    return found


def test_replicas_decide_alike_where_one_alone_has_a_norm_that_is_not_finite() -> None:
    assert run_ranks(votes, 2, Sharding.ddp) == [[True, False, False]] * 2
