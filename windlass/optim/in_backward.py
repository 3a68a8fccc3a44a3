"""The optimizer inside the backward pass: each gradient is used and freed as soon as it is whole.

Instead of all gradients, only a bucket of them is in memory. What is given up: the norm of all gradients is not known
when the first are used, so a step cannot be clipped by its own norm, nor skipped as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.optim.config import InBackward
from windlass.parallel.collectives import all_reduce
from windlass.parallel.fragment import local_tensor

BUCKET_NUMEL = 1 << 25
"""Gradient elements of a rank that are collected before they are used: 128 MiB in float32."""


class StepInBackward:
    """Makes the last backward pass of a step update the parameters of any `torch.optim.Optimizer`.

        in_backward = StepInBackward(optimizer)
        for i, batch in enumerate(batches):
            in_backward.begin_micro_step(is_last=i == len(batches) - 1)
            loss(batch).backward()
        grad_norm = in_backward.finish()

    After `finish` every parameter that had a gradient is updated and no gradient is left. Works with plain parameters
    and with FSDP2's, whose gradients arrive unit by unit. With several micro-steps the gradients of the earlier ones
    are kept as ever; only the last pass frees them.

    A bucket with a gradient that is not finite is updated as if its gradients were zero: its weights decay, or follow
    their momentum, at most; the other buckets' updates are made.

    Args:
        mode: `unclipped`, or `previous_norm`: gradients are scaled so that the norm would be at most `max_norm` if it
            were the last step's. (The norm-growth limiter of APOLLO works in either mode.)
        max_norm: for `previous_norm`.
        group: the ranks that together hold one model; None is this rank alone.
        bucket_numel: gradient elements of this rank that are collected before they are used.

    Raises:
        ValueError: `max_norm` is given and the mode does not say what is to become of it, or is missing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mode: InBackward = InBackward.unclipped,
        max_norm: float | None = None,
        group: dist.ProcessGroup | None = None,
        bucket_numel: int = BUCKET_NUMEL,
    ) -> None:
        if (max_norm is not None) != (mode == InBackward.previous_norm):
            raise ValueError(
                f"max_norm={max_norm} with mode={mode}: the norm of this step is not known before it is used; give "
                "max_norm with mode=previous_norm (clip by the norm of the step before), and only with it"
            )
        self.optimizer, self.max_norm, self.group, self.bucket_numel = optimizer, max_norm, group, bucket_numel
        self.before_update: Callable[[Iterable[Tensor]], None] | None = None
        """Called with the parameters that are about to be updated, e.g. to end a copy of them."""
        self._is_last = False
        self._bucket: dict[Tensor, None] = {}  # in the order of arrival, the same on all ranks
        self._numel = 0
        self._square_norm: Tensor | None = None
        self._previous_norm: Tensor | None = None
        parameters = [parameter for members in optimizer.param_groups for parameter in members["params"]]
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]

    def begin_micro_step(self, is_last: bool) -> None:
        """To be called before each backward pass; `is_last`: of the step's."""
        self._is_last = is_last

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Updates what is left, and ends the step.

        Returns:
            The norm of the step's gradients over all ranks, before clipping, 0-dim; not finite if any gradient was not.
        """
        self._flush()
        self._is_last = False
        if self._square_norm is None:
            return torch.zeros(())
        norm = self._square_norm.sqrt()
        self._square_norm = None
        self._previous_norm = torch.where(norm.isfinite(), norm, self._last_norm(norm))
        return norm

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"previous_norm": None if self._previous_norm is None else float(self._previous_norm)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        norm = state["previous_norm"]
        self._previous_norm = None if norm is None else torch.tensor(norm, dtype=torch.float64)

    def _last_norm(self, like: Tensor) -> Tensor:
        """Of the step before; 0, which clips nothing, at the first."""
        return torch.zeros_like(like) if self._previous_norm is None else self._previous_norm.to(like)

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        if not self._is_last:
            return
        assert parameter.grad is not None
        self._bucket[parameter] = None
        self._numel += local_tensor(parameter.grad).numel()
        if self._numel >= self.bucket_numel:
            self._flush()

    def _flush(self) -> None:
        gradients = [local_tensor(parameter.grad) for parameter in self._bucket if parameter.grad is not None]
        if not gradients:
            return
        square = torch.nn.utils.get_total_norm(gradients).double().square_()
        square = all_reduce(square, self.group)
        self._square_norm = square if self._square_norm is None else self._square_norm + square
        if self.max_norm is not None:
            scale = (self.max_norm / (self._last_norm(square) + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        broken = square.isfinite().logical_not_()
        for gradient in gradients:
            gradient.masked_fill_(broken, 0)  # on the device: no rank waits to learn whether there is anything to do
        self._step_bucket()
        self._bucket.clear()
        self._numel = 0

    def _step_bucket(self) -> None:
        """`optimizer.step` with the gradients of the bucket alone."""
        others = [
            (parameter, parameter.grad)
            for members in self.optimizer.param_groups
            for parameter in members["params"]
            if parameter.grad is not None and parameter not in self._bucket
        ]
        for parameter, _ in others:
            parameter.grad = None
        if self.before_update is not None:
            self.before_update(self._bucket)
        self.optimizer.step()
        for parameter in self._bucket:
            parameter.grad = None
        for parameter, gradient in others:
            parameter.grad = gradient
