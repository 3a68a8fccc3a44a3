"""SIGTERM, SIGINT and SIGHUP ask a run to stop; it does so after the step that it is in."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECOND_PRESS_S = 2.0
"""A terminal and a launcher may both pass on one Ctrl-C; a later one means it."""


class StopRequest:
    """Notes the signal instead of dying from it. A second Ctrl-C, two seconds later or more, interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT and time.monotonic() - self._first_at > SECOND_PRESS_S:
            raise KeyboardInterrupt
        if not self.received:
            self.signal_name, self._first_at = signal.Signals(number).name, time.monotonic()
