"""Weights that are sharded twice, over FSDP2's axis and a tensor-parallel one, train and resume as those of one rank.

There is no `parallel=` for it yet: the test makes the mesh, and torch's `parallelize_module` shards the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.losses import count_tokens
from support.optimizers import gradient, parameters_of
from support.ranks import run_ranks
from support.toy import digest, ragged_batch, rows_of_rank, whole_weights
from support.trained import assert_finite, assert_moved
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.functional import cross_entropy

from windlass.checkpoint.manager import Checkpointer
from windlass.data.loader import IGNORE_INDEX
from windlass.optim.apollo import Apollo
from windlass.optim.config import AdamWConfig, InBackward, SGDSaIConfig
from windlass.optim.in_backward import StepInBackward
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import all_reduce
from windlass.parallel.config import Axis, Cut, ParallelConfig
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.fragment import local_tensor
from windlass.parallel.layout import layout_of
from windlass.parallel.mesh import Mesh, all_ranks_finite
from windlass.parallel.zero import Sharder, Unit
from windlass.train.agreement import StepAgreement
from windlass.train.signals import Request

VOCAB, WIDTH = 32, 8
NUM_STEPS = 4


class Network(nn.Module):
    """`up` and `down` are sharded over the tensor axis too, the rest over FSDP2's alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.down(torch.tanh(self.up(self.norm(hidden)))))


@dataclass(frozen=True)
class Job:
    optimizer: str = "adamw"
    cut: str = "longer_dim"
    num_tensor_ranks: int = 1
    in_backward: bool = False
    is_guest: bool = False
    """The checkpointer is given no mesh, as in a loop that makes torch's groups itself."""
    seed: int = 0


