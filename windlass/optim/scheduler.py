"""Learning rates over a run: linear warmup, then constant, cosine or warmup-stable-decay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from windlass.optim.config import OptimConfig, Schedule


class WarmupScheduler(torch.optim.lr_scheduler.LambdaLR):
    """The peak rate of each param group times a factor of the step.

    - `constant`: 1 after warmup.
    - `cosine`: half a cosine from 1 to `min_lr_ratio` (SGDR: Stochastic Gradient Descent with Warm Restarts, 2017).
    - `wsd`: 1, then linear to `min_lr_ratio` over the last `decay_fraction` of the steps
      (MiniCPM: Unveiling the Potential of Small Language Models, 2024).

    The factor is a pure function of the step, so a resumed run needs nothing but its step: peak rates, length and
    shape are those that the scheduler was made with. So that nobody takes a jump for the old schedule, the state also
    says which rates it would have given next.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule,
        num_steps: int,
        warmup_steps: int,
        decay_fraction: float = 0.2,
        min_lr_ratio: float = 0.1,
    ) -> None:
        self.schedule = schedule
        self.num_steps = num_steps
        self.wanted_warmup_steps = warmup_steps
        self.warmup_steps = min(warmup_steps, num_steps)
        self.decay_fraction = decay_fraction
        self.min_lr_ratio = min_lr_ratio
        self.rates_before: list[float] | None = None
        """The rate of each param group that the newest loaded state would give the next update; None: unknown."""
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The factor for the update that follows `step` finished ones, in (0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == Schedule.constant:
            return 1.0
        decay_from = self.warmup_steps
        if self.schedule == Schedule.wsd:
            decay_from = max(decay_from, round(self.num_steps * (1 - self.decay_fraction)))
        if step < decay_from:
            return 1.0
        # The last update (step num_steps - 1) gets min_lr_ratio exactly.
        progress = min(1.0, (step - decay_from + 1) / max(1, self.num_steps - decay_from))
        shape = 1 - progress if self.schedule == Schedule.wsd else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape

    def over(self, num_steps: int) -> Callable[[int], float]:
        """`factor` as it is over another number of steps."""
        other = copy.copy(self)
        other.num_steps, other.warmup_steps = num_steps, min(self.wanted_warmup_steps, num_steps)
        return other.factor

    def state_dict(self) -> dict[str, Any]:
        """The number of updates that are behind, the one thing that the arguments do not say, and the next rates."""
        return {"step": self.last_epoch, "rates": [float(rate) for rate in self.get_last_lr()]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from that step, and gives the optimizer the rates of its next update."""
        step = state_dict["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"{step!r} is no step")
        self.last_epoch = step
        self._step_count = self.last_epoch + 1
        factor = self.factor(self.last_epoch)
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        rates = state_dict.get("rates")  # older checkpoints do not say
        if rates is not None and not (isinstance(rates, list) and all(type(rate) is float for rate in rates)):
            raise ValueError(f"{rates!r} are no rates")
        self.rates_before = rates


def build_scheduler(config: OptimConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> WarmupScheduler:
    """The schedule of a run of `num_steps`."""
    return WarmupScheduler(
        optimizer,
        schedule=config.schedule,
        num_steps=num_steps,
        warmup_steps=config.warmup_steps,
        decay_fraction=config.decay_fraction,
        min_lr_ratio=config.min_lr_ratio,
    )
