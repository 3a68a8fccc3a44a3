"""Warns of the learning rate where a run goes on with another schedule, or could: schedules end with the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from windlass.errors import ConfigError
from windlass.optim.config import MatrixConfig, OptimConfig, Schedule
from windlass.text import command, override

if TYPE_CHECKING:
    from windlass.checkpoint.durable.storage import Location
    from windlass.train.build import Run

TOLERANCE = 1e-3
"""Relative; rates that differ by less are the same to whoever reads them."""


def check_steps(run: Run) -> None:
    """Raises ConfigError if the run is further than its configuration says that it goes."""
    step, steps = run.state.step, run.config.train.steps
    if step > steps:
        lists = command("windlass", "ckpt", "list", run.config.run_dir)
        raise ConfigError(
            "train.steps",
            steps,
            f"the run has made {step} steps, and there is nothing to train",
            f"set train.steps={2 * step} to train on, or train.steps={step} to evaluate it as it is; "
            f"to go back, `{lists}` has what resume=PATH can begin from",
        )


def change_of_rate(run: Run, origin: Location) -> list[str]:
    """Warns of a rate that is not that which the attempt before would have had next.

    Args:
        origin: the checkpoint that was restored.
    """
    step, steps, optim = run.state.step, run.config.train.steps, run.config.optim
    pairs = list(zip(run.scheduler.rates_before or (), run.scheduler.get_last_lr(), strict=False))
    changed = [(before, float(now)) for before, now in pairs if not is_same(before, float(now))]
    if not changed or step == steps:  # nothing is trained
        return []
    before, now = changed[0]
    run.metrics.event("rate_changed", step, before=before, now=now)
    lines = [
        f"warning: the learning rate goes on at {now:.3g}, and was to go on at {before:.3g}: optim.lr={optim.lr:g} and "
        f"optim.schedule={optim.schedule} are laid over train.steps={steps}"
    ]
    if before > 0:
        begin = f"{override('resume', origin)} {at_constant(optim, before)}"
        lines.append(f"         to stay at {before:.3g}: another run_dir, {begin}")
    return lines


def how_to_go_on(run: Run) -> list[str]:
    """How a run that is done trains on, and at which rate."""
    scheduler, more, optim = run.scheduler, 2 * run.config.train.steps, run.config.optim
    peak, step = float(scheduler.base_lrs[0]), scheduler.last_epoch  # fewer than were made where some were skipped
    last, following = peak * scheduler.factor(step), peak * scheduler.over(more)(step)
    text = f"resume  the same command with train.steps={more} trains on from here"
    if is_same(last, following):
        return [text]
    why = f"optim.schedule={optim.schedule} is laid over train.steps"
    lines = [f"{text}, at a rate of {following:.3g} after {last:.3g}: {why}"]
    if last > 0:
        begin = f"{override('resume', run.config.run_dir)} train.steps={more}"
        lines.append(f"        to stay at {last:.3g}: another run_dir, {begin} {at_constant(optim, last)}")
    return lines


def is_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE)


def at_constant(optim: OptimConfig, rate: float) -> str:
    """The overrides that keep the rate of `optim.lr` where it is, and that of AdamW's parameters in its proportion."""
    overrides = [f"optim.schedule={Schedule.constant}", "optim.warmup_steps=0", f"optim.lr={rate:.6g}"]
    if isinstance(optim, MatrixConfig) and optim.adamw_lr is not None:
        overrides.append(f"optim.adamw_lr={rate * optim.adamw_lr / optim.lr:.6g}")
    return " ".join(overrides)