class Training:
    def __init__(self, job: Job) -> None:
        config = ParallelConfig(cut=Cut(job.cut))
        self.mesh = config.build(torch.device("cpu"))
        if job.num_tensor_ranks > 1:
            num_shards = self.mesh.world_size // job.num_tensor_ranks
            axes = {Axis.shard: num_shards, Axis.tensor: job.num_tensor_ranks}
            self.mesh = Mesh.lay_out(RankEnvironment.read(), axes, torch.device("cpu"))
        self.model, self.is_guest = Network(job.seed), job.is_guest
        if job.num_tensor_ranks > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.model, self.mesh.device_mesh[Axis.tensor.value], plan)
        sharder = Sharder(config, self.mesh)
        sharder.shard(self.model, [Unit([self.model.up, self.model.down])], torch.float32)
        optim = SGDSaIConfig(lr=1e-3) if job.optimizer == "sgd_sai" else AdamWConfig(lr=1e-2)
        self.optimizer = optim.build(self.model)
        self.in_backward = (
            StepInBackward(self.optimizer, InBackward.previous_norm, 0.5, bucket_numel=100) if job.in_backward else None
        )

    def steps(self, first: int, last: int) -> dict[str, Any]:
        losses, norms = [], []
        before = [local_tensor(parameter).clone() for parameter in self.model.parameters()]
        for step in range(first, last):
            batch = rows_of_rank(ragged_batch(step, 0, VOCAB), self.mesh)
            stop: Any = SimpleNamespace(asked=Request.nothing)
            num_tokens = StepAgreement(count_tokens([batch]), stop, self.mesh, 1, None).num_targets()
            if self.in_backward is not None:
                self.in_backward.begin_micro_step(is_last=True)
            logits = self.model(batch.input_ids).flatten(0, 1)
            loss_sum = cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            (loss_sum / num_tokens).backward()
            if self.in_backward is None:
                norm = clip_grad_norm_(self.model.parameters(), 0.5, self.mesh)
                assert all_ranks_finite(norm, self.mesh)
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                norm = self.in_backward.finish()
            norms.append(float(norm))
            losses.append(float(all_reduce(loss_sum.detach().double(), self.mesh.data_group)) / num_tokens)
        assert_finite(losses, last - first)
        assert_moved(before, map(local_tensor, self.model.parameters()))
        return {"losses": losses, "norms": norms}

    def checkpointer(self, folder: Path) -> Checkpointer:
        mesh = None if self.is_guest else self.mesh
        return Checkpointer({"model": self.model, "optimizer": self.optimizer}, folder, mesh)

    def digests(self) -> tuple[str, str]:
        moments = {
            f"{name}.{key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return digest(whole_weights(self.model)), digest(moments)


def train(job: Job, folder: Path | None = None) -> dict[str, Any]:
    training = Training(job)
    found = training.steps(0, NUM_STEPS)
    if folder is not None:
        training.checkpointer(folder).save(NUM_STEPS)
        found["digests"] = training.digests()
        found |= {"later": training.steps(NUM_STEPS, NUM_STEPS + 2)["losses"]}
    found["axes"] = {name: len(layout_of(parameter).splits) for name, parameter in training.model.named_parameters()}
    training.mesh.stop()
    return found


def resume(job: Job, folder: Path, save: bool) -> dict[str, Any]:
    """Goes on from the newest checkpoint with a model of another first seed; with `save` saves it again first."""
    training = Training(job)
    checkpointer = training.checkpointer(folder)
    assert checkpointer.restore_latest() is not None
    found: dict[str, Any] = {"digests": training.digests()}
    if save:
        checkpointer.save(NUM_STEPS + 1)
    found["later"] = training.steps(NUM_STEPS, NUM_STEPS + 2)["losses"]
    training.mesh.stop()
    return found


@pytest.mark.parametrize(
    "job",
    [
        Job(),
        pytest.param(Job(cut="dim0"), marks=pytest.mark.full),
        pytest.param(Job("sgd_sai"), marks=pytest.mark.full),
        pytest.param(Job(in_backward=True), marks=pytest.mark.full),
        pytest.param(Job(is_guest=True), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_two_axes_train_and_resume_as_one_rank_does(job: Job, tmp_path: Path) -> None:
    on_grid = replace(job, num_tensor_ranks=2)
    alone = run_ranks(train, 1, job, tmp_path / "alone")[0]
    grid = run_ranks(train, 4, on_grid, tmp_path / "grid")
    assert grid[0]["axes"]["up.weight"] == grid[0]["axes"]["down.weight"] == 2
    assert grid[0]["axes"]["head.weight"] == 1
    for result in grid:
        for key in ("losses", "norms", "later"):
            np.testing.assert_allclose(result[key], alone[key], rtol=1e-5, err_msg=key)
        assert result["digests"] == grid[0]["digests"]

    # On one axis, and from a checkpoint of that on two again.
    on_two = run_ranks(resume, 2, replace(job, seed=1), tmp_path / "grid", True)
    back = run_ranks(resume, 4, replace(on_grid, seed=1), tmp_path / "grid", False)
    for result in (*on_two, *back):
        assert result["digests"] == grid[0]["digests"]
        np.testing.assert_allclose(result["later"], alone["later"], rtol=1e-5)


PLACEMENTS: list[tuple[Placement, Placement]] = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(0)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    (Replicate(), Shard(1)),
    (Shard(0), Replicate()),
]
SHAPES = [(10, 12), (12, 10), (9, 7), (12, 6), (6, 12), (5, 9), (7, 8)]


def step_on_grid(kind: str) -> list[np.ndarray]:
    mesh = ParallelConfig().build(torch.device("cpu"))
    parameters = parameters_of(SHAPES)
    placements: list[Any] = [None] * len(SHAPES)
    if mesh.world_size > 1:
        axes = {Axis.shard: 2, Axis.tensor: 2}
        grid = Mesh.lay_out(RankEnvironment.read(), axes, torch.device("cpu")).device_mesh
        placements = [lambda tensor, p=p: distribute_tensor(tensor, grid, p) for p in PLACEMENTS]
    shard = [place or (lambda tensor: tensor) for place in placements]
    parameters = [nn.Parameter(place(p.detach())) for place, p in zip(shard, parameters, strict=True)]
    config = {"SGDSaI": SGDSaIConfig(lr=1e-2), "AdamW": AdamWConfig(lr=1e-2)}.get(kind)
    named = nn.ParameterDict({f"p{index}": parameter for index, parameter in enumerate(parameters)})
    optimizer = Apollo(parameters, lr=1e-2) if config is None else config.build(named)
    for step in range(NUM_STEPS):
        for index, (place, parameter) in enumerate(zip(shard, parameters, strict=True)):
            parameter.grad = place(gradient(tuple(parameter.shape), step, index))
        optimizer.step()
    weights = [(p.full_tensor() if mesh.world_size > 1 else p).detach().numpy().copy() for p in parameters]
    mesh.stop()
    return weights


@pytest.mark.parametrize(
    "kind", ["SGDSaI", pytest.param("AdamW", marks=pytest.mark.full), pytest.param("Apollo", marks=pytest.mark.full)]
)
def test_an_optimizer_of_two_axes_is_that_of_one_rank(kind: str) -> None:
    """Apollo's groups without a rank get its AdamW."""
    alone = run_ranks(step_on_grid, 1, kind)[0]
    for weights in run_ranks(step_on_grid, 4, kind):
        for found, expected in zip(weights, alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
