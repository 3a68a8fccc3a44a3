"""What is said where a learning rate would jump, and that what is advised instead keeps it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import runs

from windlass.errors import EXIT_DONE, ConfigError
from windlass.optim.config import AdamWConfig, MuonConfig, OptimConfig, Schedule
from windlass.optim.scheduler import build_scheduler
from windlass.train import rates


def make_run(optim: OptimConfig, steps: int, step: int, state: dict[str, Any] | None = None) -> Any:
    """What is used of a `Run`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = build_scheduler(optim, optimizer, steps)
    scheduler.load_state_dict({"step": step} if state is None else state)
    events: list[tuple] = []
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(steps=steps), optim=optim, run_dir="runs/a"),
        state=SimpleNamespace(step=step),
        scheduler=scheduler,
        events=events,
        metrics=SimpleNamespace(event=lambda kind, step, **fields: events.append((kind, step, fields))),
    )


def resumed(before: OptimConfig, steps: int, step: int, now: OptimConfig, new_steps: int) -> Any:
    return make_run(now, new_steps, step, make_run(before, steps, step).scheduler.state_dict())


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.wsd])
@pytest.mark.parametrize(("steps", "step"), [(10, 10), (10, 9), (40, 9)])
def test_a_schedule_over_other_steps_is_said(schedule: Schedule, steps: int, step: int) -> None:
    optim = AdamWConfig(lr=0.002, warmup_steps=2, schedule=schedule)
    run = resumed(optim, steps, step, optim, 20)
    before, now = run.scheduler.rates_before[0], run.scheduler.get_last_lr()[0]
    lines = rates.change_of_rate(run, Path("runs/a/checkpoints/step-00000010"))
    if before == now:  # both are in the stable part of wsd
        assert schedule == Schedule.wsd and steps == 40 and lines == []
        return
    assert lines[0].startswith(f"warning: the learning rate goes on at {now:.3g}, and was to go on at {before:.3g}: ")
    assert "train.steps=20" in lines[0] and f"to stay at {before:.3g}: another run_dir, resume=runs/a/" in lines[1]
    assert run.events == [("rate_changed", step, {"before": before, "now": now})]


def test_another_peak_is_said_and_a_fall_to_zero_has_no_rate_to_stay_at() -> None:
    before, now = (AdamWConfig(lr=lr, warmup_steps=0, min_lr_ratio=0.0) for lr in (0.002, 0.004))
    assert len(rates.change_of_rate(resumed(before, 10, 5, now, 10), Path("a"))) == 2
    assert len(rates.change_of_rate(resumed(before, 10, 10, now, 20), Path("a"))) == 1


def test_the_same_rates_are_not_spoken_of() -> None:
    optim = AdamWConfig(lr=0.002, warmup_steps=2)
    constant = AdamWConfig(lr=0.002, warmup_steps=2, schedule=Schedule.constant)
    assert rates.change_of_rate(resumed(optim, 10, 7, optim, 10), Path("a")) == []
    assert rates.change_of_rate(resumed(optim, 10, 10, optim, 10), Path("a")) == []
    assert rates.change_of_rate(resumed(constant, 10, 10, constant, 20), Path("a")) == []
    assert rates.change_of_rate(make_run(optim, 10, 7), Path("a")) == [], "an older checkpoint does not say"
    assert len(rates.how_to_go_on(make_run(constant, 10, 10))) == 1


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.wsd])
def test_a_run_that_is_done_says_at_which_rate_it_would_go_on(schedule: Schedule) -> None:
    optim = MuonConfig(lr=0.02, adamw_lr=0.004, warmup_steps=2, schedule=schedule)
    run = make_run(optim, 10, 10)
    following = resumed(optim, 10, 10, optim, 20).scheduler.get_last_lr()[0]
    first, second = rates.how_to_go_on(run)
    assert first.startswith("resume  the same command with train.steps=20 trains on from here, ")
    assert f"at a rate of {following:.3g} after 0.002: " in first
    assert second.endswith(
        "resume=runs/a train.steps=20 optim.schedule=constant optim.warmup_steps=0 optim.lr=0.002 optim.adamw_lr=0.0004"
    )


def test_fewer_steps_than_are_made_are_refused_with_what_helps() -> None:
    optim = AdamWConfig()
    rates.check_steps(make_run(optim, 6, 6))
    with pytest.raises(ConfigError) as caught:
        rates.check_steps(make_run(optim, 3, 6))
    assert "train.steps=3: the run has made 6 steps" in str(caught.value)
    assert "set train.steps=12 to train on, or train.steps=6 to evaluate" in str(caught.value)
    assert "`windlass ckpt list runs/a`" in str(caught.value)


def rate_of(config: runs.Config) -> dict[int, float]:
    return {record["step"]: record["optim/lr"] for record in runs.metrics(config) if "optim/lr" in record}


@pytest.mark.slow
def test_what_a_run_advises_keeps_the_rate_and_more_steps_of_the_same_are_a_jump_that_is_said(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", "train.steps=4", "optim.warmup_steps=0")
    assert runs.run(config, 1) == [EXIT_DONE]
    advice = next(line for line in runs.output(config).splitlines() if "to stay at" in line)
    other = runs.run_config(tmp_path, "other", *advice.partition("another run_dir, ")[2].split())
    assert runs.run(other, 1) == [EXIT_DONE]
    assert "learning rate" not in runs.output(other)
    assert list(rate_of(other)) == [5, 6, 7, 8]
    assert list(rate_of(other).values()) == pytest.approx([rate_of(config)[4]] * 4)
    config.train.steps = 8
    assert runs.run(config, 1) == [EXIT_DONE]
    jumped = rate_of(config)
    assert jumped[5] > 3 * jumped[4]
    assert f"goes on at {jumped[5]:.3g}, and was to go on at {jumped[4]:.3g}" in runs.output(config)
    config.train.steps = 5
    assert "set train.steps=16 to train on, or train.steps=8 to evaluate it as it is" in runs.refused(config)
