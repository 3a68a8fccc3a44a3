"""The seam between ways of sharding and the loop: an engine spreads a step over ranks.

A step is: for each micro-batch `begin_micro_step`, a forward pass and `backward`; then `grad_norm`, the vote, `step`
and `zero_grad`. An engine is built for a mesh, shards a model while it has no storage, and is then given the optimizer
of what it has sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from windlass.parallel.zero import Unit


class StepInBackward(Protocol):
    """An optimizer that runs while gradients come, such as `windlass.optim.in_backward.StepInBackward`."""

    before_update: Callable[[Iterable[Tensor]], None] | None

    def begin_micro_step(self, is_last: bool) -> None: ...

    def discarding(self) -> AbstractContextManager[None]: ...

    def finish(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine(Protocol):
    """A model over the ranks of a mesh, and its optimizer."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def in_backward(self) -> StepInBackward | None:
        """The hooks that update weights in the backward pass; None where `step` does."""
        ...

    def shard(self, model: nn.Module, units: Sequence[Unit], dtype: torch.dtype) -> None:
        """Shards `model` in place; it may be on the meta device. Its passes run in `dtype`."""
        ...

    def take_optimizer(self, optimizer: torch.optim.Optimizer, in_backward: StepInBackward | None) -> None:
        """Takes what updates the parameters of the model that was sharded."""
        ...

    def begin_micro_step(self, is_last: bool) -> None:
        """To be called before each forward pass of a step; `is_last`: of its micro-steps."""
        ...

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Runs the backward pass of the losses of one forward pass; gradients are summed over micro-steps and ranks."""
        ...

    def grad_norm(self) -> Tensor:
        """Clips the gradients of the step.

        Returns:
            Their norm before, over all ranks, 0-dim; not finite if any gradient was not. With `in_backward` the weights
            are updated by now.
        """
        ...

    def all_ranks_finite(self, grad_norm: Tensor) -> bool:
        """True if the gradients are finite on all ranks: one host sync."""
        ...

    def step(self) -> None:
        """Updates the weights."""
        ...

    def zero_grad(self) -> None:
        """Frees the gradients."""
        ...

    def free_gathered(self) -> None:
        """Frees weights that a forward pass without a backward one (an evaluation) left gathered."""
        ...

    def checkpointed(self) -> dict[str, Any]:
        """The objects that a checkpoint holds, by name: modules, optimizers and others with a `state_dict`."""
        ...
