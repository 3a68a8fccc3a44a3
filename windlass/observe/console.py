"""Shows a run while it trains: a live view on a terminal, else a line every few steps. Torch-free."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO, Any, Protocol, Self, TextIO

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from windlass.observe.config import ConsoleMode
from windlass.streams import why_lost
from windlass.text import printable

NUM_RECENT_LOSSES = 240
"""Losses kept for the sparkline: those of the last lines, one each."""

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"
_NARROW_COLUMNS = 64
_RATE_DECAY = 0.7
"""Weight of the past in the seconds a step that the ETA is made of."""


class Console(Protocol):
    """The output of a run's progress. Leaving its `with` block restores the terminal, whatever was raised."""

    def start(self) -> None:
        """Begin to show. May write the live view's first frame."""
        ...

    def update(self, record: Mapping[str, Any]) -> None:
        """Take over the keys of a line of metrics.jsonl (any subset, `step` included) and show them."""
        ...

    def message(self, text: str) -> None:
        """Show a line of text for good: above the live view where there is one."""
        ...

    def stop(self) -> None:
        """Show the last state and give the terminal back. May be called twice, and without `start`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_console(
    mode: ConsoleMode,
    *,
    rank: int,
    total_steps: int,
    title: str = "windlass",
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Console:
    """The console of this rank, not started: silent on all ranks but 0.

    Args:
        mode: `auto` is `rich` if `file` is a terminal that can move its cursor, else `plain`.
        title: heads the live view, e.g. the run's folder.
        file: where to write; None is `sys.stdout`.
        clock: seconds, monotonic; for tests.
    """
    if rank != 0:
        return SilentConsole()
    file = file or sys.stdout
    screen = rich.console.Console(file=file, force_terminal=True if mode is ConsoleMode.rich else None)
    if mode is ConsoleMode.auto:
        live = screen.is_terminal and not screen.is_dumb_terminal
        mode = ConsoleMode.rich if live else ConsoleMode.plain
    progress = Progress(total_steps, clock=clock)
    return RichConsole(progress, screen, title) if mode is ConsoleMode.rich else PlainConsole(progress, file)


@dataclass
class Progress:
    """The progress of the run, as both consoles know it."""

    total_steps: int
    clock: Callable[[], float] = time.monotonic
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest value of every key."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_LOSSES))
    val_step: int | None = None
    checkpoint_at: float | None = None
    """When, by `clock`, a new `checkpoint/last_step` was first heard of."""
    _seconds_a_step: float | None = None
    _heard: tuple[int, float] | None = None

    def update(self, record: Mapping[str, Any]) -> None:
        now = self.clock()
        if record.get("train/loss") is not None:
            self.losses.append(record["train/loss"])
            self._time_steps(record, now)
        if "val/loss" in record:
            self.val_step = record.get("step")
        checkpoint = record.get("checkpoint/last_step")
        if checkpoint is not None and checkpoint != self.latest.get("checkpoint/last_step"):
            self.checkpoint_at = now
        # A new dict: the live view reads from a thread of its own.
        self.latest = {**self.latest, **record}

    def _time_steps(self, record: Mapping[str, Any], now: float) -> None:
        """Wall time a step, evaluation and stalls included: that is what the user waits for."""
        step = record["step"]
        if self._heard is None or step <= self._heard[0]:
            self._seconds_a_step = record.get("throughput/step_s")
        else:
            seconds = (now - self._heard[1]) / (step - self._heard[0])
            before = seconds if self._seconds_a_step is None else self._seconds_a_step
            self._seconds_a_step = _RATE_DECAY * before + (1 - _RATE_DECAY) * seconds
        self._heard = (step, now)

    @property
    def step(self) -> int:
        return self.latest.get("step", 0)

    def eta_s(self) -> float | None:
        """Seconds to the last step; None before the first line."""
        if self._seconds_a_step is None or self._heard is None:
            return None
        left = (self.total_steps - self._heard[0]) * self._seconds_a_step
        return max(0.0, left - (self.clock() - self._heard[1]))

    def checkpoint_age_s(self) -> float | None:
        return None if self.checkpoint_at is None else self.clock() - self.checkpoint_at


class SilentConsole:
    """Shows nothing: for the ranks other than 0."""

    def start(self) -> None:
        pass

    def update(self, record: Mapping[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class PlainConsole(SilentConsole):
    """A line a record, aligned from one to the next: for log files, pipes and dumb terminals."""

    def __init__(self, progress: Progress, file: IO[str]) -> None:
        self._progress, self._file = progress, file

    def update(self, record: Mapping[str, Any]) -> None:
        self._progress.update(record)
        if "train/loss" in record:
            self._write(self._train_line())
        elif "val/loss" in record:
            seconds = record.get("eval/seconds")
            took = "" if seconds is None else f"  eval {duration(seconds)}"
            self._write(f"{self._step_column()}  val loss {number(record['val/loss'], '.4f')}{took}")

    def message(self, text: str) -> None:
        self._write(printable(text))

    def _step_column(self) -> str:
        total = str(self._progress.total_steps)
        return f"step {self._progress.step:>{len(total)}}/{total}"

    def _train_line(self) -> str:
        latest = self._progress.latest
        fields = [
            self._step_column(),
            f"loss {number(latest['train/loss'], '.4f')}",
            f"lr {number(latest.get('optim/lr'), '.1e')}",
            f"|g| {number(latest.get('optim/grad_norm'), '.2f')}",
            f"{number(latest.get('throughput/tokens_per_s'), ',.0f'):>7} tok/s",
        ]
        mfu = latest.get("throughput/mfu")
        if mfu is not None:
            fields.append(f"mfu {number(100 * mfu, '.1f'):>4}%")
        fields.append(f"rss {size(latest.get('memory/host_rss_bytes'))}")
        if latest.get("memory/device_peak_bytes") is not None:
            fields.append(f"gpu {size(latest['memory/device_peak_bytes'])}")
        fields.append(f"eta {duration(self._progress.eta_s())}")
        if latest.get("checkpoint/last_step") is not None:
            fields.append(f"ckpt {latest['checkpoint/last_step']}")
        if latest.get("optim/skipped_steps"):
            fields.append(f"skipped {latest['optim/skipped_steps']}")
        return "  ".join(fields)

    def _write(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()  # a log that is followed, or that a kill ends, must have its last line


class RichConsole(SilentConsole):
    """A view at the foot of the terminal that is redrawn four times a second, below all other output."""

    def __init__(self, progress: Progress, screen: rich.console.Console, title: str) -> None:
        self._progress, self._screen, self._title = progress, screen, title
        self._live: Live | None = None
        self._plain = PlainConsole(progress, screen.file)

    def start(self) -> None:
        if self._live is None:
            # Once a second: a frame is drawn by a thread that takes the interpreter, and a core, from training.
            self._live = Live(get_renderable=self.view, console=self._screen, refresh_per_second=1)
            self._live.start()
            atexit.register(self.stop)  # `sys.exit` between start and stop must not leave the cursor hidden

    def update(self, record: Mapping[str, Any]) -> None:
        if self._is_for_a_log():
            self._plain.update(record)
        else:
            self._progress.update(record)

    def message(self, text: str) -> None:
        if self._is_for_a_log():
            self._plain.message(text)
        else:
            self._screen.print(Text(printable(text)))

    def _is_for_a_log(self) -> bool:
        """True if the terminal is gone and output goes on elsewhere, where a view cannot be."""
        if why_lost(self._screen.file) is None:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            atexit.unregister(self.stop)
            live.stop()

    def view(self) -> Table:
        """The view as it is now, for the terminal's present width."""
        width = self._screen.width
        unicode = not self._screen.options.ascii_only
        narrow = width < _NARROW_COLUMNS
        frame = Table.grid(expand=True)
        frame.add_column(no_wrap=True, overflow="ellipsis")
        frame.add_row(self._head())
        frame.add_row(ProgressBar(total=self._progress.total_steps, completed=self._progress.step))
        cells = self._cells(width // (1 if narrow else 2) - 26, unicode)
        grid = Table.grid(padding=(0, 2), expand=not narrow)
        num_pairs = 1 if narrow else 2
        for _ in range(num_pairs):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=None if narrow else 1)
        for i in range(0, len(cells), num_pairs):
            row = [text for cell in cells[i : i + num_pairs] for text in cell]
            grid.add_row(*row)
        frame.add_row(grid)
        return frame

    def _head(self) -> Text:
        progress = self._progress
        share = progress.step / progress.total_steps
        return Text.assemble(
            (f"step {progress.step:,}/{progress.total_steps:,}", "bold"),
            f"  {share:.0%}  eta {duration(progress.eta_s())}  ",
            (printable(self._title), "dim"),
        )

    def _cells(self, spark_width: int, unicode: bool) -> list[tuple[str, Text]]:
        """Label and value of each cell, by rows of two."""
        progress, latest = self._progress, self._progress.latest
        spark = sparkline(list(progress.losses), max(0, min(spark_width, 40)), unicode=unicode)
        loss = Text.assemble((number(latest.get("train/loss"), ".4f"), "bold"), "  ", (spark, "cyan"))
        val = number(latest.get("val/loss"), ".4f")
        if progress.val_step is not None:
            val += f"  at step {progress.val_step:,}"
        mfu = latest.get("throughput/mfu")
        skipped = latest.get("optim/skipped_steps") or 0
        checkpoint = "-"
        if latest.get("checkpoint/last_step") is not None:
            checkpoint = f"step {latest['checkpoint/last_step']:,}"
            checkpoint += f"  {duration(progress.checkpoint_age_s())} ago"
        memory = f"{size(latest.get('memory/host_rss_bytes'))} host"
        if latest.get("memory/device_peak_bytes") is not None:
            memory += f"  {size(latest['memory/device_peak_bytes'])} device"
        return [
            ("loss", loss),
            ("val loss", Text(val)),
            ("lr", Text(number(latest.get("optim/lr"), ".2e"))),
            ("grad norm", Text(number(latest.get("optim/grad_norm"), ".3f"))),
            ("tokens/s", Text(number(latest.get("throughput/tokens_per_s"), ",.0f"))),
            ("mfu", Text("-" if mfu is None else f"{number(100 * mfu, '.1f')} %")),
            ("memory", Text(memory)),
            ("checkpoint", Text(checkpoint)),
            ("tokens", Text(number(latest.get("tokens"), ",d"))),
            ("skipped", Text(f"{skipped} steps", style="bold red" if skipped else "")),
        ]


def sparkline(values: list[float], width: int, *, unicode: bool = True) -> str:
    """`values` as up to `width` bars, each the mean of as many values; `!` where one is not finite."""
    bars = _BARS if unicode else _ASCII_BARS
    if width <= 0 or not values:
        return ""
    num_groups = min(width, len(values))
    borders = [round(i * len(values) / num_groups) for i in range(num_groups + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(borders)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] if math.isfinite(mean) else "!" for mean in means)


def number(value: float | None, spec: str) -> str:
    """`value` by the format `spec`; `-` for None."""
    return "-" if value is None else format(value, spec)


def size(num_bytes: float | None) -> str:
    """A number of bytes with a binary unit, e.g. `1.2 GiB`; `-` for None."""
    if num_bytes is None:
        return "-"
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`, with days from the second on: `2d 03:04:05`; `-` for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}"
