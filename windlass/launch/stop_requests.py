"""Hears what asks a torchrun launcher to stop the job, or to leave it, and passes it on to the node's workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from windlass.outcome import write_request
from windlass.train.signals import STOP_SIGNALS, handle, stop_heard


class Interrupted(Exception):
    """Raised when the launcher is asked to stop or to leave while it has no workers to ask."""


class Requests:
    """Passes what asks this process to stop on to the workers, which save and end by themselves.

    SIGTERM is how schedulers take back a machine: this node leaves the job where that may go on without it.
    """

    def __init__(self, stop_file: Path) -> None:
        self.may_leave = False
        self.is_leaving = False
        self.signal_name: str | None = None
        """The first signal that asked the job to stop."""
        self.stop_file = stop_file
        self.is_stopping = self._may_interrupt = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        self._previous = handle(dict.fromkeys(STOP_SIGNALS, self._hear))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Entered while there are no workers: raises Interrupted when asked, or if it was before."""
        self._may_interrupt = True
        try:
            if self.is_leaving or self.is_stopping:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM and (self.is_leaving or self.is_stopping):
            return  # repeated, it means no more, but SIGINT would
        stop_heard()
        # A worker would take SIGTERM for its launcher's, who is about to start it again.
        passed_on = signal.SIGUSR1 if number == signal.SIGTERM else signal.Signals(number)
        if number == signal.SIGTERM and self.may_leave:
            self.is_leaving = True
        else:
            self.is_leaving, self.is_stopping = False, True
            self.signal_name = self.signal_name or signal.Signals(number).name
        write_request(self.stop_file, self.signal_name)
        if self._may_interrupt:
            raise Interrupted
        for worker in _workers():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(passed_on)


def _workers() -> Iterator[psutil.Process]:
    """Finds the children of the fork server; not theirs, as snapshot agents outlive them."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            yield from child.children()
