"""Toy runs whose state and weights are in tiers: what `windlass train` builds, stepped by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.losses import count_tokens, forward_loss_sums
from support.toy import GLOBAL_ROWS, SEQ_LEN, ragged_batch, rows_of_rank
from support.trained import assert_finite, assert_moved
from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.data.batch import Batch
from windlass.models.llama import Llama
from windlass.models.spec import Model
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tiers import OffloadFigures, Tiers
from windlass.offload.weights import Weights
from windlass.parallel.collectives import all_reduce
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh
from windlass.train.build import build_parts, build_tiers

VOCAB = 97
"""Not even, so that FSDP2 cuts the embedding unevenly."""
TOY = (
    f"model.vocab_size={VOCAB}",
    "model.hidden_size=96",
    "model.intermediate_size=192",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    f"train.batch_size={GLOBAL_ROWS}",
    f"train.seq_len={SEQ_LEN}",
    "train.max_norm=0.5",
    "train.device=cpu",
    "checkpoint=none",
)
"""Layers of 0.9 MB of AdamW's state, of which all matrices but keys' and values' are large enough to be moved."""
STREAMED = ("offload=ssd", "offload.weights=streamed", "offload.buffer_bytes=1048576")


@dataclass
class Outcome:
    """What a run of some steps has come to, on this rank."""

    losses: list[float]
    """Of each step, then of an evaluation."""
    weights: list[Tensor]
    state: dict[str, Any] | None
    """The optimizer's; None over several ranks."""


class TieredRun:
    """A model in tiers, as overrides of the configuration say.

    Args:
        frozen: layers that are not trained.
        device: of the model.
        mesh: None: the ranks join for this run, and part at its end.
    """

    def __init__(
        self,
        run_dir: Path,
        overrides: Sequence[str],
        is_fused: bool | None = None,
        frozen: Sequence[int] = (),
        device: str = "cpu",
        mesh: Mesh | None = None,
    ) -> None:
        self.config: Config = compose([*TOY, f"run_dir={run_dir}", *overrides])
        self.mesh: Mesh = self.config.parallel.build(torch.device(device)) if mesh is None else mesh
        self._owns_mesh = mesh is None
        self.tiers: Tiers | None = build_tiers(self.config, self.mesh)
        self.model: Llama

        def give_weights(model: Model, weights: Weights | None) -> None:
            assert isinstance(model, Llama)
            model.materialize(self.mesh.device, self.config.train.seed, None if weights is None else weights.add)
            for number in frozen:
                model.layers[number].requires_grad_(False)

        self.parts = build_parts(self.config, self.mesh, self.tiers, give_weights=give_weights)
        assert isinstance(self.parts.model, Llama)
        self.model, self.optimizer = self.parts.model, self.parts.optimizer
        self.in_backward = self.parts.engine.in_backward
        is_streaming = self.tiers is not None and self.tiers.weights is not None
        self.is_fused = is_streaming if is_fused is None else is_fused
        self.steps_taken = 0

    def batches(self) -> list[Batch]:
        count = self.config.train.grad_accum_steps
        batches = [rows_of_rank(ragged_batch(self.steps_taken, index, VOCAB), self.mesh) for index in range(count)]
        return [batch.to(self.mesh.device) for batch in batches]

    def step(self) -> float:
        """One step of the training loop; returns its loss."""
        batches = self.batches()
        num_tokens = int(all_reduce(torch.tensor(count_tokens(batches)), self.mesh.data_group))
        passes = [batches] if self.is_fused else [[batch] for batch in batches]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, micro_batches in enumerate(passes):
            self.parts.engine.begin_micro_step(is_last=number == len(passes) - 1)
            loss_sums = forward_loss_sums(self.model, micro_batches, mask_documents=True)
            torch.autograd.backward([loss_sum / num_tokens for loss_sum in loss_sums])
            for loss_sum in loss_sums:
                total += loss_sum.detach().double()
        self.parts.engine.grad_norm()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_taken += 1
        return float(all_reduce(total, self.mesh.data_group)) / num_tokens

    @torch.no_grad()
    def evaluate(self) -> float:
        loss = float(forward_loss_sums(self.model, self.batches()[:1], mask_documents=True)[0])
        self.parts.engine.free_gathered()
        return loss

    def settle(self) -> None:
        """Makes what was put off."""
        if isinstance(self.optimizer, OffloadedOptimizer):
            self.optimizer.settle()

    def weights(self) -> list[Tensor]:
        """This rank's part of every weight."""
        self.settle()
        found = []
        for parameter in self.model.parameters():
            if isinstance(self.optimizer, OffloadedOptimizer):
                with self.optimizer.weights_loaded([parameter]):
                    found.append(local_tensor(parameter).clone())
            else:
                found.append(local_tensor(parameter).clone())
        return found

    def close(self) -> None:
        if self.tiers is not None:
            self.tiers.close()
        if self._owns_mesh:
            self.mesh.stop()


def tiered_run(
    run_dir: Path,
    overrides: Sequence[str],
    num_steps: int = 4,
    is_fused: bool | None = None,
    device: str = "cpu",
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains, looks at the validation loss in between, and goes on."""
    run = TieredRun(run_dir, overrides, is_fused, device=device, mesh=mesh)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    outcome, before = Outcome([], [], None), run.weights()
    for number in range(num_steps):
        outcome.losses.append(run.step())
        schedule.step()
        if number == num_steps // 2:
            outcome.losses.append(run.evaluate())
    outcome.weights = run.weights()
    assert_finite(outcome.losses, num_steps + 1)
    assert_moved(before, outcome.weights)
    if run.mesh.world_size == 1:
        outcome.state = run.optimizer.state_dict()
    run.close()
    return outcome


def large_numel(run: TieredRun) -> int:
    """Elements of this rank's parameters that are large enough to be moved."""
    assert isinstance(run.optimizer, OffloadedOptimizer)
    return sum(local_tensor(p).numel() for bucket in run.optimizer.bucket_parameters() for p in bucket)


def bytes_a_step(run: TieredRun, num_steps: int = 3) -> OffloadFigures:
    """What steps read and write, from the middle of one to the middle of another, once all files have data."""
    assert run.tiers is not None
    for _ in range(2):
        run.step()
    await_transfers(run.tiers)
    before = run.tiers.figures
    for _ in range(num_steps):
        run.step()
    await_transfers(run.tiers)
    moved = run.tiers.figures.since(before)
    return OffloadFigures(0.0, moved.read_bytes // num_steps, moved.write_bytes // num_steps)


def await_transfers(tiers: Tiers) -> None:
    """Returns when the disk is idle, and as much was read ahead as there is room for.

    When a write ends, and so makes room, a clock decides: what is counted should not.
    """
    assert tiers.folder is not None and tiers.optimizer is not None
    for _ in range(2):
        for file in tiers.folder._files:
            for transfer in (file._write, *file._reads):
                transfer.settle()
        tiers.optimizer.look_ahead()
