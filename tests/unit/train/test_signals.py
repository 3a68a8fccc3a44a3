from __future__ import annotations

import signal
from pathlib import Path

import pytest

from windlass.train import signals
from windlass.train.outcome import OUTCOME_FILE
from windlass.train.signals import Request, StopRequest


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
