"""What a worker is asked by signals while it trains; it does so after the step that it is in.

| signal | asks |
| --- | --- |
| SIGINT, SIGHUP | the job to stop |
| SIGUSR1 | this node to leave the job, which goes on without it if it may |
| SIGUSR2 | for the stacks of all threads, in the rank's log; nothing ends |
| SIGTERM | a worker of a windlass launcher to be started again with all others; a worker without one to stop |
"""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from types import FrameType
from typing import Any

from windlass.train.outcome import OUTCOME_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What asks a whole run to stop, at whatever process the user sees."""
SECOND_PRESS_S = 2.0
"""A terminal and a launcher may both pass on one Ctrl-C; a later one means it."""


class Request(IntEnum):
    """What may be asked of a job; where several are, the highest is done."""

    nothing = 0
    restart = 1
    leave = 2
    stop = 3


def requests_of_signals() -> dict[signal.Signals, Request]:
    """What each signal asks of this process. SIGTERM is torch's elastic agent changing who is in the job."""
    has_launcher = OUTCOME_FILE in os.environ
    return {
        signal.SIGTERM: Request.restart if has_launcher else Request.stop,
        signal.SIGINT: Request.stop,
        signal.SIGHUP: Request.stop,
        signal.SIGUSR1: Request.leave,
    }


class StopRequest:
    """Notes the signal instead of dying from it. A second Ctrl-C, two seconds later or more, interrupts at once."""

    def __init__(self) -> None:
        self._asked = Request.nothing
        self.signal_name: str | None = None
        """Of the first signal that asked that."""
        self._first_at = 0.0
        self._requests: dict[signal.Signals, Request] = {}
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> Request:
        return self._asked

    def __enter__(self) -> StopRequest:
        self._requests = requests_of_signals()
        for number in self._requests:
            self._previous[number] = signal.signal(number, self._note)
        # Asks for stacks (`windlass.train.watchdog`), and must not end a worker that has no log yet.
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        request = self._requests[signal.Signals(number)]
        is_repeated = self._asked == Request.stop and time.monotonic() - self._first_at > SECOND_PRESS_S
        if is_repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request > self._asked:
            self._asked, self.signal_name, self._first_at = request, signal.Signals(number).name, time.monotonic()
