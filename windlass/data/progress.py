"""Shows how far a preparation is, on stderr: a bar on a terminal, a line now and then elsewhere. Torch-free."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

MIN_LINE_EVERY_S = 1.0
MAX_LINE_EVERY_S = 10.0
LINE_EVERY_FRACTION = 0.1


class ProgressReport:
    """A context manager that is told of bytes done.

    Args:
        total_bytes: of the whole work.
        done_bytes: done before, by an interrupted run; they do not count for the rate.
        enabled: False reports nothing.
    """

    def __init__(self, title: str, total_bytes: int, done_bytes: int = 0, enabled: bool = True) -> None:
        self._title, self._total, self._done, self._initial = title, total_bytes, done_bytes, done_bytes
        self._started_at = self._line_at = time.monotonic()
        self._line_done = done_bytes
        self._plain = enabled and not sys.stderr.isatty()
        self._bar: Progress | None = None
        if enabled and not self._plain:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total_bytes, completed=done_bytes)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._plain and self._done != self._line_done:
            self._line(time.monotonic())

    def set_done(self, done_bytes: int) -> None:
        """`done_bytes` in all are done now."""
        self._done = min(done_bytes, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._plain:
            now = time.monotonic()
            is_step = self._done - self._line_done >= LINE_EVERY_FRACTION * self._total
            if now - self._line_at >= (MIN_LINE_EVERY_S if is_step else MAX_LINE_EVERY_S):
                self._line(now)

    def _line(self, now: float) -> None:
        rate = (self._done - self._initial) / max(now - self._started_at, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        percent = 100 * self._done // max(self._total, 1)
        sys.stderr.write(
            f"{self._title}: {percent}%, {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB,"
            f" {rate / 1e6:.1f} MB/s{left}\n"
        )
        sys.stderr.flush()
        self._line_at, self._line_done = now, self._done
