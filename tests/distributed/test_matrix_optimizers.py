"""Sharded matrices are updated as whole ones, with the communication that the algorithm needs and no more."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from support.optimizers import CASES, gradient, make, parameters_of, state_numel
from support.ranks import run_ranks
from support.toy import Layout, toy_run
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from windlass.parallel.collectives import COMM
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh

SHAPES = [(34, 49), (49, 34), (40, 40), (3, 64), (34, 49)]
NUM_STEPS = 10
REPLICATED = {"apollo": lambda short: 1, "apollo_mini": lambda short: 1, "sgd_sai": lambda short: 1}
REPLICATED |= {"galore": lambda short: 2 * short, "natural_galore": lambda short: 2 * short + 2 * 5 * 5}
"""State elements that every rank holds of a matrix with that shorter dim: projectors of rank 2, Gram matrices of 5."""
ATOL = {"cosmos": 1e-5, "muon": 1e-5}
every_optimizer = pytest.mark.parametrize("name", list(CASES))


def sharded_runs(dim: int) -> dict[str, dict[str, Any]]:
    """Of each optimizer, ten steps of recorded gradients on matrices and a vector that are cut along `dim`."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    results = {name: sharded_run(name, dim, mesh) for name in CASES}
    mesh.stop()
    return results


def sharded_run(name: str, dim: int, mesh: Mesh) -> dict[str, Any]:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        along = dim if tensor.ndim > 1 else 0
        return tensor if mesh.device_mesh is None else distribute_tensor(tensor, mesh.device_mesh, [Shard(along)])

    parameters = [nn.Parameter(cut(parameter.detach())) for parameter in parameters_of([*SHAPES, (7,)])]
    optimizer = make(name, parameters[: len(SHAPES)], parameters[len(SHAPES) :], weight_decay=0.1)
    of_steps = []
    for step in range(NUM_STEPS):
        for index, parameter in enumerate(parameters):
            parameter.grad = cut(gradient(tuple(parameter.shape), step, index))
        COMM.bytes_by_kind.clear(), COMM.calls_by_kind.clear()
        optimizer.step()
        of_steps.append((dict(COMM.calls_by_kind), dict(COMM.bytes_by_kind)))
    whole = [
        (parameter.full_tensor() if mesh.device_mesh is not None else parameter).detach().numpy().copy()
        for parameter in parameters
    ]
    empty = sum(local_tensor(parameter).numel() == 0 for parameter in parameters)
    return {"weights": whole, "comm": of_steps, "state_numel": state_numel(optimizer), "empty_shards": empty}


@lru_cache
def results_of(num_ranks: int, dim: int) -> list[dict[str, dict[str, Any]]]:
    """Ranks are started once for all optimizers."""
    return run_ranks(sharded_runs, num_ranks, dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_ranks", [2, 4])
@every_optimizer
def test_sharded_updates_equal_whole_ones(name: str, num_ranks: int, dim: int) -> None:
    whole = results_of(1, 0)[0][name]
    results = [of_rank[name] for of_rank in results_of(num_ranks, dim)]
    for result in results:
        for shape, found, expected in zip([*SHAPES, (7,)], result["weights"], whole["weights"], strict=True):
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=ATOL.get(name, 1e-6), err_msg=f"{name} {shape} cut along {dim}"
            )
    replicated = sum(REPLICATED.get(name, lambda short: 0)(min(shape)) for shape in SHAPES) + (name == "sgd_sai")
    total = sum(result["state_numel"] for result in results)
    assert total == whole["state_numel"] + (num_ranks - 1) * replicated
    if num_ranks == 4 and dim == 0:
        assert any(result["empty_shards"] for result in results), "three rows over four ranks"


def long_cut_run(name: str) -> list[tuple[dict, dict]]:
    """What each of ten steps communicates when every matrix is cut along its longer dim."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    parameters = [
        nn.Parameter(distribute_tensor(parameter.detach(), mesh.device_mesh, [Shard(int(np.argmax(parameter.shape)))]))
        for parameter in parameters_of(SHAPES)
    ]
    optimizer = make(name, parameters)
    of_steps = []
    for step in range(NUM_STEPS):
        for index, parameter in enumerate(parameters):
            whole_gradient = gradient(tuple(parameter.shape), step, index)
            parameter.grad = distribute_tensor(whole_gradient, mesh.device_mesh, parameter.placements)
        COMM.bytes_by_kind.clear(), COMM.calls_by_kind.clear()
        optimizer.step()
        of_steps.append((dict(COMM.calls_by_kind), dict(COMM.bytes_by_kind)))
    mesh.stop()
    return of_steps


@pytest.mark.parametrize(("name", "numbers"), [("apollo", 1), ("apollo_mini", 3)])
def test_the_long_cut_costs_apollo_one_all_reduce_of_scalars(name: str, numbers: int) -> None:
    for of_steps in run_ranks(long_cut_run, 2, name):
        for calls, carried in of_steps:
            assert calls == {"all_reduce": 1}
            assert carried == {"all_reduce": numbers * len(SHAPES) * 4}, "2 (N-1)/N of 4 bytes, N = 2"


def test_the_long_cut_costs_galore_nothing_between_refreshes() -> None:
    for of_steps in run_ranks(long_cut_run, 2, "galore"):
        for step, (_, carried) in enumerate(of_steps):
            refreshes = step % CASES["galore"][1]["update_interval"] == 0
            assert (sum(carried.values()) > 0) == refreshes


@lru_cache
def one_process(optimizer: str) -> dict[str, Any]:
    return toy_run(Layout("none", optimizer=optimizer), 5)


@pytest.mark.parametrize("optimizer", list(CASES))
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout("zero3"), id="zero3"),
        pytest.param(Layout("zero1", cut="dim0"), id="zero1", marks=pytest.mark.full),
    ],
)
def test_fsdp2_trains_the_same_model(optimizer: str, layout: Layout) -> None:
    """A Llama under FSDP2 with accumulation and clipping, against one process."""
    layout = replace(layout, optimizer=optimizer)
    reference = one_process(optimizer)
    results = run_ranks(toy_run, 2, layout, 5)
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(results[0]["losses"], reference["losses"], atol=1e-4)


@pytest.mark.parametrize("layout", [Layout("hsdp", num_replicas=2), Layout("ddp"), Layout("zero2")], ids=str)
def test_apollo_trains_the_same_model_under_every_sharding(layout: Layout) -> None:
    layout = replace(layout, optimizer="apollo")
    reference = one_process("apollo")
    results = run_ranks(toy_run, 4, layout, 5)
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "apollo"])
@pytest.mark.parametrize("sharding", ["zero1", "zero3", "ddp"])
def test_the_optimizer_in_the_backward_pass_of_fsdp2(sharding: str, optimizer: str) -> None:
    """The same model as with steps after the backward pass; clipping is left out, which differs by design."""
    layout = Layout(sharding, optimizer=optimizer, max_norm=None)
    reference = run_ranks(toy_run, 2, layout, 4)[0]
    results = run_ranks(toy_run, 2, replace(layout, in_backward="unclipped"), 4)
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=1e-6, err_msg=name)
