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
from windlass.parallel.config import ParallelConfig, Sharding
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
            return Shard(1 if wide and parameter.shape[1] % mesh.num_shards == 0 else 0)

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


def life(name: str, folder: str | None, steps: range) -> list[np.ndarray]:
    """Restores what `folder` has, takes the steps and saves."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    model, optimizer = build(name, mesh)
    checkpointer = None
    if folder is not None:
        checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, folder, mesh)
        restored = checkpointer.restore_latest()
        assert (restored.step if restored else 0) == steps.start
    take(model, optimizer, steps)
    if checkpointer is not None:
        checkpointer.save(steps.stop)
    weights = whole_weights(model)
    mesh.stop()
    return weights


@every_optimizer
def test_ten_and_ten_steps_are_twenty_to_the_bit(name: str, tmp_path: Path) -> None:
    undisturbed = run_ranks(life, 2, name, None, range(20))[0]
    run_ranks(life, 2, name, str(tmp_path), range(10))
    resumed = run_ranks(life, 2, name, str(tmp_path), range(10, 20))[0]
    for found, expected in zip(resumed, undisturbed, strict=True):
        np.testing.assert_array_equal(found, expected)


@every_optimizer
def test_two_four_and_one_ranks_are_one(name: str, tmp_path: Path) -> None:
    whole = run_ranks(life, 1, name, None, range(20))[0]
    run_ranks(life, 2, name, str(tmp_path), range(7))
    run_ranks(life, 4, name, str(tmp_path), range(7, 14))
    resumed = run_ranks(life, 1, name, str(tmp_path), range(14, 20))[0]
    for found, expected in zip(resumed, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL.get(name, 1e-6))


def dcp_life(name: str, folder: str, steps: range) -> list[np.ndarray]:
    """As `life`, with torch's own distributed checkpoints."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
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
    weights = whole_weights(model)
    mesh.stop()
    return weights


@pytest.mark.parametrize("name", ["apollo", "galore", "sgd_sai"])
def test_through_torchs_distributed_checkpoints(name: str, tmp_path: Path) -> None:
    undisturbed = run_ranks(life, 2, name, None, range(12))[0]
    run_ranks(dcp_life, 2, name, str(tmp_path), range(6))
    resumed = run_ranks(dcp_life, 2, name, str(tmp_path), range(6, 12))[0]
    for found, expected in zip(resumed, undisturbed, strict=True):
        np.testing.assert_array_equal(found, expected)


def refused_life(saved: str, restoring: str, folder: str, rank: int) -> tuple[str, bool]:
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
    for message, unchanged in run_ranks(refused_life, 2, saved, restoring, str(tmp_path), 3):
        assert expected in message
        assert unchanged
