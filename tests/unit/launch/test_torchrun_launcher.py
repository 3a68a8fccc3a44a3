"""The torchrun launcher, with torch's agent replaced: what it asks of the agent, and what it makes of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.errors import ConfigError
from windlass.launch import main as launch_main
from windlass.launch import torchrun
from windlass.train.outcome import OUTCOME_FILE, report_outcome

TWO_RANKS = ["launch=torchrun", "launch.nproc_per_node=2", "launch.max_restarts=5"]


def fake_agent(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Replaces torch's agent by `action`; returns what it will have been given."""
    seen: dict[str, Any] = {}

    def start(settings: Any, entrypoint: str) -> Callable[..., None]:
        def agent(*arguments: str) -> None:
            seen.update(settings=settings, entrypoint=entrypoint, arguments=arguments, environment=dict(os.environ))
            seen["config"] = load_config(Path(arguments[-1]))
            action()

        return agent

    monkeypatch.setattr(torchrun, "elastic_launch", start)
    return seen


def child_failed(exit_code: int) -> ChildFailedError:
    failure = ProcessFailure(local_rank=1, pid=99999, exitcode=exit_code, error_file="<N/A>")
    return ChildFailedError("worker", {1: failure})


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
    assert seen["entrypoint"] == sys.executable
    assert seen["arguments"][:2] == ("-m", "windlass.launch.worker")
    assert (seen["settings"].nproc_per_node, seen["settings"].max_restarts) == (2, 5)


def test_nothing_is_left_behind(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = fake_agent(monkeypatch, raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        torchrun.launch(config)
    assert not Path(seen["arguments"][-1]).parent.exists()
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


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
def test_the_code_that_a_worker_left_is_the_runs(code: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_agent(monkeypatch, lambda: report_outcome(code) and None)
    assert torchrun.launch(config) == code
    assert OUTCOME_FILE not in os.environ


def test_a_refusal_counts_though_other_ranks_died_of_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_and_fail() -> None:
        report_outcome(2)
        raise child_failed(1)

    fake_agent(monkeypatch, refuse_and_fail)
    assert torchrun.launch(config) == 2


@pytest.mark.parametrize(("exit_code", "how"), [(3, "exit code 3"), (-9, "SIGKILL")])
def test_a_rank_that_died_too_often_is_named(
    exit_code: int, how: str, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_agent(monkeypatch, raiser(child_failed(exit_code)))
    assert torchrun.launch(config) == 1
    error = capsys.readouterr().err
    assert f"rank 1 died ({how}) and launch.max_restarts=5 is used up" in error
    assert config.run_dir in error


def test_another_signal_is_the_shells_code(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_agent(monkeypatch, raiser(SignalException("got it", signal.SIGHUP)))
    assert torchrun.launch(config) == 128 + signal.SIGHUP


def test_a_layout_that_cannot_be_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_agent(monkeypatch)
    with pytest.raises(ConfigError, match="trains on one rank, and 2 were started"):
        torchrun.launch(compose([*TWO_RANKS, "parallel=none"]))
    assert not seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_to_stop_go_to_the_workers(
    number: signal.Signals, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import signal, sys; sys.stdout.write('up'); sys.stdout.flush(); signal.sigwait({%d})"
    exit_codes = []

    def agent() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # the child waits for it
        child = subprocess.Popen([sys.executable, "-c", code % number], stdout=subprocess.PIPE)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert child.stdout is not None
        child.stdout.read(2)
        signal.raise_signal(number)
        exit_codes.append(child.wait(timeout=30))
        child.stdout.close()

    fake_agent(monkeypatch, agent)
    begin = time.monotonic()
    torchrun.launch(config)
    assert exit_codes == [0], f"after {time.monotonic() - begin} s"


@pytest.mark.parametrize(("overrides", "launcher"), [([], "local"), (TWO_RANKS, "torchrun")])
def test_the_launcher_is_the_one_that_was_asked_for(
    overrides: list[str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(torchrun, "launch", lambda _: called.append("torchrun") or 0)
    monkeypatch.setattr("windlass.launch.worker.run_worker", lambda _: called.append("local") or 0)
    assert launch_main.train(overrides) == 0
    assert called == [launcher]
