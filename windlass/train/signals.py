"""Hears the signals that a worker gets while it trains; it does what they ask after the step that it is in.

| signal | asks |
| --- | --- |
| SIGINT, SIGHUP | the job to stop |
| SIGUSR1 | the job to stop, where its launcher has written that down (`windlass.outcome.write_request`); |
| | else this node to leave the job, which goes on without it if it may |
| SIGUSR2 | for the stacks of all threads, in the rank's log; nothing ends |
| SIGTERM | a worker of a windlass launcher to be started again with all others; a worker without one to stop |

A signal that is ignored when this begins stays so, as `nohup` and shells that start jobs in the background want it.
That is why a launcher passes SIGTERM on as SIGUSR1: its workers may ignore SIGINT and SIGHUP.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn

from windlass.errors import EXIT_FAILURE, EXIT_STOPPED
from windlass.outcome import OUTCOME_FILE, report_outcome, stop_of_launcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a whole run to stop, at whatever process the user sees."""
SECOND_PRESS_S = 2.0
"""A terminal and a launcher may both pass on one Ctrl-C; a later one means it."""
UNWIND_S = 5.0
"""How long a process that was interrupted by a later Ctrl-C may take to tidy up."""

Handler = Callable[[int, FrameType | None], Any]


class Request(IntEnum):
    """The requests to a job; where there are several, the highest is followed."""

    nothing = 0
    restart = 1
    leave = 2
    stop = 3


def requests_of_signals() -> dict[signal.Signals, Request]:
    """Maps each signal to what it asks of this process. SIGTERM is torch's elastic agent changing who is in the job."""
    has_launcher = OUTCOME_FILE in os.environ
    return {
        signal.SIGTERM: Request.restart if has_launcher else Request.stop,
        signal.SIGINT: Request.stop,
        signal.SIGHUP: Request.stop,
        signal.SIGUSR1: Request.leave,
    }


def handle(handlers: Mapping[signal.Signals, Handler]) -> dict[signal.Signals, Any]:
    """Sets handlers for those signals that are not ignored; returns what they had before."""
    heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number, handler in heard.items()}


_stop_heard_at: float | None = None
"""When this process was first asked to stop."""


def stop_heard() -> bool:
    """Notes that this process was asked to stop; returns whether that was `SECOND_PRESS_S` ago or more."""
    global _stop_heard_at
    now = time.monotonic()
    if _stop_heard_at is None:
        _stop_heard_at = now
    return now - _stop_heard_at > SECOND_PRESS_S


@contextmanager
def late_requests_pass() -> Iterator[None]:
    """For all that a process does around a run: one that was asked to stop, and does, is not ended by asking again.

    What comes while it tidies up must not turn a run that is saved into one that failed. A later Ctrl-C still does.
    """
    global _stop_heard_at

    def hear(number: int, _: FrameType | None) -> None:
        if _stop_heard_at is None or (number == signal.SIGINT and stop_heard()):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    _stop_heard_at = None
    previous = handle(dict.fromkeys(STOP_SIGNALS, hear))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Notes the signal instead of dying from it. A second Ctrl-C, two seconds later or more, interrupts at once.

    Handlers run when the main thread is in Python; a thread hears signals also while it waits in C.
    """

    def __init__(self) -> None:
        self._asked = Request.nothing
        self.signal_name: str | None = None
        """The name of the first signal that asked that."""
        self.awaits = "the step to end"
        """The work that this rank has to do before it ends; for who presses Ctrl-C again."""
        self._waits_for: str | None = None
        self._first_at = 0.0
        self._heard_at: float | None = None
        self._requests: dict[signal.Signals, Request] = {}
        self._previous: dict[signal.Signals, Any] = {}
        self._ear: _Ear | None = None
        self._last: threading.Timer | None = None
        self._has_said: str | None = None

    @property
    def asked(self) -> Request:
        return self._asked

    def __enter__(self) -> StopRequest:
        self._requests = requests_of_signals()
        self._previous = handle(dict.fromkeys(self._requests, self._note))
        # Asks for stacks (`windlass.observe.watchdog`), and must not end a worker that has no log yet.
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._ear = _Ear(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._ear is not None
        self._ear.close()
        if self._last is not None:
            self._last.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, waits_for: str) -> Iterator[None]:
        """While nothing is trained yet, and the rank may wait long or in vain: a stop ends it there."""
        self._waits_for = waits_for
        try:
            if self._asked == Request.stop:
                self._end_waiting()
            yield
        finally:
            self._waits_for = None

    def _request_of(self, number: int) -> Request:
        request = self._requests.get(signal.Signals(number), Request.nothing)
        return Request.stop if request == Request.leave and stop_of_launcher() is not None else request

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        request = self._request_of(number)
        is_repeated = self._asked == Request.stop and time.monotonic() - self._first_at > SECOND_PRESS_S
        if is_repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request > self._asked:
            self.signal_name = signal.Signals(number).name
            if number == signal.SIGUSR1 and request == Request.stop:
                self.signal_name = stop_of_launcher()
            self._asked, self._first_at = request, time.monotonic()
            if request == Request.stop:
                stop_heard()

    def _hear(self, number: int) -> None:
        """In a thread of its own, at once, and with some signals before `_note`."""
        if self._waits_for is not None and self._request_of(number) == Request.stop:
            self.signal_name = self.signal_name or signal.Signals(number).name
            self._end_waiting()
        # Counted from when this thread heard the first: a busy machine then has no press seem later than it was.
        if self._request_of(number) == Request.stop and self._heard_at is None:
            self._heard_at = time.monotonic()
        if number != signal.SIGINT or self._heard_at is None:
            return
        if time.monotonic() - self._heard_at > SECOND_PRESS_S:
            if self._last is None:
                self._last = threading.Timer(UNWIND_S, self._end_interrupted)
                self._last.daemon = True
                self._last.start()
        elif self.awaits != self._has_said:
            self._has_said = self.awaits
            if (os.environ.get("RANK") or "0") == "0":
                say(f"Ctrl-C: waiting for {self.awaits}; again, {SECOND_PRESS_S:g} s later or more, it ends at once")

    def _end_waiting(self) -> NoReturn:
        say(f"stopped by {self.signal_name} while waiting for {self._waits_for}; the same command begins again")
        os._exit(report_outcome(EXIT_STOPPED, has_begun=False))

    def _end_interrupted(self) -> NoReturn:
        """For a main thread that does not come back from C. What is being written is whole or not there."""
        say("interrupted")
        os._exit(report_outcome(EXIT_FAILURE, "interrupted"))


class _Ear:
    """A thread that calls `hear` with the number of each signal that has a handler, as soon as it comes."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        self._theirs = theirs
        self._before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="windlass-signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        # This thread takes no signal itself: one that a `sigmask` of the main thread holds back must stay held.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while numbers := os.read(self._ours, 64):
            for number in numbers:
                self._hear(number)
        os.close(self._ours)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._theirs)
        self._thread.join()


def say(text: str) -> None:
    """Tells the user, whatever thread this is."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"windlass: {text}\n")
        sys.stderr.flush()
