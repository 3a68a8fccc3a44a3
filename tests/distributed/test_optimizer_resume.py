"""Every optimizer goes on from a checkpoint: to the bit on as many ranks, within rounding on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.optimizers import CASES, gradient, make, parameters_of
from support.ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from windlass.checkpoint import Checkpointer
from windlass.errors import IncompatibleCheckpoint
from windlass.parallel.config import Axis, ParallelConfig, Sharding
from windlass.parallel.mesh import Mesh

SHAPES = [(34, 49), (48, 20), (40, 40), (3, 64)]
ATOL = {"cosmos": 1e-5, "muon": 1e-5}
every_optimizer = pytest.mark.parametrize("name", list(CASES))


class Layer(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def build(name: str, mesh: Mesh, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Matrices and a vector, cut by FSDP2 along the longer dim where it divides, and their optimizer."""
    model = nn.Sequential(*[Layer(parameter.detach()) for parameter in parameters_of([*SHAPES, (9,)])])
    if mesh.device_mesh is not None:

        def longer(parameter: torch.Tensor) -> Shard:
            wide = parameter.ndim == 2 and parameter.shape[1] > parameter.shape[0]
            return Shard(1 if wide and parameter.shape[1] % mesh.size(Axis.shard) == 0 else 0)

        fully_shard(model, mesh=mesh.device_mesh, shard_placement_fn=longer)
    parameters = list(model.parameters())
    return model, make(name, parameters[: len(SHAPES)], parameters[len(SHAPES) :], weight_decay=0.1, **options)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(model.parameters()):
            whole = gradient(tuple(parameter.shape), step, index)
            if hasattr(parameter, "device_mesh"):
                whole = torch.distributed.tensor.distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        optimizer.step()


def whole_weights(model: nn.Module) -> list[np.ndarray]:
    return [
        (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().numpy().copy()
        for parameter in model.parameters()
    ]


def attempts(folder: str | None, steps: range) -> dict[str, list[np.ndarray]]:
    """Of each optimizer: restores what its part of `folder` has, takes the steps and saves; its whole weights."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    weights = {name: attempt(name, folder and f"{folder}/{name}", steps, mesh) for name in CASES}
    mesh.stop()
    return weights


def attempt(name: str, folder: str | None, steps: range, mesh: Mesh) -> list[np.ndarray]:
    model, optimizer = build(name, mesh)
    checkpointer = None
    if folder is not None:
        checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, folder, mesh)
        restored = checkpointer.restore_latest()
        assert (restored.step if restored else 0) == steps.start
    take(model, optimizer, steps)
    if checkpointer is not None:
        checkpointer.save(steps.stop)
    return whole_weights(model)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[np.ndarray]]:
    return run_ranks(attempts, 2, None, range(20))[0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    """10 and 10 steps on 2 ranks."""
    folder = str(tmp_path_factory.mktemp("two"))
    run_ranks(attempts, 2, folder, range(10))
    return run_ranks(attempts, 2, folder, range(10, 20))[0]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    """7 steps on 2 ranks, 7 on 4, 6 on 1."""
    folder = str(tmp_path_factory.mktemp("several"))
    run_ranks(attempts, 2, folder, range(7))
    run_ranks(attempts, 4, folder, range(7, 14))
    return run_ranks(attempts, 1, folder, range(14, 20))[0]


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, list[np.ndarray]]:
    return run_ranks(attempts, 1, None, range(20))[0]


@every_optimizer
def test_ten_and_ten_steps_are_twenty_to_the_bit(name: str, undisturbed: dict, resumed: dict) -> None:
    for found, expected in zip(resumed[name], undisturbed[name], strict=True):
        np.testing.assert_array_equal(found, expected)


@every_optimizer
def test_two_four_and_one_ranks_are_one(name: str, moved: dict, on_one_rank: dict) -> None:
    for found, expected in zip(moved[name], on_one_rank[name], strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL.get(name, 1e-6))


DCP_CASES = ("apollo", "galore", "sgd_sai")


def dcp_lives(folder: str, steps: range) -> dict[str, list[np.ndarray]]:
    """As `attempts`, with torch's own distributed checkpoints."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    weights = {name: dcp_attempt(name, f"{folder}/{name}", steps, mesh) for name in DCP_CASES}
    mesh.stop()
    return weights


def dcp_attempt(name: str, folder: str, steps: range, mesh: Mesh) -> list[np.ndarray]:
    model, optimizer = build(name, mesh)
    if steps.start:
        model_state, optimizer_state = get_state_dict(model, optimizer)  # makes the state that is read into
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    take(model, optimizer, steps)
    if not steps.start:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return whole_weights(model)


def test_through_torchs_distributed_checkpoints(undisturbed: dict, tmp_path: Path) -> None:
    run_ranks(dcp_lives, 2, str(tmp_path), range(6))
    resumed = run_ranks(dcp_lives, 2, str(tmp_path), range(6, 20))[0]
    for name in DCP_CASES:
        for found, expected in zip(resumed[name], undisturbed[name], strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)


def refused_attempt(saved: str, restoring: str, folder: str, rank: int) -> tuple[str, bool]:
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    model, optimizer = build(saved, mesh)
    take(model, optimizer, range(2))
    Checkpointer({"model": model, "optimizer": optimizer}, folder, mesh).save(2)
    other, other_optimizer = build(restoring, mesh)
    if restoring == saved:
        other_optimizer.param_groups[0]["rank"] = rank
    before = whole_weights(other)
    message = ""
    try:
        Checkpointer({"model": other, "optimizer": other_optimizer}, folder, mesh).restore_latest()
    except IncompatibleCheckpoint as error:
        message = str(error)
    unchanged = all(np.array_equal(one, two) for one, two in zip(before, whole_weights(other), strict=True))
    unchanged = unchanged and not other_optimizer.state
    mesh.stop()
    return message, unchanged


@pytest.mark.parametrize(
    ("saved", "restoring", "expected"),
    [
        ("apollo", "apollo", "optimizer was saved with rank 2 and has rank 3 here"),
        ("apollo", "galore", "optimizer is Apollo there and GaLore here"),
        ("muon", "apollo", "optimizer is Muon there and Apollo here"),
    ],
)
def test_a_checkpoint_of_another_rank_or_optimizer_is_refused(
    saved: str, restoring: str, expected: str, tmp_path: Path
) -> None:
    for message, unchanged in run_ranks(refused_attempt, 2, saved, restoring, str(tmp_path), 3):
        assert expected in message
        assert unchanged
