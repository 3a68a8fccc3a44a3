"""What to change so that a run fits: the override that costs least time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from windlass.optim.config import ApolloConfig, InBackward
from windlass.train.config import ActivationCheckpoint
from windlass.train.machine import Machine
from windlass.train.plan import Plan, forecast

if TYPE_CHECKING:
    from windlass.conf.schema import Config


@dataclass(frozen=True)
class Fix:
    """Overrides to add, and what becomes of the run with them."""

    overrides: list[str]
    keeps_result: bool
    """Whether the run computes the same, but for rounding."""
    peak_bytes: float
    step_s: float


def cheapest_fix(config: Config, num_ranks: int, machine: Machine) -> Fix | None:
    """Of the overrides that make a run fit, the ones with the shortest step; None if none does.

    What changes the result of training is only proposed where nothing else fits.
    """
    for candidates, keeps_result in ((_same_result(config), True), (_other_result(config), False)):
        plans = ((overrides, forecast(changed, num_ranks, machine)) for overrides, changed in candidates)
        fixes = [_fix(overrides, plan, keeps_result) for overrides, plan in plans if plan.fits]
        if fixes:
            return min(fixes, key=lambda fix: fix.step_s)
    return None


def _fix(overrides: list[str], plan: Plan, keeps_result: bool) -> Fix:
    return Fix(overrides, keeps_result, plan.memory.peak.expected, plan.time.step.expected)


def _same_result(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Smaller micro-batches, more of them, and activations that are computed again."""
    train = config.train
    recomputes = {train.activation_checkpoint, ActivationCheckpoint.full}
    parts = 1
    while train.batch_size % parts == 0:
        for recompute in sorted(recomputes, reverse=True):
            overrides, changed = [], copy.deepcopy(config)
            fraction = train.activation_fraction if recompute == train.activation_checkpoint else None
            if recompute != train.activation_checkpoint:
                overrides.append(f"train.activation_checkpoint={recompute}")
            if fraction != train.activation_fraction:
                overrides.append("train.activation_fraction=null")
            if parts > 1:
                overrides.append(f"train.batch_size={train.batch_size // parts}")
                overrides.append(f"train.grad_accum_steps={train.grad_accum_steps * parts}")
            changed.train = replace(
                train,
                activation_checkpoint=recompute,
                activation_fraction=fraction,
                batch_size=train.batch_size // parts,
                grad_accum_steps=train.grad_accum_steps * parts,
            )
            if overrides:
                yield overrides, changed
        parts *= 2


def _other_result(config: Config) -> Iterator[tuple[list[str], Config]]:
    """The leanest of the above with less optimizer state, and with gradients that are used as they come."""
    *_, (overrides, leanest) = _same_result(config)
    for optim in (config.optim, ApolloConfig()):
        for in_backward in (config.optim.in_backward, InBackward.previous_norm):
            changed, more = copy.deepcopy(leanest), []
            changed.optim = replace(optim, in_backward=in_backward)
            if optim is not config.optim:
                more.append("optim=apollo")
            if in_backward != config.optim.in_backward:
                if config.train.max_norm is None:
                    continue
                more.append(f"optim.in_backward={in_backward}")
            if more:
                yield overrides + more, changed
