"""The engine on torch's FSDP2: ZeRO stages, data parallelism and hybrid sharding, see `windlass.parallel.zero`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.config import ParallelConfig
from windlass.parallel.engine import StepInBackward
from windlass.parallel.mesh import Mesh, all_ranks_finite
from windlass.parallel.zero import Sharder, Unit


class FSDP2Engine:
    """Args:
    max_norm: of the gradients; None does not clip.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, config: ParallelConfig, mesh: Mesh, max_norm: float | None) -> None:
        self.mesh, self.max_norm = mesh, max_norm
        self.in_backward: StepInBackward | None = None
        self._sharder = Sharder(config, mesh)

    def shard(self, model: nn.Module, units: Sequence[Unit], dtype: torch.dtype) -> None:
        self._sharder.shard(model, units, dtype)
        self.model = model

    def take_optimizer(self, optimizer: torch.optim.Optimizer, in_backward: StepInBackward | None) -> None:
        self.optimizer, self.in_backward = optimizer, in_backward

    def begin_micro_step(self, is_last: bool) -> None:
        self._sharder.begin_micro_step(self.model, is_last)
        if self.in_backward is not None:
            self.in_backward.begin_micro_step(is_last)

    def backward(self, losses: Sequence[Tensor]) -> None:
        torch.autograd.backward(list(losses))

    def grad_norm(self) -> Tensor:
        if self.in_backward is None:
            return clip_grad_norm_(self.model.parameters(), self.max_norm, self.mesh)
        return self.in_backward.finish()  # the weights are updated, and no gradients are left

    def all_ranks_finite(self, grad_norm: Tensor) -> bool:
        return all_ranks_finite(grad_norm, self.mesh)

    def step(self) -> None:
        self.optimizer.step()  # brings state that is elsewhere, or leaves a layer's update to its next forward

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def free_gathered(self) -> None:
        self._sharder.free_gathered(self.model)

    def checkpointed(self) -> dict[str, Any]:
        objects: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.in_backward is not None:
            objects["in_backward"] = self.in_backward
        return objects
