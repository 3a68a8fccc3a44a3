"""What is shown: plain lines to the letter, the live view at several widths, and a terminal given back."""

from __future__ import annotations

import io
import math
import os
import pty
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import rich.console

from windlass.observe.config import ConsoleMode
from windlass.observe.console import (
    PlainConsole,
    Progress,
    RichConsole,
    SilentConsole,
    duration,
    open_console,
    size,
    sparkline,
)

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 1000,
        "train/loss": 2.31449 + 1 / step,
        "optim/lr": 9.1e-4,
        "optim/grad_norm": 0.8312,
        "optim/skipped_steps": 0,
        "throughput/tokens_per_s": 45210.4,
        "throughput/step_s": 0.4,
        "throughput/mfu": 0.3117,
        "checkpoint/last_step": None,
        "memory/host_rss_bytes": int(1.2 * 2**30),
        "memory/device_peak_bytes": None,
        **more,
    }


def test_plain_lines_to_the_letter() -> None:
    out, clock = io.StringIO(), Clock()
    console = PlainConsole(Progress(300, clock=clock), out)
    with console:
        console.update(line(20, **{"throughput/mfu": None}))
        clock.now = 10.0
        console.update({"step": 20, "val/loss": 2.5, "eval/seconds": 61.4})
        console.message("snapshot restored")
        kept = {"checkpoint/last_step": 20, "memory/device_peak_bytes": 3 << 30}
        console.update(line(40, **kept))
        worse = {"train/loss": math.nan, "optim/skipped_steps": 2, "throughput/mfu": 0.05}
        console.update(line(100, **kept, **worse))
    assert out.getvalue().splitlines() == [
        "step  20/300  loss 2.3645  lr 9.1e-04  |g| 0.83   45,210 tok/s  rss 1.2 GiB  eta 0:01:52",
        "step  20/300  val loss 2.5000  eval 0:01:01",
        "snapshot restored",
        # 0.7 * 0.4 s + 0.3 * 0.5 s a step, for 260 steps
        "step  40/300  loss 2.3395  lr 9.1e-04  |g| 0.83   45,210 tok/s  mfu 31.2%  rss 1.2 GiB  gpu 3.0 GiB"
        "  eta 0:01:52  ckpt 20",
        "step 100/300  loss nan  lr 9.1e-04  |g| 0.83   45,210 tok/s  mfu  5.0%  rss 1.2 GiB  gpu 3.0 GiB"
        "  eta 0:01:00  ckpt 20  skipped 2",
    ]


def test_plain_takes_records_with_missing_keys() -> None:
    out = io.StringIO()
    PlainConsole(Progress(10), out).update({"step": 1, "train/loss": None})
    assert out.getvalue().startswith("step  1/10  loss -  lr -  |g| -")


def test_the_eta_runs_down_between_lines_and_survives_a_rewind() -> None:
    clock = Clock()
    progress = Progress(100, clock=clock)
    assert progress.eta_s() is None
    progress.update(line(50))
    assert progress.eta_s() == pytest.approx(50 * 0.4)
    clock.now = 5.0
    assert progress.eta_s() == pytest.approx(50 * 0.4 - 5)
    progress.update(line(40))
    assert progress.eta_s() == pytest.approx(60 * 0.4)
    clock.now = 500.0
    assert progress.eta_s() == 0.0


def test_the_mode_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def kind(mode: ConsoleMode, file: io.StringIO, rank: int = 0) -> type:
        return type(open_console(mode, rank=rank, total_steps=10, file=file))

    assert kind(ConsoleMode.auto, io.StringIO()) is PlainConsole
    assert kind(ConsoleMode.auto, FakeTerminal()) is RichConsole
    assert kind(ConsoleMode.plain, FakeTerminal()) is PlainConsole
    assert kind(ConsoleMode.rich, io.StringIO()) is RichConsole
    assert kind(ConsoleMode.rich, FakeTerminal(), rank=1) is SilentConsole
    monkeypatch.setenv("TERM", "dumb")
    assert kind(ConsoleMode.auto, FakeTerminal()) is PlainConsole


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with open_console(ConsoleMode.rich, rank=3, total_steps=10) as console:
        console.update(line(1))
        console.message("hello")
    assert capsys.readouterr().out == ""


