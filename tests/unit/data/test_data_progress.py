from __future__ import annotations

import io
import sys

import pytest

from windlass.data import progress as progress_module
from windlass.data.progress import ProgressReport


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def test_lines_every_tenth_or_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("tokenising", 100_000_000, done_bytes=20_000_000) as report:
        for seconds, done in ((0.5, 40e6), (2, 44e6), (2.1, 45e6), (5, 50e6), (13, 51e6), (40, 100e6)):
            clock.now = 100 + seconds
            report.set_done(int(done))
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 44%, 44.0 of 100.0 MB, 12.0 MB/s, 5 s left",
        "tokenising: 51%, 51.0 of 100.0 MB, 2.4 MB/s, 21 s left",
        "tokenising: 100%, 100.0 of 100.0 MB, 2.0 MB/s, 0 s left",
    ]


def test_short_work_gets_its_last_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("tokenising", 1_000_000) as report:
        clock.now += 0.5
        report.set_done(2_000_000)
    assert capsys.readouterr().err == "tokenising: 100%, 1.0 of 1.0 MB, 2.0 MB/s, 0 s left\n"


def test_silent_when_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("tokenising", 100, enabled=False) as report:
        report.set_done(100)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressReport("tokenising", 2_000_000, done_bytes=500_000) as report:
        report.set_done(1_500_000)
    assert "tokenising" in terminal.getvalue()
    assert "1.5/2.0 MB" in terminal.getvalue()
    assert "━" in terminal.getvalue()
