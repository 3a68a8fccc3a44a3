from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.optim.config import Schedule
from windlass.optim.scheduler import WarmupScheduler

PEAK = 0.25


def make(
    schedule: Schedule, num_steps: int = 100, warmup_steps: int = 10, peak: float | torch.Tensor = PEAK, **shape: float
) -> tuple[torch.optim.Optimizer, WarmupScheduler]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = WarmupScheduler(optimizer, schedule=schedule, num_steps=num_steps, warmup_steps=warmup_steps, **shape)
    return optimizer, scheduler


def rates(optimizer: torch.optim.Optimizer, scheduler: WarmupScheduler, num_steps: int) -> list[float]:
    """The rate of each of the next updates."""
    result = []
    for _ in range(num_steps):
        result.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warmup_is_linear_and_its_first_update_counts(schedule: Schedule) -> None:
    values = rates(*make(schedule), 10)
    assert values == pytest.approx([PEAK * (step + 1) / 11 for step in range(10)])


def test_constant_stays_at_the_peak() -> None:
    assert rates(*make(Schedule.constant), 100)[10:] == [PEAK] * 90


def test_cosine_falls_to_the_least_rate_at_the_last_update() -> None:
    values = rates(*make(Schedule.cosine, min_lr_ratio=0.1), 100)
    assert values[-1] == pytest.approx(0.1 * PEAK)
    after_warmup = values[10:]
    assert after_warmup == sorted(after_warmup, reverse=True)
    assert after_warmup[0] > 0.999 * PEAK
    assert after_warmup[44] == pytest.approx(0.55 * PEAK)  # half way down, after half of its 90 steps


def test_wsd_is_stable_and_then_linear() -> None:
    values = rates(*make(Schedule.wsd, decay_fraction=0.2, min_lr_ratio=0.1), 100)
    assert values[10:80] == [PEAK] * 70
    assert values[-1] == pytest.approx(0.1 * PEAK)
    falls = [before - after for before, after in itertools.pairwise(values[79:])]
    assert falls == pytest.approx([0.9 * PEAK / 20] * 20)


def test_beyond_the_last_step_the_least_rate_holds() -> None:
    for schedule in (Schedule.cosine, Schedule.wsd):
        _, scheduler = make(schedule, min_lr_ratio=0.1)
        assert scheduler.factor(5000) == pytest.approx(0.1)


@given(
    st.sampled_from(list(Schedule)),
    st.integers(1, 60),
    st.integers(0, 80),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_a_factor_is_always_one_of_a_fraction(
    schedule: Schedule, num_steps: int, warmup_steps: int, decay_fraction: float, min_lr_ratio: float, step: int
) -> None:
    _, scheduler = make(schedule, num_steps, warmup_steps, decay_fraction=decay_fraction, min_lr_ratio=min_lr_ratio)
    factor = scheduler.factor(step)
    assert math.isfinite(factor)
    least = min(min_lr_ratio, 1 / (num_steps + 1))
    assert least - 1e-12 <= factor <= 1 + 1e-12


def test_without_warmup_the_first_update_has_the_peak() -> None:
    optimizer, _ = make(Schedule.constant, warmup_steps=0)
    assert optimizer.param_groups[0]["lr"] == PEAK


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = WarmupScheduler(optimizer, schedule=Schedule.cosine, num_steps=10, warmup_steps=2)
    scheduler.load_state_dict({"step": 6})
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(4 * first)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("at", [0, 3, 10, 57, 99])
def test_a_resumed_schedule_gives_the_same_rates_to_the_bit(schedule: Schedule, at: int) -> None:
    optimizer, scheduler = make(schedule)
    rates(optimizer, scheduler, at)
    state = json.loads(json.dumps(scheduler.state_dict()))
    other_optimizer, other = make(schedule)
    other.load_state_dict(state)
    assert other.get_last_lr() == scheduler.get_last_lr()
    assert rates(other_optimizer, other, 10) == rates(optimizer, scheduler, 10)


def test_the_state_is_a_number_of_steps_and_the_next_rates() -> None:
    optimizer, scheduler = make(Schedule.wsd)
    rates(optimizer, scheduler, 7)
    state = json.loads(json.dumps(scheduler.state_dict()))
    assert state == {"step": 7, "rates": [PEAK * 8 / 11]}
    optimizer, longer = make(Schedule.wsd, warmup_steps=0)
    assert longer.rates_before is None
    longer.load_state_dict(state)
    assert longer.rates_before == [PEAK * 8 / 11] and longer.get_last_lr() == [PEAK]
    longer.load_state_dict({"step": 7})  # of an older version
    assert longer.rates_before is None


@pytest.mark.parametrize("rates", [[None], ["1e-3"], 0.1, [True]])
def test_rates_that_are_none_are_refused(rates: object) -> None:
    _, scheduler = make(Schedule.wsd)
    with pytest.raises(ValueError, match="are no rates"):
        scheduler.load_state_dict({"step": 7, "rates": rates})


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup_steps", [4, 30])
def test_the_factor_over_another_number_of_steps(schedule: Schedule, warmup_steps: int) -> None:
    _, scheduler = make(schedule, num_steps=10, warmup_steps=warmup_steps)
    _, longer = make(schedule, num_steps=50, warmup_steps=warmup_steps)
    factor = scheduler.over(50)
    assert [factor(step) for step in range(60)] == [longer.factor(step) for step in range(60)]
    assert scheduler.num_steps == 10


def test_a_resume_with_another_peak_length_and_shape_uses_the_new_ones() -> None:
    optimizer, scheduler = make(Schedule.cosine, num_steps=100)
    rates(optimizer, scheduler, 50)
    optimizer, longer = make(Schedule.wsd, num_steps=200, peak=3.0)
    longer.load_state_dict(scheduler.state_dict())
    assert rates(optimizer, longer, 110) == [3.0] * 110


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.5)
    optimizer, scheduler = make(Schedule.constant, peak=rate, warmup_steps=3)
    held = optimizer.param_groups[0]["lr"]
    scheduler.load_state_dict({"step": 1})
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.25


def test_resuming_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    optimizer, scheduler = make(Schedule.cosine)
    scheduler.load_state_dict({"step": 5})
    rates(optimizer, scheduler, 3)
    assert [str(warning.message) for warning in recwarn] == []
