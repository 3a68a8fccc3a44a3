"""The ways to train that `loop.py` compares: windlass's own loop, and the peers' as their users write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from windlass.conf.schema import Config
from windlass.conf.store import to_plain
from windlass.data.batch import IGNORE_INDEX
from windlass.data.shards import TokenDataset
from windlass.models.llama import Llama
from windlass.observe.console import SilentConsole
from windlass.observe.metrics import Metrics
from windlass.observe.watchdog import Heartbeat
from windlass.optim.scheduler import build_scheduler
from windlass.parallel.mesh import Mesh
from windlass.train.build import Run, TrainState, build_loader, build_parts
from windlass.train.loop import train
from windlass.train.signals import Request, StopRequest

MAX_NORM = 1.0
NUM_SYNTHETIC_BATCHES = 8

Tokens = tuple[torch.Tensor, torch.Tensor]
"""input_ids and labels, int64 (batch, seq_len)."""


class Variant(Protocol):
    """One way to train."""

    def run(self, num_steps: int) -> list[float]:
        """Trains for `num_steps` and returns the losses that it has looked at."""
        ...

    def close(self) -> None: ...


class LossConsole(SilentConsole):
    """Keeps the losses that the loop shows."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def update(self, record: Mapping[str, Any]) -> None:
        if "train/loss" in record:
            self.losses.append(record["train/loss"])


class StopAtStep(StopRequest):
    """Ends the loop after `last_step`, as a signal would; the next call of `train` goes on from there."""

    def __init__(self, state: TrainState, last_step: int) -> None:
        super().__init__()
        self.state, self.last_step = state, last_step

    @property
    def asked(self) -> Request:
        return Request.stop if self.state.step + 1 >= self.last_step else Request.nothing


class Windlass:
    """The framework's loop on a run that is put together as `windlass.train.session` does."""

    def __init__(self, config: Config, mesh: Mesh, tokens: Path) -> None:
        datasets = TokenDataset(tokens, "train"), TokenDataset(tokens, "validation")
        torch.manual_seed(config.train.seed)
        parts = build_parts(config, mesh, None)
        self.console = LossConsole()
        self.loop_run = Run(
            config=config,
            mesh=mesh,
            model=parts.model,
            objective=parts.objective,
            engine=parts.engine,
            tiers=None,
            scheduler=build_scheduler(config.optim, parts.optimizer, config.train.steps),
            data=build_loader(config, datasets[0], mesh, parts.objective),
            validation=datasets[1],
            state=TrainState(),
            checkpoint=None,
            metrics=Metrics(
                Path(config.run_dir),
                config.metrics,
                rank=mesh.rank,
                total_steps=config.train.steps,
                log_every=config.train.log_every,
                flops_per_token=flops_per_token(config),
                peak_flops=config.metrics.peak_flops,
                run_config=to_plain(config),
            ),
            console=self.console,
        )

    def run(self, num_steps: int) -> list[float]:
        self.console.losses.clear()
        state = self.loop_run.state
        train(self.loop_run, StopAtStep(state, state.step + num_steps), Heartbeat())
        return list(self.console.losses)

    def close(self) -> None:
        self.loop_run.data.close()
        self.loop_run.metrics.close()


class Bare:
    """A loop as one writes it after PyTorch's FSDP2 tutorial; without FSDP on one rank."""

    def __init__(self, config: Config, mesh: Mesh, batches: Iterator[Tokens]) -> None:
        self.config, self.batches = config, batches
        self.model = whole_model(config)
        if mesh.device_mesh is not None:
            mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            policy = mixed if config.train.dtype == "bfloat16" else MixedPrecisionPolicy()
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh.device_mesh, mp_policy=policy)
            fully_shard(self.model, mesh=mesh.device_mesh, mp_policy=policy)
        self.optimizer = plain_adamw(config, self.model)

    def run(self, num_steps: int) -> list[float]:
        accumulate = self.config.train.grad_accum_steps
        losses = []
        for _ in range(num_steps):
            step_loss = 0.0
            for _ in range(accumulate):
                input_ids, labels = next(self.batches)
                loss = mean_loss(self.model(input_ids), labels) / accumulate
                loss.backward()
                step_loss += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            if isinstance(norm, DTensor):
                norm = norm.full_tensor()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(step_loss)
        return losses

    def close(self) -> None:
        pass


class DeepSpeed:
    """DeepSpeed's engine with ZeRO-3; `strict` frees weights after each use, whatever their size."""

    def __init__(self, config: Config, batches: Iterator[Tokens], strict: bool = False) -> None:
        import deepspeed

        self.config, self.batches = config, batches
        zero: dict[str, Any] = {"stage": 3}
        if strict:
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
            zero |= {"stage3_max_reuse_distance": 0}
        settings = {
            "train_micro_batch_size_per_gpu": config.train.batch_size,
            "gradient_accumulation_steps": config.train.grad_accum_steps,
            "gradient_clipping": MAX_NORM,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.train.dtype == "bfloat16"},
            "steps_per_print": 1_000_000_000,
        }
        model = whole_model(config)
        self.engine = deepspeed.initialize(
            model=model, optimizer=plain_adamw(config, model), config=settings, dist_init_required=False
        )[0]

    def run(self, num_steps: int) -> list[float]:
        accumulate = self.config.train.grad_accum_steps
        losses = []
        for _ in range(num_steps):
            step_loss = 0.0
            for _ in range(accumulate):
                input_ids, labels = next(self.batches)
                loss = mean_loss(self.engine(input_ids), labels)
                self.engine.backward(loss)
                self.engine.step()
                step_loss += loss.item() / accumulate
            losses.append(step_loss)
        return losses

    def close(self) -> None:
        self.engine.destroy()


def whole_model(config: Config) -> Llama:
    """The same weights as windlass's run has, uncut."""
    model = config.model.build()
    assert isinstance(model, Llama)
    model.prepare(getattr(torch, config.train.dtype.value), recompute=False, compile_blocks=False)
    model.materialize(torch.device("cpu"), config.train.seed)
    return model


def plain_adamw(config: Config, model: Llama) -> torch.optim.AdamW:
    optim: Any = config.optim
    return torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def synthetic_batches(config: Config, rank: int) -> Iterator[Tokens]:
    """Endless random tokens that cost nothing to get."""
    generator = torch.Generator().manual_seed(rank)
    shape = (NUM_SYNTHETIC_BATCHES, config.train.batch_size, config.train.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size or 0, shape, generator=generator)
    pairs = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
    while True:
        yield from pairs


def real_batches(config: Config, mesh: Mesh, tokens: Path) -> Iterator[Tokens]:
    """What windlass's loop gets too, read by a loader of its own."""
    loader = build_loader(config, TokenDataset(tokens, "train"), mesh, config.objective.build())
    try:
        for batch in loader:
            assert not (batch.labels == IGNORE_INDEX).any(), "a mean over ranks needs equal token counts"
            yield batch.input_ids, batch.labels
    finally:
        loader.close()


def flops_per_token(config: Config) -> float:
    return config.model.build().flops_per_token(config.train.seq_len)


def peer(name: str, config: Config, mesh: Mesh, batches: Iterator[Tokens]) -> Variant:
    if name.startswith("deepspeed"):
        return DeepSpeed(config, batches, strict=name.endswith("strict"))
    return Bare(config, mesh, batches)
