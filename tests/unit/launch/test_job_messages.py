"""What launchers tell each other, over a job store in this process, and what the one that runs the job makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from windlass.errors import EXIT_DONE, EXIT_RESTART, ConfigError
from windlass.launch.config import LaunchConfig, LaunchKind
from windlass.launch.job_messages import Command, JobEnded, JobMessages, NodeReport, Phase
from windlass.launch.job_store import StoreClient, StoreServer
from windlass.launch.policy import Order, OrderKind, WorkerEnd
from windlass.launch.store_nodes import StoreNodes
from windlass.outcome import Outcome
from windlass.untrusted import Malformed

FIRST = {"node": "a", "windlass": "1", "torch": "2.13.0", "python": "3.11.2", "train.steps": "5"}
SECRET = bytes(32)
END = WorkerEnd(1, 0, -9, None)


@pytest.fixture
def client() -> Iterator[StoreClient]:
    server = StoreServer("127.0.0.1", SECRET)
    yield StoreClient(("127.0.0.1", server.port), SECRET)
    server.close()


@pytest.fixture
def messages(client: StoreClient) -> JobMessages:
    return JobMessages(client, "job")


def test_the_first_outcome_is_the_jobs(messages: JobMessages, client: StoreClient) -> None:
    assert messages.ended() is None
    assert messages.publish(Outcome(2, "first", 3)) == Outcome(2, "first", 3)
    assert messages.publish(Outcome(0)) == Outcome(2, "first", 3)
    assert messages.ended() == Outcome(2, "first", 3)
    assert JobMessages(client, "another job").ended() is None


def test_reports_and_commands_go_there_and_back(messages: JobMessages) -> None:
    assert messages.told() == (None, None) and messages.reports() == {}
    report = NodeReport("10.0.0.1", 7, 0, 3, (END, WorkerEnd(0, 0, 0, Outcome(EXIT_DONE))), is_stopping=True)
    assert [messages.join(FIRST), messages.join({**FIRST, "node": "b"})] == ["0", "1"]
    messages.report("1", report)
    assert messages.reports() == {"1": (report, None)}
    messages.beat("1")
    assert messages.reports() == {"1": (report, b"1")}
    messages.give(Command(3, ("1", "0"), Phase.save))
    assert messages.told() == (None, Command(3, ("1", "0"), Phase.save))


def test_what_is_no_message_is_refused(messages: JobMessages, client: StoreClient) -> None:
    for text in (b"", b"[]", b'{"attempt": 1}', b'{"attempt": "1", "nodes": [], "phase": "run"}', b"\xff"):
        client.set({"windlass/job/command": text})
        with pytest.raises(Malformed):
            messages.command()


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_node_that_differs_ends_a_job_that_has_not_begun_and_none_that_has(
    has_begun: bool, messages: JobMessages
) -> None:
    messages.join(FIRST)
    if has_begun:
        messages.give(Command(0, ("0",)))
    with pytest.raises(ConfigError, match=r"train\.steps=6"):
        messages.join({**FIRST, "node": "b", "train.steps": "6"})
    outcome = messages.ended()
    assert (outcome is None) is has_begun
    assert outcome is None or (outcome.exit_code == 2 and "train.steps=6: on node b" in (outcome.message or ""))


@pytest.mark.parametrize("differs", [False, True])
def test_the_host_waits_until_the_others_have_signed_off(
    differs: bool, messages: JobMessages, client: StoreClient
) -> None:
    other = JobMessages(StoreClient(client.address, client.secret), "job")
    other.join(FIRST)
    if differs:
        with pytest.raises(ConfigError):
            messages.join({**FIRST, "train.steps": "6"})
    else:
        messages.join(FIRST)
    has_left: list[bool] = []
    thread = threading.Thread(target=lambda: has_left.append(messages.sign_off(serves_store=True) is None))
    thread.start()
    time.sleep(0.1)
    assert not has_left
    other.sign_off(serves_store=False)
    thread.join(timeout=3)
    assert has_left == [True]


# --- The nodes as the launcher that runs the job sees them. ---


class Job:
    """Three nodes of one worker each, with reports and signs of life as a test gives them."""

    def __init__(self, messages: JobMessages, monkeypatch: pytest.MonkeyPatch, **launch: object) -> None:
        self.messages, self.now = messages, 100.0
        monkeypatch.setattr("windlass.launch.store_nodes.time", self)
        config = LaunchConfig(LaunchKind.torchrun, nnodes="1:3", address="a:1", **launch)  # type: ignore[arg-type]
        self.nodes = StoreNodes(messages, config, num_local_ranks=1)
        for number in range(3):
            node = messages.join(FIRST)
            self.report(node, pid=9 - number, is_ready=True)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Costs no time."""

    def report(self, node: str, pid: int = 1, **fields: object) -> None:
        self.messages.report(node, NodeReport("10.0.0.1", pid, **fields))  # type: ignore[arg-type]

    def look(self, after_s: float = 0.0, alive: str = "012") -> None:
        self.now += after_s
        for node in alive:
            self.messages.beat(node)
        self.nodes.look(1.0)


