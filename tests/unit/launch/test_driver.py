"""The loop that does what the policy decides, with nodes of a test: what it starts, says, orders and ends with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED, ConfigError
from windlass.launch import driver
from windlass.launch.driver import Driver
from windlass.launch.policy import Limits, Order, OrderKind, Policy, Seen, WorkerEnd
from windlass.outcome import LAUNCHER, Outcome

WAIT_S, GIVE_UP_S = 3.0, 20.0
DONE, STOPPED = Outcome(EXIT_DONE), Outcome(EXIT_STOPPED)


class FakeNodes:
    """Does what a test has planned: by the time in seconds, an event and its argument. One worker a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *plan: tuple[float, str, str]) -> None:
        self.now, self.plan = 0.0, list(plan)
        self.ready: list[str] = []
        self.lost: list[str] = []
        self.leaving: list[str] = []
        self.used: tuple[str, ...] = ()
        self.ends: dict[str, WorkerEnd] = {}
        self.is_stopping = self.is_interrupted = False
        self.log: list[str] = []
        monkeypatch.setattr(driver, "time", self)

    def monotonic(self) -> float:
        return self.now

    def look(self, timeout_s: float) -> None:
        self.now += timeout_s
        while self.plan and self.plan[0][0] <= self.now:
            _, event, argument = self.plan.pop(0)
            getattr(self, f"on_{event}")(argument)

    def on_come(self, nodes: str) -> None:
        self.ready += nodes

    def on_lose(self, node: str) -> None:
        self.ready.remove(node)
        self.lost.append(node)

    def on_drain(self, node: str) -> None:
        self.ready.remove(node)
        self.leaving.append(node)

    def on_die(self, node: str) -> None:
        self.end(node, WorkerEnd(self.used.index(node), self.used.index(node), -9))

    def on_done(self, _: str) -> None:
        for rank, node in enumerate(self.used):
            self.end(node, WorkerEnd(rank, rank, 0, DONE))

    def on_stop(self, _: str) -> None:
        self.is_stopping = True

    def on_interrupt(self, _: str) -> None:
        self.is_interrupted = True

    def end(self, node: str, end: WorkerEnd) -> None:
        self.ends.setdefault(node, end)

    def seen(self, has_workers: bool) -> Seen:
        return Seen(list(self.ready), 0, self.leaving, self.is_stopping, self.is_interrupted)

    def take_lost(self) -> list[str]:
        lost, self.lost = self.lost, []
        return lost

    def take_ends(self) -> list[WorkerEnd]:
        return list(self.ends.values())

    def start(self, attempt: int, nodes: Sequence[str]) -> bool:
        self.log.append(f"{int(self.now + 0.01)} start {attempt} {''.join(nodes)}")
        self.used, self.ends = tuple(nodes), {}
        return True

    def tell(self, order: Order) -> None:
        self.log.append(f"{int(self.now + 0.01)} {order.kind.value} {''.join(order.nodes)}")
        for rank, node in enumerate(self.used):
            is_gone = order.kind == OrderKind.leave and node in order.nodes
            outcome = STOPPED if order.kind == OrderKind.stop or is_gone else None
            code = {OrderKind.kill: -9}.get(order.kind, EXIT_RESTART if outcome is None else 0)
            self.end(node, WorkerEnd(rank, rank, code, outcome))

    def conclude(self, leaving: Collection[str]) -> None:
        self.log.append(f"{int(self.now + 0.01)} over {''.join(leaving)}".rstrip())

    def show_last_words(self, end: WorkerEnd) -> None:
        self.log.append(f"last words of {end.rank}")

    def name(self, node: str) -> str:
        return node

    def too_few(self, num_ready: int) -> ConfigError:
        return ConfigError("launch.nnodes", num_ready, "too few", "add nodes")


def run(nodes: FakeNodes, fewest: int, most: int, max_restarts: int = 3) -> Outcome:
    """Returns the job's outcome; what the driver says is in the log."""
    policy = Policy(Limits(fewest, most, WAIT_S, first_give_up_s=GIVE_UP_S), 1, max_restarts, 0.0)
    return Driver(nodes, policy, "runs/a", nodes.log.append).run()


def test_a_job_starts_and_ends_as_its_workers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (1, "come", "a"), (2, "come", "b"), (10, "done", ""))
    assert run(nodes, 2, 2) == DONE
    assert nodes.log == [
        "waiting for 2 of 2 nodes",
        "waiting for 1 of 2 nodes",
        "nodes   2: a, b",
        "2 start 0 ab",
    ]


def test_a_lost_node_is_waited_for_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(
        monkeypatch, (0, "come", "abc"), (10, "lose", "b"), (12, "come", "d"), (20, "come", "e"), (30, "done", "")
    )
    assert run(nodes, 3, 3) == DONE
    assert nodes.log == [
        "nodes   3: a, b, c",
        "0 start 0 abc",
        "node b is lost; waiting for another",
        "11 kill abc",
        "11 over",
        "going on with node d in its place",
        "12 start 1 adc",
    ]


def test_a_job_shrinks_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "abc"), (10, "lose", "c"), (20, "come", "d"), (30, "done", ""))
    assert run(nodes, 2, 3) == DONE
    assert nodes.log == [
        "nodes   3: a, b, c",
        "0 start 0 abc",
        "node c is lost; waiting up to 3 s for another",
        "11 kill abc",
        "11 over",
        "going on with 2 nodes",
        "13 start 1 ab",
        "node d can join: the workers start again",
        "20 save ab",
        "20 over",
        "going on with 3 nodes",
        "20 start 2 abd",
    ]


def test_a_node_that_is_told_to_go_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "ab"), (10, "drain", "a"), (30, "done", ""))
    assert run(nodes, 1, 2) == DONE
    assert nodes.log[2:] == [
        "node a is about to go",
        "10 leave a",
        "10 over a",
        "going on with 1 nodes",
        "13 start 1 b",
    ]


def test_a_job_whose_workers_keep_dying_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "ab"), (10, "die", "b"), (20, "die", "b"), (30, "die", "b"))
    message = "rank 1 died (SIGKILL) and launch.max_restarts=1 is used up; see runs/a/logs/"
    assert run(nodes, 2, 2, max_restarts=1) == Outcome(EXIT_FAILURE, message, LAUNCHER)
    assert nodes.log[-2:] == ["21 kill ab", "last words of 1"]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_job_stops_when_the_user_wants_it(is_running: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "ab" if is_running else "a"), (10, "stop", ""))
    outcome = run(nodes, 2, 2)
    assert outcome.exit_code == EXIT_STOPPED and outcome.message is None
    assert (nodes.log[-1] == "10 stop ab") is is_running


def test_a_job_ends_when_the_user_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "ab"), (10, "interrupt", ""))
    assert run(nodes, 2, 2) == Outcome(EXIT_FAILURE, "interrupted", LAUNCHER)
    assert nodes.log[-1] == "10 kill ab"


def test_a_job_with_too_few_nodes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeNodes(monkeypatch, (0, "come", "a"))
    with pytest.raises(ConfigError, match=r"launch\.nnodes=1: too few"):
        run(nodes, 2, 2)
    assert GIVE_UP_S <= nodes.now < GIVE_UP_S + 1
