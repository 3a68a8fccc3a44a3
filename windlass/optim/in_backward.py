"""The optimizer inside the backward pass: each gradient is used and freed as soon as it is whole.

Instead of all gradients, only a bucket of them is in memory. What is given up: the norm of all gradients is not known
when the first are used, so a step cannot be clipped by its own norm, nor skipped as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from windlass.errors import require
from windlass.optim.config import InBackward, OptimConfig
from windlass.parallel.clip_grad import each_norm, sum_over_shards
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
        bucket_numel: gradient elements of this rank that are collected before they are used.
        buckets: parameters that are updated together, as soon as all of them have their gradients; others as
            `bucket_numel` says. Weights are the same, to the bit, with any buckets.

    Raises:
        ValueError: `max_norm` is given and the mode does not say what is to become of it, or is missing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mode: InBackward = InBackward.unclipped,
        max_norm: float | None = None,
        bucket_numel: int = BUCKET_NUMEL,
        buckets: Iterable[Sequence[Tensor]] = (),
    ) -> None:
        if (max_norm is not None) != (mode == InBackward.previous_norm):
            raise ValueError(
                f"max_norm={max_norm} with mode={mode}: the norm of this step is not known before it is used; give "
                "max_norm with mode=previous_norm (clip by the norm of the step before), and only with it"
            )
        self.optimizer, self.max_norm, self.bucket_numel = optimizer, max_norm, bucket_numel
        self.before_update: Callable[[Iterable[Tensor]], None] | None = None
        """Called with the parameters that are about to be updated, e.g. to end a copy of them."""
        self._is_last = self._is_discarding = False
        self._parameters = [parameter for members in optimizer.param_groups for parameter in members["params"]]
        self._collected: dict[Tensor, None] = {}  # of no bucket; in the order of arrival, the same on all ranks
        self._numel = 0
        self._buckets = [list(members) for members in buckets]
        self._bucket_of = {parameter: number for number, members in enumerate(self._buckets) for parameter in members}
        self._missing = [set(members) for members in self._buckets]
        self._square_norms: dict[Tensor, Tensor] = {}  # parameter -> of this rank's part
        self._previous_norm: Tensor | None = None
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._parameters]

    def begin_micro_step(self, is_last: bool) -> None:
        """To be called before each backward pass; `is_last`: of the step's."""
        self._is_last = is_last

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Updates what is left, and ends the step.

        Returns:
            The norm of the step's gradients over all ranks, before clipping, 0-dim; not finite if any gradient was not.
        """
        self._use(self._collected)
        for number, missing in enumerate(self._missing):
            self._use([parameter for parameter in self._buckets[number] if parameter not in missing])
            self._missing[number] = set(self._buckets[number])
        self._collected, self._numel, self._is_last = {}, 0, False
        if not self._square_norms:
            return torch.zeros(())
        # In the parameters' order: the norm has the same bits in whatever order their gradients came.
        trained = [parameter for parameter in self._parameters if parameter in self._square_norms]
        norm = sum_over_shards(trained, [self._square_norms[parameter] for parameter in trained]).sqrt()
        self._square_norms = {}
        self._previous_norm = torch.where(norm.isfinite(), norm, self._last_norm(norm))
        return norm

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """While it lasts backward passes leave no gradients and update nothing."""
        self._is_discarding = True
        try:
            yield
        finally:
            self._is_discarding = False

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
        """The norm of the step before; 0, which clips nothing, at the first."""
        return torch.zeros_like(like) if self._previous_norm is None else self._previous_norm.to(like)

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self._is_discarding:
            parameter.grad = None
        elif self._is_last:
            number = self._bucket_of.get(parameter)
            if number is None:
                self._collect(parameter, parameter.grad)
                return
            self._missing[number].discard(parameter)
            if not self._missing[number]:
                self._use(self._buckets[number])
                self._missing[number] = set(self._buckets[number])

    def _collect(self, parameter: Tensor, gradient: Tensor) -> None:
        self._collected[parameter] = None
        self._numel += local_tensor(gradient).numel()
        if self._numel >= self.bucket_numel:
            self._use(self._collected)
            self._collected, self._numel = {}, 0

    def _use(self, parameters: Iterable[Tensor]) -> None:
        """Updates `parameters` and frees their gradients; those that have none are passed over."""
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if not trained:
            return
        gradients = [local_tensor(parameter.grad) for parameter in trained if parameter.grad is not None]
        squares = [norm.double().square() for norm in each_norm(gradients)]
        self._square_norms |= zip(trained, squares, strict=True)
        square = sum_over_shards(trained, squares)
        if self.max_norm is not None:
            scale = (self.max_norm / (self._last_norm(square) + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_(gradients, scale.float())
        broken = square.isfinite().logical_not_()
        for gradient in gradients:
            gradient.masked_fill_(broken, 0)  # on the device: no rank waits to learn whether there is anything to do
        self._step_on(trained)

    def _step_on(self, parameters: Sequence[Tensor]) -> None:
        """`optimizer.step` with the gradients of `parameters` alone."""
        chosen = set(parameters)
        others = [(p, p.grad) for p in self._parameters if p.grad is not None and p not in chosen]
        for parameter, _ in others:
            parameter.grad = None
        if self.before_update is not None:
            self.before_update(parameters)
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        for parameter, gradient in others:
            parameter.grad = gradient


def build_in_backward(
    config: OptimConfig,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    buckets: Sequence[Sequence[Tensor]] = (),
) -> StepInBackward | None:
    """Hooks that run `optimizer` in the backward pass, if that is configured.

    Args:
        buckets: parameters that are best updated together.

    Raises:
        ConfigError: gradients cannot be clipped as `max_norm` says.
    """
    if config.in_backward == InBackward.none:
        return None
    require(
        max_norm is None or config.in_backward == InBackward.previous_norm,
        "train.max_norm",
        max_norm,
        "cannot be kept with optim.in_backward=unclipped, which uses gradients before their norm is known",
        "set train.max_norm=null, or optim.in_backward=previous_norm to clip by the norm of the step before",
    )
    require(
        max_norm is not None or config.in_backward == InBackward.unclipped,
        "optim.in_backward",
        config.in_backward.value,
        "needs train.max_norm",
        "set train.max_norm=1.0, or optim.in_backward=unclipped",
    )
    return StepInBackward(optimizer, config.in_backward, max_norm, buckets=buckets)