def rendered(width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    screen = rich.console.Console(file=file, width=width, force_terminal=True, color_system=None)
    clock = Clock()
    console = RichConsole(Progress(300, clock=clock), screen, "runs/tiny")
    for step in range(10, 130, 10):
        console.update(line(step, **{"checkpoint/last_step": 100 if step > 100 else None}))
        clock.now += 4.0
    console.update({"step": 120, "val/loss": 2.5678})
    with screen.capture() as capture:
        screen.print(console.view())
    return capture.get()


@pytest.mark.parametrize("width", [200, 80, 63, 40, 20, 8])
def test_the_view_fits_any_width(width: int) -> None:
    shown = rendered(width).splitlines()
    assert max(len(row.rstrip()) for row in shown) <= width
    assert shown[0].startswith("step 120/300"[: width - 1])
    if width >= 40:
        text = "\n".join(shown)
        for figure in ("40%", "2.3228", "2.5678  at step 120", "9.10e-04", "0.831", "45,210", "31.2 %"):
            assert figure in text
        for figure in ("1.2 GiB host", "step 100  0:00:08 ago", "120,000", "eta 0:01:08"):
            assert figure in text
        assert "█" in text and "▁" in text
    assert len(shown) == (7 if width >= 64 else 12)


def test_the_view_is_ascii_where_the_terminal_is() -> None:
    assert rendered(80, "ascii").isascii()


def test_the_live_view_keeps_messages_above_it_and_gives_the_cursor_back() -> None:
    out = FakeTerminal()
    console = open_console(ConsoleMode.rich, rank=0, total_steps=300, title="runs/tiny", file=out)
    with pytest.raises(KeyboardInterrupt), console:
        console.update(line(10))
        console.message("[not markup] a message")
        raise KeyboardInterrupt
    text = out.getvalue()
    assert "[not markup] a message" in text
    assert text.index("a message") < text.rindex("runs/tiny")
    assert text.count(HIDE_CURSOR) == 1 and text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    console.stop()
    assert out.getvalue() == text


SCRIPT = textwrap.dedent(
    """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    from windlass.observe.config import ConsoleMode
    from windlass.observe.console import open_console

    console = open_console(ConsoleMode.auto, rank=0, total_steps=300, title="in a terminal")
    console.start()
    print("a line of somebody else")
    console.update({"step": 7, "train/loss": 1.25})
    time.sleep(0.3)
    if sys.argv[1] == "exit":
        sys.exit(3)
    with console:
        console.message("waiting")
        time.sleep(60)
    """
)


@pytest.mark.parametrize("how", ["interrupt", "exit"])
def test_a_real_terminal_is_restored(how: str) -> None:
    reader, writer = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how],
        stdout=writer,
        stderr=writer,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "50", "LINES": "30"},
    )
    os.close(writer)
    text, is_interrupted = "", False
    try:
        while True:
            text += os.read(reader, 4096).decode(errors="replace")
            if "waiting" in text and not is_interrupted:  # once: a second one would end it before it has tidied up
                child.send_signal(signal.SIGINT)
                is_interrupted = True
    except OSError:  # the other end of the terminal is closed
        pass
    os.close(reader)
    code = child.wait(timeout=30)
    assert "a line of somebody else" in text and "in a terminal" in text and "1.2500" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    if how == "exit":
        assert code == 3
    else:
        assert "KeyboardInterrupt" in text and code == -signal.SIGINT


def test_sparkline() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8.0, 8.0, 1.0, 1.0], 2) == "█▁"
    assert sparkline([3.0, 3.0], 5) == "▁▁"
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁!█"
    assert sparkline([math.inf], 3) == "!"
    assert sparkline([1.0], 0) == sparkline([], 5) == ""
    assert sparkline([1.0, 2.0], 2, unicode=False) == "_@"


def test_units() -> None:
    assert [size(n) for n in (None, 0, 1023, 1024, 3 << 29, 5 << 40)] == [
        "-",
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]
    assert [duration(s) for s in (None, math.inf, 0, 59.6, 3661, 100_000)] == [
        "-",
        "-",
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "1d 03:46:40",
    ]


@pytest.mark.parametrize("mode", [ConsoleMode.plain, ConsoleMode.rich])
def test_names_that_others_chose_give_the_terminal_no_orders(mode: ConsoleMode) -> None:
    file = FakeTerminal()
    console = open_console(mode, rank=0, total_steps=9, title="\x1b]0;a\x07", file=file)
    console.message("resumed from runs/\x1b[2J\u202e\nwindlass: done")
    assert r"resumed from runs/\x1b[2J\u202e\nwindlass: done" in file.getvalue().replace("\n", "")
    assert "\x1b[2J" not in file.getvalue() and "\u202e" not in file.getvalue()
    if mode is ConsoleMode.rich:
        assert r"\x1b]0;a\x07" in str(console._head())  # type: ignore[attr-defined]
