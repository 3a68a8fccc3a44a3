"""A small model and ragged batches, trained for a few steps on any layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from support.losses import count_tokens, forward_loss_sum
from support.trained import assert_finite, assert_moved
from windlass.conf.schema import schema_of
from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.models.config import LlamaConfig
from windlass.models.llama import Llama
from windlass.optim.config import InBackward
from windlass.optim.in_backward import StepInBackward
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import COMM, all_reduce
from windlass.parallel.config import Cut, ParallelConfig, Sharding
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh
from windlass.parallel.zero import Sharder


@dataclass(frozen=True)
class Layout:
    """What a toy run varies."""

    sharding: str = "zero3"
    cut: str = "longer_dim"
    num_replicas: int | None = None
    grad_accum_steps: int = 3
    max_norm: float | None = 0.5
    dtype: str = "float32"
    tie_embeddings: bool = False
    recompute: bool = False
    hidden_size: int = 48
    vocab_size: int = 96
    num_layers: int = 2
    optimizer: str = "adamw"
    """A name of `optim=`; torch's AdamW at its default rate, or windlass's at a tenth of theirs."""
    in_backward: str = "none"

    def model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_layers=self.num_layers,
            num_heads=4,
            num_kv_heads=2,
            tie_embeddings=self.tie_embeddings,
        )

    def parallel_config(self) -> ParallelConfig:
        return ParallelConfig(name=Sharding(self.sharding), cut=Cut(self.cut), num_replicas=self.num_replicas)


GLOBAL_ROWS = 4
"""Sequences a micro-step, over all ranks."""
SEQ_LEN = 16


def ragged_batch(step: int, micro_step: int, vocab_size: int) -> Batch:
    """The global micro-batch: rows of several documents, very unequal numbers of labels that count."""
    generator = torch.Generator().manual_seed(1000 * step + micro_step)
    tokens = torch.randint(0, vocab_size, (GLOBAL_ROWS, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(GLOBAL_ROWS):
        kept = int(torch.randint(1, SEQ_LEN, (), generator=generator))
        labels[row, kept:] = IGNORE_INDEX
    document_ids = torch.randint(0, 2, (GLOBAL_ROWS, SEQ_LEN), generator=generator).cumsum(1).int()
    return Batch(tokens[:, :-1], labels, document_ids)


def rows_of_rank(batch: Batch, mesh: Mesh) -> Batch:
    rows = GLOBAL_ROWS // mesh.num_data_ranks
    mine = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    return Batch(batch.input_ids[mine], batch.labels[mine], batch.document_ids[mine])


def build(layout: Layout, mesh: Mesh, seed: int = 0) -> tuple[Llama, Sharder, torch.optim.Optimizer]:
    dtype = getattr(torch, layout.dtype)
    model = layout.model_config().build()
    model.prepare(dtype, layout.recompute, compile_blocks=False)
    sharder = Sharder(layout.parallel_config(), mesh)
    sharder.shard(model, model.units(), dtype)
    model.materialize(mesh.device, seed)
    return model, sharder, build_optimizer(layout, model)


def build_optimizer(layout: Layout, model: Llama) -> torch.optim.Optimizer:
    if layout.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True)
    schema = schema_of("optim", layout.optimizer)
    settings = {"update_interval": 2} if "update_interval" in schema.__dataclass_fields__ else {}
    if layout.optimizer == "cosmos":
        settings["rank"] = 8  # with all directions Adam's part has the empty ones, and brings rounding to full size
    config = schema(name=layout.optimizer, **settings)
    config.lr /= 10
    return config.build(model)


def train_steps(
    layout: Layout, mesh: Mesh, model: Llama, sharder: Sharder, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    """Losses of the steps, as the loop computes them."""
    losses: list[float] = []
    before = [local_tensor(parameter).clone() for parameter in model.parameters()]
    in_backward = make_in_backward(layout, optimizer)
    for step in steps:
        batches = [rows_of_rank(ragged_batch(step, i, layout.vocab_size), mesh) for i in range(layout.grad_accum_steps)]
        num_tokens = int(all_reduce(torch.tensor(count_tokens(batches)), mesh.data_group))
        total = torch.zeros(())
        for i, batch in enumerate(batches):
            sharder.begin_micro_step(model, is_last=i == len(batches) - 1)
            if in_backward is not None:
                in_backward.begin_micro_step(is_last=i == len(batches) - 1)
            loss_sum = forward_loss_sum(model, batch, mask_documents=True)
            (loss_sum / num_tokens).backward()
            total += loss_sum.detach()
        if in_backward is None:
            clip_grad_norm_(model.parameters(), layout.max_norm, mesh)
            optimizer.step()
        else:
            in_backward.finish()
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(all_reduce(total.double(), mesh.data_group)) / num_tokens)
    assert_finite(losses, len(steps))
    assert_moved(before, map(local_tensor, model.parameters()))
    return losses


def make_in_backward(layout: Layout, optimizer: torch.optim.Optimizer) -> StepInBackward | None:
    mode = InBackward(layout.in_backward)
    # Small buckets, so that a step has several.
    return None if mode == InBackward.none else StepInBackward(optimizer, mode, layout.max_norm, bucket_numel=5000)


def whole_weights(model: Llama) -> dict[str, torch.Tensor]:
    """Every global weight. Collective where the model is cut."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def digest(weights: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(weights):
        hasher.update(name.encode())
        hasher.update(weights[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def toy_run(layout: Layout, num_steps: int) -> dict[str, Any]:
    """A whole toy run on this rank: losses, final weights, bytes carried, and bytes of parameters held."""
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, sharder, optimizer = build(layout, mesh)
    before = dict(COMM.bytes_by_kind)
    losses = train_steps(layout, mesh, model, sharder, optimizer, range(num_steps))
    carried = {kind: value - before.get(kind, 0) for kind, value in COMM.bytes_by_kind.items()}
    weights = whole_weights(model)
    result = {
        "losses": losses,
        "weights": {name: value.numpy() for name, value in weights.items()} if mesh.rank == 0 else None,
        "carried": carried,
        "has_group": mesh.world is not None,
        "local_numel": sum(local_tensor(parameter).numel() for parameter in model.parameters()),
    }
    mesh.stop()
    return result
