from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from windlass.outcome import OUTCOME_FILE, STOP_FILE, reported_outcome, write_request
from windlass.train import signals
from windlass.train.signals import Request, StopRequest, late_requests_pass


@pytest.mark.parametrize(
    ("number", "request_without", "request_with"),
    [
        (signal.SIGINT, Request.stop, Request.stop),
        (signal.SIGHUP, Request.stop, Request.stop),
        (signal.SIGUSR1, Request.leave, Request.leave),
        (signal.SIGTERM, Request.stop, Request.restart),
    ],
)
def test_a_signal_is_noted_and_nothing_stops(
    number: signal.Signals,
    request_without: Request,
    request_with: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for has_launcher, request in ((False, request_without), (True, request_with)):
        if has_launcher:
            monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
        with StopRequest() as stop:
            assert stop.asked == Request.nothing
            signal.raise_signal(number)
            assert stop.asked == request
            assert stop.signal_name == number.name


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_strongest_request_is_kept_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    rising = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    with StopRequest() as stop:
        for number, request in zip(rising, (Request.restart, Request.leave, Request.stop), strict=True):
            signal.raise_signal(number)
            assert (stop.asked, stop.signal_name) == (request, number.name)
        for number in rising[:2]:
            signal.raise_signal(number)
            assert (stop.asked, stop.signal_name) == (Request.stop, "SIGINT")


def test_the_first_signal_gives_the_name() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # right after: a launcher and a terminal may pass on one Ctrl-C
        assert stop.signal_name == "SIGTERM"


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the clock show a moment at which another Ctrl-C is meant."""
    now = signals.time.monotonic()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now + signals.SECOND_PRESS_S + 0.1)


def test_a_later_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        later(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_after_a_request_to_leave_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        later(monkeypatch)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == Request.stop


def test_a_later_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        later(monkeypatch)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == Request.stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    """nohup ignores SIGHUP; a shell that starts a job in the background, SIGINT."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with late_requests_pass(), StopRequest() as stop:
            signal.raise_signal(number)
            assert stop.asked == Request.nothing
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_sigusr1_asks_for_what_the_launcher_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers may ignore all signals by which users stop a job, and the launcher may have been asked by another."""
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    with StopRequest() as stop:
        write_request(tmp_path / "stop", None)
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.asked, stop.signal_name) == (Request.leave, "SIGUSR1")
        write_request(tmp_path / "stop", "SIGTERM")
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.asked, stop.signal_name) == (Request.stop, "SIGTERM")


def in_child(body: Callable[[], None], tmp_path: Path) -> tuple[int, Callable[[], str]]:
    """A fork that runs `body` and ends with 0; its process and what it has said. It dies in a minute."""
    said = tmp_path / "said"
    said.touch()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
        signals.sys.stderr = os.fdopen(2, "w", buffering=1)
        try:
            body()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(9)
    return child, said.read_text


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def deaf() -> None:
    """The main thread stays in C, whatever comes, as in a collective of torch's. Ends with the process."""
    signals.sys.stderr.write("deaf\n")
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_rank_that_waits_for_others_in_c_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    def body() -> None:
        with StopRequest() as stop, stop.at_once("2 ranks to meet at somewhere:1"):
            deaf()

    child, said = in_child(body, tmp_path)
    wait_until(lambda: "deaf" in said())
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    message = (
        f"stopped by {number.name} while waiting for 2 ranks to meet at somewhere:1; the same command begins again"
    )
    assert said() == f"deaf\nwindlass: {message}\n"


def test_a_stop_that_was_asked_before_is_not_waited_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome"))

    def body() -> None:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            with stop.at_once("the text"):
                raise AssertionError("it was asked to stop")

    child, said = in_child(body, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a launcher listens"
    outcome = reported_outcome()
    assert outcome is not None and (outcome.exit_code, outcome.has_begun) == (75, False)
    assert "stopped by SIGHUP while waiting for the text" in said()


def test_a_quick_second_ctrl_c_says_what_is_waited_for_and_a_later_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SECOND_PRESS_S", 2.0)
    monkeypatch.setattr(signals, "UNWIND_S", 0.1)

    def body() -> None:
        with StopRequest() as stop:
            signals.say("ready")
            # Two threads hear the first press: the second one finds another thing to wait for than both have.
            wait_until(lambda: stop.asked == Request.stop and stop._has_said is not None)
            stop.awaits = "the checkpoint of step 7 to be written"
            deaf()

    child, said = in_child(body, tmp_path)
    for word in ("ready", "deaf"):
        wait_until(lambda word=word: word in said())
        os.kill(child, signal.SIGINT)
    wait_until(lambda: "step 7" in said())
    time.sleep(2.1)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [line.partition(";")[0] for line in said().splitlines()] == [
        "windlass: ready",
        "windlass: Ctrl-C: waiting for the step to end",
        "deaf",
        "windlass: Ctrl-C: waiting for the checkpoint of step 7 to be written",
        "windlass: interrupted",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_comes_while_a_stopped_run_tidies_up_does_not_end_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with late_requests_pass():
        with StopRequest():
            signal.raise_signal(number)
        signal.raise_signal(number)
        if number == signal.SIGINT:
            later(monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGHUP, -1), (signal.SIGINT, 130)])
def test_around_a_run_that_nobody_has_stopped_signals_do_what_they_do(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    def body() -> None:
        with late_requests_pass():
            signal.raise_signal(number)

    child, _ = in_child(body, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
