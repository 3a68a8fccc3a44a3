from __future__ import annotations

import random
import time

import pytest

from windlass.observe.stragglers import LateRanks, StepClock, Straggler
from windlass.parallel.waiting import WAITED

CALM = [0.2, 0.2, 0.2, 0.2]


def slow(rank: int, seconds: float = 0.2) -> list[float]:
    return [work + seconds * (number == rank) for number, work in enumerate(CALM)]


@pytest.mark.parametrize("rank", range(4))
def test_a_slow_rank_is_named_in_its_third_late_step_and_only_once(rank: int) -> None:
    late = LateRanks()
    assert [late.add(slow(rank)) for _ in range(2)] == [([], []), ([], [])]
    found, recovered = late.add(slow(rank))
    assert [(straggler.rank, round(straggler.seconds, 6)) for straggler in found] == [(rank, 0.2)]
    assert found[0].median_s == 0.2
    assert recovered == []
    assert all(late.add(slow(rank)) == ([], []) for _ in range(20))


def test_three_late_steps_of_the_last_five_are_enough_and_two_are_not() -> None:
    late = LateRanks()
    found = [late.add(slow(1) if step % 3 == 0 else CALM)[0] for step in range(30)]
    assert not any(found), "two in any five"
    late = LateRanks()
    found = [late.add(slow(1) if step % 2 == 0 else CALM)[0] for step in range(30)]
    assert [bool(stragglers) for stragglers in found].index(True) == 4
    assert sum(map(len, found)) == 1


def test_it_has_recovered_after_five_steps_in_time_and_may_be_named_again() -> None:
    late = LateRanks()
    for _ in range(3):
        late.add(slow(2))
    assert [late.add(CALM) for _ in range(5)] == [([], [])] * 4 + [([], [2])]
    assert late.add(CALM) == ([], [])
    assert [len(late.add(slow(2))[0]) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("work_s", "is_late"),
    [
        ([0.2, 0.2, 0.249], False),  # under 50 ms
        ([0.2, 0.2, 0.251], True),
        ([1.0, 1.0, 1.19], False),  # under 20%
        ([1.0, 1.0, 1.21], True),
        ([0.001, 0.001, 0.04], False),  # 40 times as long, of nearly nothing
        ([0.2, 0.5], True),  # the faster of two is the measure
        ([0.2, 0.2, 0.5, 0.5], True),
        ([0.2], False),
    ],
)
def test_what_counts_as_late(work_s: list[float], is_late: bool) -> None:
    late = LateRanks()
    found: list[Straggler] = []
    for _ in range(5):
        found += late.add(work_s)[0]
    assert bool(found) == is_late


def test_noise_names_nobody() -> None:
    """Each rank is late by 100 ms in a hundredth of its steps, and all of them vary by 30 ms."""
    randomness = random.Random(0)
    late = LateRanks()
    for _ in range(300):
        work_s = [0.2 + 0.03 * randomness.random() + 0.1 * (randomness.random() < 0.01) for _ in range(8)]
        assert late.add(work_s) == ([], [])


def test_the_work_of_a_step_leaves_out_what_was_waited_and_what_is_between_steps() -> None:
    clock = StepClock()
    assert clock.work_s is None
    WAITED.add(100.0)  # by an evaluation before the step
    clock.begin()
    time.sleep(0.02)
    WAITED.add(0.015)
    step_s = clock.end()
    WAITED.add(100.0)  # after it
    assert step_s >= 0.02
    assert clock.work_s == pytest.approx(step_s - 0.015)
    clock.begin()
    WAITED.add(100.0)
    clock.end()
    assert clock.work_s == 0.0, "never below"
