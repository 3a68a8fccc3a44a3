"""What is not in memory, as those see it who must have it there: a checkpoint, an evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class OutOfCore(Protocol):
    """An optimizer that keeps state, and perhaps its parameters' weights, outside of memory.

    In its `state` what is elsewhere is a tensor on the meta device, of the right shape, dtype and cut.
    """

    inner: torch.optim.Optimizer
    """The optimizer that computes the updates."""

    def settle(self) -> None:
        """Makes every update that was put off: weights and state are those of the last step."""
        ...

    def has_weights_elsewhere(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter's memory holds nothing now."""
        ...

    def weights_loaded(self, parameter: torch.Tensor, *, write: bool = False) -> AbstractContextManager[None]:
        """While it lasts the parameter's weights are in its memory; with `write`, what they are then is kept."""
        ...

    def state_loaded(self, parameter: torch.Tensor) -> AbstractContextManager[dict[str, Any]]:
        """While it lasts the parameter's state is in memory, as returned. Not to be changed."""
        ...

    def put_state(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Replaces the parameter's state; an empty one removes it."""
        ...
