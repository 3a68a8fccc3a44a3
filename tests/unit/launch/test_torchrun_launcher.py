"""The torchrun launcher, with its agent replaced: what it asks of the agent, and what it makes of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.errors import ConfigError
from windlass.launch import main as launch_main
from windlass.launch import torchrun, worker
from windlass.launch.elastic_agent import JobRendezvous
from windlass.launch.job_messages import JobEnded, JobMessages
from windlass.launch.stop_requests import Interrupted, Requests
from windlass.outcome import LAUNCHER, Outcome

TWO_RANKS = ["launch=torchrun", "launch.nproc_per_node=2", "launch.max_restarts=5"]


def fake_agent(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Replaces the agent by `action`, after which workers would have ended; returns what it will have been given."""
    seen: dict[str, Any] = {}

    class Agent:
        def __init__(
            self, rendezvous: JobRendezvous, num_local_ranks: int, config_file: str, environment: dict[str, str]
        ) -> None:
            seen.update(launch=rendezvous.launch, num_ranks=num_local_ranks, environment={**os.environ, **environment})
            seen.update(scratch=Path(config_file).parent, config=load_config(Path(config_file)))

        def run(self) -> None:
            action()
            raise JobEnded(Outcome(0), is_own=True)

    monkeypatch.setattr(torchrun, "NodeAgent", Agent)
    monkeypatch.setattr(torchrun, "fork_context", lambda: None)
    return seen


def raiser(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.fixture
def config() -> Config:
    return compose(TWO_RANKS)


def test_workers_get_the_resolved_configuration(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_agent(monkeypatch)
    assert torchrun.launch(config) == 0
    assert seen["config"] == config
    assert (seen["num_ranks"], seen["launch"].max_restarts) == (2, 5)


def test_nothing_is_left_behind(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = fake_agent(monkeypatch, raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        torchrun.launch(config)
    assert not seen["scratch"].exists()
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.slow
def test_cores_are_shared_among_the_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    seen = fake_agent(monkeypatch)
    torchrun.launch(config)
    assert seen["environment"]["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_users_number_of_threads_stands(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = fake_agent(monkeypatch)
    torchrun.launch(config)
    assert seen["environment"]["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_code_of_the_jobs_outcome_is_the_runs(code: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_agent(monkeypatch, raiser(JobEnded(Outcome(code), is_own=False)))
    assert torchrun.launch(config) == code


def test_what_another_node_has_refused_is_said_here_too(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_agent(monkeypatch, raiser(JobEnded(Outcome(2, "data.path=x: is not there", rank=0), is_own=False)))
    assert torchrun.launch(config) == 2
    assert capsys.readouterr().err == "windlass: error: rank 0: data.path=x: is not there\n"


def test_what_rank_0_has_said_is_not_said_twice(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_agent(monkeypatch, raiser(JobEnded(Outcome(2, "data.path=x: is not there", rank=0), is_own=True)))
    assert torchrun.launch(config) == 2
    assert capsys.readouterr().err == ""


def test_a_launchers_own_word_names_no_rank(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_agent(monkeypatch, raiser(JobEnded(Outcome(1, "rank 1 died", LAUNCHER), is_own=True)))
    assert torchrun.launch(config) == 1
    assert capsys.readouterr().err == "windlass: error: rank 1 died\n"


@pytest.mark.slow
def test_a_node_that_does_not_fit_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_agent(monkeypatch, raiser(ConfigError("launch.node_rank", 0, "two nodes have it", "number them")))
    assert torchrun.launch(config) == 2
    assert "launch.node_rank=0: two nodes have it" in capsys.readouterr().err


def test_a_driver_that_fails_ends_the_job(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes would wait for its next word."""
    has_failed, published = threading.Event(), []
    publish = JobMessages.publish

    def note(self: JobMessages, outcome: Outcome) -> Outcome:
        published.append(outcome)
        return publish(self, outcome)

    monkeypatch.setattr(threading, "excepthook", lambda _: has_failed.set())
    monkeypatch.setattr(torchrun.Driver, "run", lambda _: 1 / 0)
    monkeypatch.setattr(JobMessages, "publish", note)
    fake_agent(monkeypatch, lambda: has_failed.wait(5) and None)
    torchrun.launch(config)
    assert published[0] == Outcome(1, "the launcher that runs the job has failed", LAUNCHER)


def test_a_layout_that_cannot_be_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_agent(monkeypatch)
    with pytest.raises(ConfigError, match="trains on one rank, and 2 were started"):
        torchrun.launch(compose([*TWO_RANKS, "parallel=none"]))
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "passed_on"),
    [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGHUP)],
)
def test_requests_to_stop_go_to_the_workers(
    number: signal.Signals, passed_on: signal.Signals, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are children of a child. SIGTERM becomes what asks the job to stop, once however often it comes."""
    heard = []

    def agent() -> None:
        with server_with_worker() as worker:
            for _ in range(3):
                signal.raise_signal(number)
            heard.append(worker.read())

    fake_agent(monkeypatch, agent)
    torchrun.launch(config)
    names = heard[0].split()
    assert set(names) == {passed_on.name}
    assert len(names) == 1 or number != signal.SIGTERM


def test_sigterm_has_a_node_leave_where_the_job_may_go_on(tmp_path: Path) -> None:
    with Requests(tmp_path / "stop") as requests:
        requests.may_leave = True
        with server_with_worker() as worker:
            signal.raise_signal(signal.SIGTERM)
            assert requests.is_leaving
            signal.raise_signal(signal.SIGINT)  # the job is to stop after all
            assert not requests.is_leaving
            assert set(worker.read().split()) == {"SIGUSR1", "SIGINT"}
    assert (tmp_path / "stop").exists()


def test_a_launcher_without_workers_is_interrupted_itself(tmp_path: Path) -> None:
    with Requests(tmp_path / "stop") as requests:
        with pytest.raises(Interrupted), requests.may_interrupt():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), requests.may_interrupt():
            raise AssertionError("it was asked before")


WORKER = """
import signal, sys
numbers = {signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("up", flush=True)
found = signal.sigtimedwait(numbers, 30)
while found is not None:
    print(signal.Signals(found.si_signo).name, flush=True)
    found = signal.sigtimedwait(numbers, 0.5)
"""
SERVER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


@contextmanager
def server_with_worker() -> Iterator[IO[str]]:
    """A child that has a child, which writes the names of the signals that it gets until none comes any more."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, WORKER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    yield server.stdout
    assert server.wait(timeout=60) == 0
    server.stdout.close()


@pytest.mark.parametrize(("overrides", "launcher"), [([], "local"), (TWO_RANKS, "torchrun")])
def test_the_launcher_is_the_one_that_was_asked_for(
    overrides: list[str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr("windlass.launch.fork_server.fork_context", lambda: None)
    monkeypatch.setattr(torchrun, "launch", lambda _: called.append("torchrun") or 0)
    monkeypatch.setattr(worker, "run_worker", lambda _: called.append("local") or 0)
    assert launch_main.train(overrides) == 0
    assert called == [launcher]
