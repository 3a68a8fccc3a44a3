"""Who is in a job next, in every case that a small one can be in."""

from __future__ import annotations

import itertools

import pytest

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED, EXIT_USER_ERROR
from windlass.launch.membership import Action, Policy, WorkerEnd, exhausted, judge, seats
from windlass.outcome import Outcome

WAIT_S, FIRST_S = 60.0, 10.0
LIMITS = [(low, high) for high in range(1, 5) for low in range(1, high + 1)]
TIMES = (0.0, WAIT_S - 1, WAIT_S, WAIT_S + 1)


@pytest.mark.parametrize(("fewest", "most"), LIMITS)
def test_what_is_done_while_no_workers_run(fewest: int, most: int) -> None:
    """All states and times: never with too few, at once with all, otherwise when the wait is over."""
    policy = Policy(fewest, most, WAIT_S)
    for num_ready, num_coming, short_s, has_begun in itertools.product(range(most + 2), range(3), TIMES, (False, True)):
        decision = policy.decide(num_ready, num_coming, short_s, has_begun)
        is_over = short_s >= WAIT_S
        endless = num_ready < fewest and (has_begun or num_ready + num_coming >= fewest)
        if num_ready >= most:
            assert (decision.action, decision.num_nodes) == (Action.start, most)
        elif num_ready >= fewest and is_over:
            assert (decision.action, decision.num_nodes) == (Action.start, num_ready)
        elif num_ready < fewest and is_over and not endless:
            assert decision.action == Action.fail
        else:
            assert decision.action == Action.wait
            assert decision.left_s == (None if endless else WAIT_S - short_s)


@pytest.mark.parametrize("short_s", [0.0, FIRST_S - 1, FIRST_S])
def test_a_job_without_patience_lets_the_first_nodes_start(short_s: float) -> None:
    policy = Policy(2, 4, 0.0, first_s=FIRST_S)
    is_over = short_s >= FIRST_S
    assert policy.decide(1, 0, short_s, has_begun=False).action == (Action.fail if is_over else Action.wait)
    assert policy.decide(2, 0, short_s, has_begun=False).action == (Action.start if is_over else Action.wait)


def test_without_patience_a_job_goes_on_with_what_is_left_at_once() -> None:
    assert Policy(2, 4, 0.0).decide(3, 0, 0.0, has_begun=True).num_nodes == 3


@pytest.mark.parametrize(("fewest", "most"), LIMITS)
def test_a_job_grows_to_what_it_wants_and_not_for_each_of_a_group(fewest: int, most: int) -> None:
    policy = Policy(fewest, most, WAIT_S, settle_s=2.0)
    for running, ready, quiet_s in itertools.product(range(fewest, most + 1), range(fewest, most + 2), (0.0, 2.0)):
        grows = policy.should_grow(running, ready, quiet_s)
        if ready <= running or running == most:
            assert not grows
        else:
            assert grows == (ready >= most or quiet_s >= 2.0)


def test_who_stays_keeps_the_place_and_who_comes_takes_a_free_one() -> None:
    names = "abcdef"
    for num_before in range(5):
        before = names[:num_before]
        for ready in itertools.chain.from_iterable(itertools.permutations(names, n) for n in range(5)):
            for num_nodes in range(len(ready) + 1):
                chosen = seats(before, ready, num_nodes)
                assert len(chosen) == num_nodes and len(set(chosen)) == num_nodes and set(chosen) <= set(ready)
                stayed = [node for node in before if node in ready]
                kept = [node for node in chosen if node in stayed]
                assert kept == stayed[: len(kept)]
                if num_nodes >= num_before and len(ready) >= num_before:
                    assert all(chosen[before.index(node)] == node for node in stayed)


def end(rank: int, exit_code: int | None, outcome: int | None = None, message: str | None = None) -> WorkerEnd:
    return WorkerEnd(rank, rank, exit_code, None if outcome is None else Outcome(outcome, message, rank))


DONE, STOPPED = (0, EXIT_DONE), (0, EXIT_STOPPED)
RESTART, LOST, KILLED, FAILED, SILENT = (EXIT_RESTART, None), (None, None), (-9, None), (1, None), (0, None)


def verdict_of(*how: tuple[int | None, int | None], is_stopping: bool = False):
    return judge([end(rank, *pair) for rank, pair in enumerate(how)], is_stopping)


@pytest.mark.parametrize("is_stopping", [False, True])
def test_what_a_life_came_to(is_stopping: bool) -> None:
    """Every way in which two ranks can end."""
    for pair in itertools.product((DONE, STOPPED, RESTART, LOST, KILLED, FAILED, SILENT), repeat=2):
        verdict = verdict_of(*pair, is_stopping=is_stopping)
        if DONE in pair:
            assert verdict.exit_code == EXIT_DONE
        elif is_stopping or pair == (STOPPED, STOPPED):
            assert verdict.exit_code == EXIT_STOPPED
        else:
            assert verdict.exit_code is None
            assert verdict.counts == (RESTART not in pair)
            assert verdict.leaving == {seat for seat, how in enumerate(pair) if how == STOPPED}
        assert verdict.message is None


def test_a_refusal_ends_the_job_with_the_words_of_the_lowest_rank_that_has_any() -> None:
    ends = [end(2, None), end(1, EXIT_USER_ERROR, EXIT_USER_ERROR, "bad input"), end(0, 1)]
    verdict = judge(ends, is_stopping=False)
    assert (verdict.exit_code, verdict.message) == (EXIT_USER_ERROR, "rank 1: bad input")
    said_by_itself = judge([*ends, end(0, 0, EXIT_USER_ERROR, "bad input")], is_stopping=True)
    assert (said_by_itself.exit_code, said_by_itself.message) == (EXIT_USER_ERROR, None)


def test_only_ends_that_the_others_wait_for_are_early() -> None:
    early = {how: end(0, *how).is_early for how in (DONE, STOPPED, RESTART, LOST, KILLED, FAILED, SILENT)}
    assert [how for how, is_early in early.items() if is_early] == [LOST, KILLED, FAILED, SILENT]
    assert end(0, 0, EXIT_USER_ERROR).is_early
    assert WorkerEnd(0, 0, 0, Outcome(EXIT_STOPPED, has_begun=False)).is_early


def test_a_stop_that_only_some_ranks_were_told_before_they_met_stops_the_job() -> None:
    ends = [WorkerEnd(1, 1, 0, Outcome(EXIT_STOPPED, None, 1, has_begun=False)), end(0, *KILLED)]
    verdict = judge(ends, is_stopping=True)
    assert (verdict.exit_code, verdict.message) == (EXIT_STOPPED, None)


@pytest.mark.parametrize(
    ("how", "words"),
    [(KILLED, "rank 1 died (SIGKILL)"), (FAILED, "rank 1 died (exit code 1)"), (LOST, "rank 1 was lost with its node")],
)
def test_a_job_that_keeps_dying_names_who_died_first(how: tuple[int | None, int | None], words: str) -> None:
    verdict = exhausted([end(2, *RESTART), end(1, *how), end(0, *FAILED)], 3, "runs/a")
    assert verdict.exit_code == EXIT_FAILURE
    assert verdict.message == f"{words} and launch.max_restarts=3 is used up; see runs/a/logs/"
