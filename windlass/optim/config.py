"""Which optimizer, and how its learning rate moves. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from windlass.errors import require

if TYPE_CHECKING:
    import torch

    from windlass.optim.scheduler import WarmupScheduler


class Schedule(StrEnum):
    """How the learning rate moves after warmup; see `windlass.optim.scheduler`."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass
class OptimConfig:
    """What every optimizer has: a learning rate and its schedule, and weight decay."""

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    """Decoupled. Matrices decay; norms (and every other 1-D parameter) do not."""
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2
    """WSD: the share of `train.steps` at the end over which the rate falls."""
    min_lr_ratio: float = 0.1
    """The rate at the last step over the peak rate."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "must be above 0 and finite", "set optim.lr=2e-3")
        for key in ("weight_decay", "warmup_steps"):
            value = getattr(self, key)
            require(value >= 0, f"optim.{key}", value, "must not be negative", f"set optim.{key}=0")
        for key in ("decay_fraction", "min_lr_ratio"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"optim.{key}", value, "must be in [0, 1]", f"set optim.{key}=0.1")

    def build(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        raise NotImplementedError(f"{type(self).__name__} does not say which optimizer it builds")

    def build_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> WarmupScheduler:
        from windlass.optim.scheduler import WarmupScheduler

        return WarmupScheduler(
            optimizer,
            schedule=self.schedule,
            num_steps=num_steps,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            min_lr_ratio=self.min_lr_ratio,
        )


@dataclass
class AdamWConfig(OptimConfig):
    """Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019); torch's fused kernel."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.betas) == 2, "optim.betas", self.betas, "must be two numbers", "set optim.betas=[0.9,0.95]")
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # OmegaConf gives tuples back as lists
        for beta in self.betas:
            require(
                0 <= beta < 1,
                "optim.betas",
                self.betas,
                "both must be in [0, 1)",
                "set optim.betas=[0.9,0.95]",
            )
        require(self.eps > 0, "optim.eps", self.eps, "must be above 0", "set optim.eps=1e-8")

    def build(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        from windlass.optim.adamw import build_adamw

        return build_adamw(self, named_parameters)
