"""Standard streams that outlast what they write to. Torch-free.

A run is worth more than its output. A terminal that is closed, a pipe whose reader has left, a full disk below a log,
descriptors that were closed before the start, and characters that an encoding lacks end no write with an error:
`make_lasting` gives this process streams that go on in a file of the run (`goes_on_in`), or nowhere without one. The
descriptor itself is moved there, so that what C code prints and what child processes inherit goes on as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from windlass.files import open_growing, refuse_links

_STREAMS = {1: "stdout", 2: "stderr"}
_log: Path | None = None
"""The stream where output goes on."""
_lost: dict[int, str] = {}
"""Descriptors that were moved, and why."""


def make_lasting() -> None:
    """Replaces `sys.stdout` and `sys.stderr` where they are this process's own: not those that a test has set."""
    is_open = {descriptor: _is_open(descriptor) for descriptor in (0, 1, 2)}
    for descriptor in (0, 1, 2):
        if not is_open[descriptor]:  # else the next file that is opened becomes standard output
            _become(descriptor, os.open(os.devnull, os.O_RDWR))
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    for descriptor, name in _STREAMS.items():
        stream: TextIO | None = getattr(sys, name)
        if stream is None and is_open[descriptor]:  # something else has that number by now
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif stream is None or _is_own(stream, descriptor):
            setattr(sys, name, _lasting(stream, descriptor))


@contextmanager
def goes_on_in(log: Path) -> Iterator[None]:
    """While in it, the output of a stream that fails goes on in the file `log`, which says so once a stream.

    What has failed before goes on there, too.
    """
    global _log
    before, _log = _log, log
    try:
        for descriptor, reason in _lost.items():
            _go_on(descriptor, reason)
        yield
    finally:
        _log = before


def why_lost(stream: object) -> str | None:
    """The reason why the standard stream `stream` does not write any more to where it began; None: it does."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return _lost.get(stream.fileno())  # type: ignore[attr-defined]  # pyrefly: ignore[missing-attribute]
    return None


class _LastingFile(io.RawIOBase):
    """A descriptor that takes all that it is given."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.name = f"<{_STREAMS[descriptor]}>"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # pyrefly: ignore[bad-override]
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made the terminal that they share so
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                _give_up(self._descriptor, error)


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding = "utf-8" if stream is None else stream.encoding
    is_line_buffered = descriptor == 2 or (stream is not None and getattr(stream, "line_buffering", False))
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor)),  # pyrefly: ignore[bad-specialization]
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=is_line_buffered,
    )


def _is_own(stream: TextIO, descriptor: int) -> bool:
    try:
        if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _LastingFile):
            return False  # done before
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _give_up(descriptor: int, error: OSError) -> None:
    """Moves a descriptor that cannot be written: to the log, and if that fails to the null device."""
    if descriptor in _lost:
        _become(descriptor, os.open(os.devnull, os.O_WRONLY))
        return
    _lost[descriptor] = error.strerror or str(error)
    _become(descriptor, os.open(os.devnull, os.O_WRONLY))
    _go_on(descriptor, _lost[descriptor])


def _go_on(descriptor: int, reason: str) -> None:
    if _log is None:
        return
    with contextlib.suppress(OSError):  # without a folder, a link to elsewhere, or full: there is nowhere to say so
        refuse_links(_log.parent, _log.parent.parent)
        _become(descriptor, open_growing(_log))
        os.write(descriptor, f"{_STREAMS[descriptor]} failed ({reason}) and goes on here\n".encode())


def _become(descriptor: int, opened: int) -> None:
    """Makes `descriptor` what `opened` is, for children too."""
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    else:
        os.set_inheritable(descriptor, True)
