"""Finds the override that makes a run fit and costs least time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from windlass.machine.speeds import Machine
from windlass.offload.config import OffloadKind, WeightsPlace
from windlass.optim.config import ApolloConfig, InBackward
from windlass.plan.forecast import Plan, forecast_if_fits
from windlass.train.config import ActivationCheckpoint

if TYPE_CHECKING:
    from windlass.conf.schema import Config


MAX_NORM = 1.0
"""Where gradients are not clipped yet, and are to be by the norm of the step before."""

Candidate: TypeAlias = "tuple[list[str], Config]"
"""Overrides, and the configuration with them."""


@dataclass(frozen=True)
class Fix:
    """Overrides to add, and what becomes of the run with them."""

    overrides: list[str]
    keeps_result: bool
    """True if the run computes the same, but for rounding."""
    peak_bytes: float
    step_s: float


def cheapest_fix(config: Config, num_ranks: int, machine: Machine) -> Fix | None:
    """Overrides that make a run fit: the ones with the shortest step, of the first kind that has any, or None.

    The kinds, from the cheapest on: smaller passes; optimizer state on the disk; weights too. What changes the result
    of training is only proposed where none of these fits: gradients that are used as they come, then APOLLO.
    """
    for keeps_result, places in _kinds(config):
        fixes = [
            Fix(overrides, keeps_result, plan.memory.peak.expected, plan.time.step.expected)
            for candidates in places
            for overrides, plan in _fitting(candidates, num_ranks, machine)
        ]
        if fixes:
            return min(fixes, key=lambda fix: fix.step_s)
    return None


def _fitting(candidates: Sequence[Candidate], num_ranks: int, machine: Machine) -> Iterator[tuple[list[str], Plan]]:
    """Those that fit. The last takes the least memory, and is tried first: without it none of them does."""
    for number, (overrides, changed) in enumerate(reversed(candidates)):
        plan = forecast_if_fits(changed, num_ranks, machine)
        if plan is not None:
            yield overrides, plan
        elif number == 0:
            return


def _kinds(config: Config) -> Iterator[tuple[bool, list[list[Candidate]]]]:
    """Yields whether the result stays, and what to try: for each place of the state, the leanest candidate last."""
    yield True, [list(_smaller_passes(config))]
    for elsewhere in _elsewhere(config):
        leanest = _leanest(elsewhere)
        yield True, [[elsewhere] if leanest[0] == elsewhere[0] else [elsewhere, leanest]]
    places = [_leanest(([], config)), *(_leanest(elsewhere) for elsewhere in _elsewhere(config))]
    if config.optim.in_backward == InBackward.none:
        yield False, [[_in_backward(place)] for place in places]
    if not isinstance(config.optim, ApolloConfig):
        yield False, [list(_with_apollo(place)) for place in places]


def _elsewhere(config: Config) -> list[Candidate]:
    """Optimizer state on the disk, then weights too."""
    found, overrides, changed = [], [], config
    if changed.offload.name == OffloadKind.none:
        overrides = ["offload=ssd"]
        changed = replace(changed, offload=replace(changed.offload, name=OffloadKind.ssd))
        found.append((overrides, changed))
    if changed.offload.name == OffloadKind.ssd and changed.offload.weights == WeightsPlace.memory:
        changed = replace(changed, offload=replace(changed.offload, weights=WeightsPlace.streamed))
        found.append(([*overrides, "offload.weights=streamed"], changed))
    return found


def _in_backward(candidate: Candidate) -> Candidate:
    overrides, config = [*candidate[0], f"optim.in_backward={InBackward.previous_norm}"], candidate[1]
    train = config.train
    if train.max_norm is None:
        overrides.append(f"train.max_norm={MAX_NORM}")
        train = replace(train, max_norm=MAX_NORM)
    return overrides, replace(config, train=train, optim=replace(config.optim, in_backward=InBackward.previous_norm))


def _with_apollo(candidate: Candidate) -> Iterator[Candidate]:
    overrides, config = candidate
    optim = ApolloConfig(in_backward=config.optim.in_backward)
    changed = [*overrides, "optim=apollo"], replace(config, optim=optim)
    yield changed
    if optim.in_backward == InBackward.none:
        yield _in_backward(changed)


def _leanest(candidate: Candidate) -> Candidate:
    """The configuration with the smallest passes."""
    overrides, config = candidate
    *_, (more, changed) = [([], config), *_smaller_passes(config)]
    return [*overrides, *more], changed


def _smaller_passes(config: Config) -> Iterator[Candidate]:
    """Smaller micro-batches, more of them, and activations that are computed again."""
    train = config.train
    recomputes = {train.activation_checkpoint, ActivationCheckpoint.full}
    parts = 1
    while train.batch_size % parts == 0:
        for recompute in sorted(recomputes, key=lambda kind: kind == ActivationCheckpoint.full):
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