@pytest.fixture
def job(messages: JobMessages, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(messages, monkeypatch)


def ready(job: Job) -> list[str]:
    return list(job.nodes.seen(has_workers=False).ready)


def test_nodes_are_ready_in_the_order_of_their_addresses_when_they_have_no_workers(job: Job) -> None:
    job.look()
    assert ready(job) == ["2", "1", "0"]
    job.report("0", attempt=0)
    job.report("1", attempt=0, ends=(END,))
    job.report("2", attempt=0, ends=(END,), is_leaving=True)
    job.look()
    assert ready(job) == ["1"]


def test_a_silent_node_is_lost_and_is_ready_again_once_it_is_heard_of(job: Job) -> None:
    job.look()
    job.look(1.0, "12")
    job.look(3.0, "12")
    assert job.nodes.take_lost() == []
    job.look(0.1, "12")
    assert job.nodes.take_lost() == ["0"] and ready(job) == ["2", "1"]
    job.look(1.0, "12")
    assert job.nodes.take_lost() == [], "it is said once"
    job.look()
    assert ready(job) == ["2", "1", "0"]


def test_a_node_that_leaves_is_no_loss(job: Job) -> None:
    job.look()
    job.report("0", is_leaving=True)
    job.look(1.0, "12")
    job.look(4.0, "12")
    assert job.nodes.take_lost() == [] and ready(job) == ["2", "1"]


def test_only_the_ends_of_this_attempt_and_of_its_nodes_are_heard(job: Job) -> None:
    assert job.nodes.take_ends() == []
    job.report("0", attempt=4, ends=(END,))
    job.report("1", attempt=5, ends=(WorkerEnd(0, 0, EXIT_RESTART),))
    job.report("2", attempt=5, ends=(END,))
    job.look()
    job.nodes.start(5, ["0", "1"])
    assert job.nodes.take_ends() == [WorkerEnd(0, 0, EXIT_RESTART)]


def test_nodes_are_told_what_the_policy_orders(job: Job) -> None:
    job.look()
    job.nodes.start(0, ["2", "0"])
    for kind, phase in (
        (OrderKind.stop, Phase.run),
        (OrderKind.leave, Phase.run),
        (OrderKind.save, Phase.save),
        (OrderKind.kill, Phase.kill),
    ):
        job.nodes.tell(Order(kind, ("2", "0")))
        assert job.messages.command() == Command(0, ("2", "0"), phase)
    job.nodes.conclude([])
    assert job.messages.command() == Command(0, ("2", "0"), Phase.over)


def test_a_request_to_stop_at_any_node_is_the_jobs(job: Job) -> None:
    job.look()
    assert not job.nodes.seen(has_workers=True).is_stopping
    job.report("1", is_stopping=True)
    job.look()
    assert job.nodes.seen(has_workers=True).is_stopping


def test_two_nodes_that_were_given_the_same_rank_are_refused(job: Job) -> None:
    job.report("0", node_rank=1)
    job.report("1", node_rank=1)
    job.look()
    assert job.nodes.seen(has_workers=False).fixed == {"0": 1, "1": 1}
    with pytest.raises(ConfigError, match=r"launch\.node_rank=1: two nodes have it"):
        job.nodes.start(0, ["0", "1"])


def test_a_job_that_a_node_has_ended_is_run_no_more(job: Job) -> None:
    job.messages.publish(Outcome(75))
    with pytest.raises(JobEnded):
        job.look()
