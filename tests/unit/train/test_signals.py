from __future__ import annotations

import signal

import pytest

from windlass.train import signals
from windlass.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_nothing_stops(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.received
        signal.raise_signal(number)
        assert stop.received
        assert stop.signal_name == number.name


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_first_signal_gives_the_name() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # right after: a launcher and a terminal may pass on one Ctrl-C
        assert stop.signal_name == "SIGTERM"


def test_a_later_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        now = signals.time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + signals.SECOND_PRESS_S + 0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_later_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        now = signals.time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 1000)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
