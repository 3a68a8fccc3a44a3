"""Who is in a job next, and what an attempt came to, in every case that a small job can be in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import inf

import pytest

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED, EXIT_USER_ERROR
from windlass.launch.policy import (
    DOUBT_S,
    GRACE_S,
    LAST_S,
    MAX_FAILED_STARTS,
    REFUSAL_S,
    SAVE_S,
    SETTLE_S,
    Action,
    Limits,
    Liveness,
    NodeHistory,
    OrderKind,
    Policy,
    Seen,
    Verdict,
    WorkerEnd,
    assign_node_ranks,
    judge,
    may_leave,
)
from windlass.outcome import LAUNCHER, Outcome

WAIT_S, FIRST_S, GIVE_UP_S = 60.0, 10.0, 200.0
LIMITS = [(low, high) for high in range(1, 5) for low in range(1, high + 1)]
TIMES = (0.0, WAIT_S - 1, WAIT_S, WAIT_S + 1, GIVE_UP_S - 1, GIVE_UP_S)
START_S = 1000.0
"""When each job begins."""
NAMES = "abcdefgh"


def policy_of(fewest: int, most: int, *, num_local_ranks: int = 1, max_restarts: int = 3, **limits: float) -> Policy:
    wait = {"wait_s": WAIT_S, "first_give_up_s": GIVE_UP_S, "give_up_s": inf} | limits
    return Policy(Limits(fewest, most, **wait), num_local_ranks, max_restarts, START_S)


def running(nodes: Sequence[str], fewest: int, most: int, **more: int) -> Policy:
    """A job whose first attempt runs on these nodes."""
    policy = policy_of(fewest, most, **more)
    policy.begin(nodes)
    return policy


# --- Between attempts. ---


@pytest.mark.parametrize(("fewest", "most"), LIMITS)
def test_the_first_attempt_begins_with_all_nodes_or_when_the_wait_for_them_is_over(fewest: int, most: int) -> None:
    """All states and times: never with too few, and it gives up only if too few have come and none is coming."""
    for num_ready, num_coming, after_s in itertools.product(range(most + 2), range(3), TIMES):
        policy, seen = policy_of(fewest, most), Seen(NAMES[:num_ready], num_coming)
        policy.decide(START_S, seen)
        decision = policy.decide(START_S + after_s, seen)
        if num_ready >= most:
            assert (decision.action, decision.nodes) == (Action.start, tuple(NAMES[:most]))
        elif num_ready >= fewest:
            is_over = after_s >= WAIT_S
            assert decision.action == (Action.start if is_over else Action.wait)
            assert len(decision.nodes) == (num_ready if is_over else 0)
        elif num_ready + num_coming >= fewest:
            assert (decision.action, decision.left_s) == (Action.wait, None)
        else:
            assert decision.action == (Action.give_up if after_s >= GIVE_UP_S else Action.wait)


@pytest.mark.parametrize(("fewest", "most"), LIMITS)
def test_a_job_that_has_begun_waits_from_the_loss_of_a_node_on_and_then_goes_on_with_fewer(
    fewest: int, most: int
) -> None:
    for num_ready, after_s in itertools.product(range(most + 2), TIMES):
        policy = running(NAMES[:most], fewest, most)
        policy.note(START_S + 500, [end(rank, *KILLED) for rank in range(most)])
        policy.note(START_S + 500, [], lost=[NAMES[most - 1]])
        decision = policy.decide(START_S + 500 + after_s, Seen(NAMES[:num_ready]))
        if num_ready >= most:
            assert decision.action == Action.start
        elif num_ready < fewest:
            assert (decision.action, decision.left_s) == (Action.wait, None), "without end"
        elif after_s < WAIT_S:
            assert (decision.action, decision.left_s) == (Action.wait, WAIT_S - after_s)
        else:
            assert len(decision.nodes) == num_ready


def test_nodes_that_start_minutes_apart_are_waited_for_from_when_the_fewest_are_there() -> None:
    policy = policy_of(3, 4)
    assert policy.decide(START_S + 100, Seen("ab")).action == Action.wait
    for after_s, action in ((120, Action.wait), (120 + WAIT_S - 1, Action.wait), (120 + WAIT_S, Action.start)):
        assert policy.decide(START_S + after_s, Seen("abc")).action == action
    assert policy.decide(START_S + 181, Seen("ab")).action == Action.wait
    assert policy.decide(START_S + 190, Seen("abc")).action == Action.wait, "it begins anew when one has gone again"


def test_a_worker_that_dies_costs_a_job_that_has_shrunk_no_other_wait_for_nodes() -> None:
    policy = running("abc", 2, 4)
    policy.note(START_S + 500, [end(rank, *KILLED) for rank in range(3)])
    policy.conclude(START_S + 500, Seen("abc"), "runs/a")
    assert policy.decide(START_S + 500, Seen("abc")).nodes == ("a", "b", "c")


def test_a_job_whose_nodes_come_by_themselves_gives_up_after_a_loss_too() -> None:
    policy = policy_of(2, 2, give_up_s=GIVE_UP_S)
    policy.begin("ab")
    policy.note(START_S + 500, [end(0, *FAILED)], lost="b")
    policy.conclude(START_S + 510, Seen("a"), "runs/a")
    assert policy.decide(START_S + 510 + GIVE_UP_S - 1, Seen("a")).action == Action.wait
    assert policy.decide(START_S + 510 + GIVE_UP_S, Seen("a")).action == Action.give_up


@pytest.mark.parametrize("after_s", [0.0, FIRST_S - 1, FIRST_S])
def test_a_job_without_patience_lets_the_first_nodes_start(after_s: float) -> None:
    policy = policy_of(2, 4, wait_s=0.0, first_s=FIRST_S, first_give_up_s=FIRST_S)
    is_over = after_s >= FIRST_S
    assert policy.decide(START_S + after_s, Seen("a")).action == (Action.give_up if is_over else Action.wait)
    assert policy.decide(START_S + after_s, Seen("ab")).action == (Action.start if is_over else Action.wait)


def test_without_patience_a_job_goes_on_with_what_is_left_at_once() -> None:
    policy = policy_of(2, 4, wait_s=0.0)
    policy.begin("abcd")
    policy.note(START_S + 500, [end(rank, *FAILED) for rank in range(3)], lost="d")
    assert policy.decide(START_S + 500, Seen("abc")).nodes == ("a", "b", "c")


def test_who_stays_keeps_the_rank_and_who_comes_takes_a_free_one() -> None:
    names = "abcdef"
    for num_before in range(5):
        before = names[:num_before]
        for ready in itertools.chain.from_iterable(itertools.permutations(names, n) for n in range(5)):
            for num_nodes in range(len(ready) + 1):
                chosen = assign_node_ranks(before, ready, num_nodes)
                assert len(chosen) == num_nodes and len(set(chosen)) == num_nodes and set(chosen) <= set(ready)
                stayed = [node for node in before if node in ready]
                kept = [node for node in chosen if node in stayed]
                assert kept == stayed[: len(kept)]
                if num_nodes >= num_before and len(ready) >= num_before:
                    assert all(chosen[before.index(node)] == node for node in stayed)


def test_ranks_that_the_user_gave_are_kept() -> None:
    fixed = {"a": 2, "b": 0, "c": 1, "d": 1}
    assert assign_node_ranks((), "abc", 3, fixed) == ("b", "c", "a")
    assert assign_node_ranks("bca", "bad", 3, fixed) == ("b", "d", "a")


# --- During an attempt. ---


def kinds(policy: Policy, now: float, ready: Sequence[str], **more: object) -> list[OrderKind]:
    return [order.kind for order in policy.orders(now, Seen(ready, **more))]  # type: ignore[arg-type]


@pytest.mark.parametrize(("fewest", "most"), LIMITS)
def test_a_job_grows_to_what_it_wants_and_not_for_each_of_a_group(fewest: int, most: int) -> None:
    for num_running, num_ready in itertools.product(range(fewest, most + 1), range(fewest, most + 2)):
        policy = running(NAMES[:num_running], fewest, most)
        at_once = kinds(policy, START_S, NAMES[:num_ready])
        later = kinds(policy, START_S + SETTLE_S, NAMES[:num_ready])
        if num_ready <= num_running or num_running == most:
            assert at_once + later == []
        else:
            assert (at_once, later) == (([OrderKind.save], []) if num_ready >= most else ([], [OrderKind.save]))


def test_a_node_that_follows_another_has_the_job_wait_for_a_third() -> None:
    policy = running("a", 1, 4)
    assert kinds(policy, START_S, "ab") == []
    assert kinds(policy, START_S + SETTLE_S - 0.5, "abc") == []
    assert kinds(policy, START_S + SETTLE_S, "abc") == []
    assert kinds(policy, START_S + 2 * SETTLE_S - 0.5, "abc") == [OrderKind.save]


def test_workers_that_do_not_end_are_killed_when_their_time_is_over() -> None:
    for how, patience_s in ((KILLED, GRACE_S), (LOST, GRACE_S), (DONE, LAST_S), (STOPPED, LAST_S), (RESTART, SAVE_S)):
        policy = running("ab", 2, 2)
        policy.note(START_S + 5, [end(0, *how)])
        assert kinds(policy, START_S + 5 + patience_s - 0.1, "ab") == []
        assert kinds(policy, START_S + 5 + patience_s, "ab") == [OrderKind.kill]
        assert kinds(policy, START_S + 5 + patience_s + 1, "ab") == [], "once"
    refused = running("ab", 2, 2)
    refused.note(START_S, [end(0, 0, EXIT_USER_ERROR)])
    assert kinds(refused, START_S + REFUSAL_S - 0.1, "ab") == []
    assert kinds(refused, START_S + REFUSAL_S, "ab") == [OrderKind.kill]
    unmet = running("ab", 2, 2)
    unmet.note(START_S, [WorkerEnd(0, 0, 0, Outcome(EXIT_STOPPED, has_begun=False))])
    assert kinds(unmet, START_S + GRACE_S, "ab") == [OrderKind.kill]


def test_workers_that_save_are_killed_when_one_dies_or_it_takes_for_ever() -> None:
    policy = running("a", 1, 2)
    assert kinds(policy, START_S, "ab") == [OrderKind.save]
    assert kinds(policy, START_S + SAVE_S - 1, "ab") == []
    assert kinds(policy, START_S + SAVE_S, "ab") == [OrderKind.kill]
    policy = running("ab", 1, 3)
    assert kinds(policy, START_S, "abc") == [OrderKind.save]
    policy.note(START_S + 1, [end(0, *KILLED)])
    assert kinds(policy, START_S + 1 + GRACE_S, "abc") == [OrderKind.kill]


def test_what_the_user_asks_is_passed_on_once_and_before_all_else() -> None:
    policy = running("ab", 1, 3)
    assert kinds(policy, START_S, "abc", is_stopping=True, leaving="b") == [OrderKind.stop]
    assert kinds(policy, START_S, "abc", is_stopping=True, leaving="b") == []
    assert kinds(policy, START_S, "abc", is_stopping=True, is_interrupted=True) == [OrderKind.kill]


def test_a_node_that_is_told_to_go_leaves_and_none_joins_meanwhile() -> None:
    policy = running("ab", 1, 3)
    (order,) = policy.orders(START_S, Seen("ac", leaving=["b", "elsewhere"]))
    assert (order.kind, order.nodes) == (OrderKind.leave, ("b",))
    assert kinds(policy, START_S, "acd", leaving="b") == []


def test_no_node_joins_an_attempt_that_is_about_to_end() -> None:
    policy = running("a", 1, 2, num_local_ranks=2)
    policy.note(START_S, [end(1, *FAILED)])
    assert kinds(policy, START_S, "ab") == []


def test_the_workers_of_a_lost_node_have_ended_and_those_of_a_spare_were_none() -> None:
    policy = running("ab", 1, 2, num_local_ranks=2)
    policy.note(START_S + 5, [WorkerEnd(3, 1, 1)], lost=["b", "spare"])
    assert [(end.rank, end.exit_code) for end in policy.ends] == [(2, None), (3, 1)]
    assert not policy.is_over
    assert policy.is_short_of("a") and not policy.is_short_of(["spare"])
    policy.note(START_S + 6, [WorkerEnd(rank, 0, 1) for rank in (0, 1)])
    assert policy.is_over and policy.is_short_of(["spare"])


# --- After an attempt. ---


def end(rank: int, exit_code: int | None, outcome: int | None = None, message: str | None = None) -> WorkerEnd:
    return WorkerEnd(rank, rank, exit_code, None if outcome is None else Outcome(outcome, message, rank))


DONE, STOPPED = (0, EXIT_DONE), (0, EXIT_STOPPED)
RESTART, LOST, KILLED, FAILED, SILENT = (EXIT_RESTART, None), (None, None), (-9, None), (1, None), (0, None)


def verdict_of(*how: tuple[int | None, int | None], is_stopping: bool = False) -> Verdict:
    return judge([end(rank, *pair) for rank, pair in enumerate(how)], is_stopping)


@pytest.mark.parametrize("is_stopping", [False, True])
def test_what_an_attempt_came_to(is_stopping: bool) -> None:
    """Every way in which two ranks can end."""
    for pair in itertools.product((DONE, STOPPED, RESTART, LOST, KILLED, FAILED, SILENT), repeat=2):
        verdict = verdict_of(*pair, is_stopping=is_stopping)
        if DONE in pair:
            assert verdict.outcome == Outcome(EXIT_DONE)
        elif is_stopping or pair == (STOPPED, STOPPED):
            assert verdict.outcome == Outcome(EXIT_STOPPED)
        else:
            assert verdict.outcome is None
            assert verdict.counts == (RESTART not in pair)
            assert verdict.leaving == {node_rank for node_rank, how in enumerate(pair) if how == STOPPED}


def test_a_refusal_ends_the_job_with_the_words_of_the_lowest_rank_that_has_any() -> None:
    ends = [end(2, None), end(1, EXIT_USER_ERROR, EXIT_USER_ERROR, "bad input"), end(0, 1)]
    assert judge(ends, is_stopping=False).outcome == Outcome(EXIT_USER_ERROR, "bad input", rank=1)
    ends.append(end(0, 0, EXIT_USER_ERROR, "worse input"))
    assert judge(ends, is_stopping=True).outcome == Outcome(EXIT_USER_ERROR, "worse input", rank=0)


def test_only_ends_that_the_others_wait_for_are_early() -> None:
    early = {how: end(0, *how).is_early for how in (DONE, STOPPED, RESTART, LOST, KILLED, FAILED, SILENT)}
    assert [how for how, is_early in early.items() if is_early] == [LOST, KILLED, FAILED, SILENT]
    assert end(0, 0, EXIT_USER_ERROR).is_early
    assert WorkerEnd(0, 0, 0, Outcome(EXIT_STOPPED, has_begun=False)).is_early


def test_a_stop_that_only_some_ranks_were_told_before_they_met_stops_the_job() -> None:
    ends = [WorkerEnd(1, 1, 0, Outcome(EXIT_STOPPED, None, 1, has_begun=False)), end(0, *KILLED)]
    outcome = judge(ends, is_stopping=True).outcome
    assert outcome is not None and (outcome.exit_code, outcome.message) == (EXIT_STOPPED, None)


@pytest.mark.parametrize(
    ("how", "words"),
    [(KILLED, "rank 1 died (SIGKILL)"), (FAILED, "rank 1 died (exit code 1)"), (LOST, "rank 1 was lost with its node")],
)
def test_a_job_that_keeps_dying_names_who_died_first(how: tuple[int | None, int | None], words: str) -> None:
    policy = running("abc", 3, 3, max_restarts=1)
    for number in range(2):
        if number:
            policy.begin("abc")
        policy.note(START_S, [end(1, *how)])
        policy.note(START_S, [end(0, *FAILED)])
        assert kinds(policy, START_S + GRACE_S, "abc") == [OrderKind.kill]
        policy.note(START_S, [end(2, *KILLED)])  # by that order
        verdict = policy.conclude(START_S, Seen("abc"), "runs/a")
        assert verdict.counts
        assert verdict.outcome is None or number == 1
    message = f"{words} and launch.max_restarts=1 is used up; see runs/a/logs/"
    assert verdict.outcome == Outcome(EXIT_FAILURE, message, LAUNCHER)


def test_a_rank_that_was_killed_is_named_before_one_that_was_heard_of_first() -> None:
    policy = running("ab", 2, 2, max_restarts=0)
    policy.note(START_S, [end(0, *FAILED)])
    policy.note(START_S, [end(1, *KILLED)])
    assert policy.first_end == end(1, *KILLED)


def test_a_second_ctrl_c_is_a_failure_unless_all_have_ended_well() -> None:
    for how, outcome in (
        (KILLED, Outcome(EXIT_FAILURE, "interrupted", LAUNCHER)),
        (STOPPED, Outcome(EXIT_STOPPED)),
    ):
        policy = running("ab", 2, 2)
        policy.note(START_S, [end(0, *STOPPED), end(1, *how)])
        seen = Seen("ab", is_stopping=True, is_interrupted=True)
        assert policy.conclude(START_S, seen, "runs/a").outcome == outcome


def test_a_node_that_has_left_is_waited_for_as_a_lost_one() -> None:
    policy = running("ab", 1, 2)
    policy.note(START_S + 500, [end(0, *RESTART), end(1, *STOPPED)])
    assert policy.conclude(START_S + 500, Seen("a"), "runs/a") == Verdict(leaving=frozenset({1}))
    assert policy.decide(START_S + 500, Seen("a")).left_s == WAIT_S


# --- Nodes. ---


def test_a_node_is_lost_once_it_has_been_silent_for_too_long() -> None:
    liveness = Liveness(3.0)
    for at, is_heard, is_lost in (
        (0, True, False),
        (1, False, False),
        (4, False, False),
        (4.5, False, True),
        (5, True, False),
        (6, False, False),
        (9.5, False, True),
    ):
        liveness.note("a", at, is_heard)
        assert liveness.is_lost("a", at) == is_lost
    assert not liveness.is_lost("b", 100)


def test_a_node_is_avoided_while_it_may_be_lost_and_for_ever_once_it_is_refused() -> None:
    history = NodeHistory()
    history.note_lost("a", START_S)
    history.note_lost("b", START_S)
    history.note_started("b")
    history.refuse("c")
    assert history.to_avoid(START_S + DOUBT_S - 1) == {"a", "c"}
    assert history.to_avoid(START_S + DOUBT_S) == {"c"}
    assert [history.note_failed_start("d") for _ in range(MAX_FAILED_STARTS + 1)] == [False] * MAX_FAILED_STARTS + [
        True
    ]
    history.note_started("d")
    assert not history.note_failed_start("d"), "only starts in a row count"


def test_only_a_node_that_the_others_can_do_without_leaves() -> None:
    assert may_leave(is_elastic=True, serves_store=False)
    assert not may_leave(is_elastic=True, serves_store=True) and not may_leave(is_elastic=False, serves_store=False)
