"""Files read and written past the page cache, in parts that a few threads carry out.

A tier is read once and written once a step, so caching it only costs a copy and drives out what else is in memory.
`os.preadv` and `os.pwritev` release the GIL, so plain threads keep the disk's queue full while the trainer computes.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from windlass.errors import OffloadError

PAGE_BYTES = 4096
"""Addresses, offsets and lengths of direct transfers are multiples of it."""
O_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has none (macOS): files then go through the page cache."""
REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
OWNER_ONLY = 0o600
NUM_THREADS = 8
"""The fastest of 1, 2, 4 and 8 each way (`benchmarks/direct_io.py`); the CPU is the same for all."""

_FIXES = {
    errno.ENOSPC: "free space there, or set offload.dir to a disk with more",
    errno.EDQUOT: "free some of your quota there, or set offload.dir to another disk",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or set offload.dir to another file system",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EROFS: "set offload.dir to a folder that can be written",
    errno.EACCES: "set offload.dir to a folder that this user can write",
    errno.EPERM: "set offload.dir to a folder that this user can write",
    errno.ENOENT: "leave offload.dir alone while the run is on, and resume from the last checkpoint",
    errno.ESTALE: "leave offload.dir alone while the run is on, and resume from the last checkpoint",
}
_CHECK_DISK = "see what the system says about the disk (`dmesg`), and resume from the last checkpoint"


def disk_error(path: Path, what: str, error: OSError, fix: str | None = None) -> OffloadError:
    """An OffloadError: `what`, as "cannot read 10 bytes at 0", failed at `path`. `fix`: if not the usual one."""
    rule = f"{what}: {error.strerror or error}"
    return OffloadError("offload.dir", path, rule, fix or _FIXES.get(error.errno or 0, _CHECK_DISK))


def round_to_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class IOFigures:
    """The bytes that an engine's files have moved so far, and the seconds that threads were in the system's calls."""

    def __init__(self) -> None:
        self.read_bytes, self.write_bytes = 0, 0
        self.read_s, self.write_s = 0.0, 0.0
        self._lock = threading.Lock()

    def add_read(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.read_bytes += num_bytes
            self.read_s += seconds

    def add_write(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.write_bytes += num_bytes
            self.write_s += seconds


class Transfer:
    """Work that is under way in an engine's threads, of one or several parts."""

    def __init__(self, num_parts: int) -> None:
        self._num_left = num_parts
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if num_parts == 0:
            self._done.set()

    @property
    def is_done(self) -> bool:
        """True if all parts have ended, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Returns when all parts have ended.

        Raises:
            OffloadError: the disk failed; of several errors, the first.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Returns when all parts have ended, well or not."""
        self._done.wait()

    def _end_part(self, error: BaseException | None) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._done.set()


class Engine:
    """A few threads that carry out transfers in the order in which they were submitted.

    Args:
        num_threads: how many parts are under way at a time: the depth of the disk's queue.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self.figures = IOFigures()
        self._parts: queue.SimpleQueue[tuple[Callable[[], None], Transfer] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._pid = os.getpid()
        self._threads = [
            # A program that ends does not wait for them: what they write is worth nothing without it.
            threading.Thread(target=_serve, args=(self._parts,), name=f"windlass-io-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, *work: Callable[[], None]) -> Transfer:
        """Gives all of `work` to the threads, in any order.

        Raises:
            RuntimeError: the engine is closed, or of the process that this one was forked from.
        """
        if self._is_closed or self._pid != os.getpid():
            raise RuntimeError("the engine is closed" if self._is_closed else "the engine's threads were not forked")
        transfer = Transfer(len(work))
        for part in work:
            self._parts.put((part, transfer))
        return transfer

    def close(self) -> None:
        """Ends the threads once all that was submitted is done."""
        if self._is_closed or self._pid != os.getpid():
            return
        self._is_closed = True
        for _ in self._threads:
            self._parts.put(None)
        for thread in self._threads:
            thread.join()


def _serve(parts: queue.SimpleQueue[tuple[Callable[[], None], Transfer] | None]) -> None:
    while (item := parts.get()) is not None:
        work, transfer = item
        try:
            work()
        except BaseException as error:
            transfer._end_part(error)
        else:
            transfer._end_part(None)
        del item, work, transfer  # or they would live, with their buffers, until the next part comes


class DirectFile:
    """One open file; its length is `num_bytes` rounded up to whole pages.

    Args:
        path: of a file that is not there yet.
        num_bytes: for which the file gets its space now, so that no write can fail for want of it.
        direct: past the page cache; the file system must take that (see `why_not_direct`).
        figures: what to count transfers in.

    Raises:
        OSError: it cannot be made; nothing of it is left then.
    """

    def __init__(self, path: Path, num_bytes: int, direct: bool, figures: IOFigures) -> None:
        self.path, self.is_direct = path, direct
        self._figures = figures
        _make(path, round_to_pages(num_bytes))
        self.descriptor = os.open(path, os.O_RDWR | (O_DIRECT if direct else 0))
        self._closing = weakref.finalize(self, os.close, self.descriptor)
        self._closing.atexit = False  # type: ignore[missing-attribute]  # threads may be at work then

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from the file.

        Args:
            buffer: bytes at a page's address, of any number.
            offset: in the file, a multiple of pages.

        Raises:
            OffloadError: the disk failed, or the file ends too early.
        """
        self._check(buffer, offset)
        begin = time.perf_counter()
        whole, rest, page = _split(buffer)
        done, length = 0, whole.nbytes + page.nbytes
        while done < length:
            try:
                count = os.preadv(self.descriptor, _from(done, whole, page), offset + done)
            except OSError as error:
                raise disk_error(self.path, f"cannot read {length} bytes at {offset}", error) from error
            done += count
            # The end of a page or a block: no further call would bring more.
            if count == 0 or count % PAGE_BYTES:
                break
        if done < length:
            rule = f"ends at byte {offset + done}, in the middle of what was written: something has cut it"
            raise OffloadError("offload.dir", self.path, rule, _FIXES[errno.ENOENT])
        rest[:] = page[: rest.nbytes]
        self._figures.add_read(length, time.perf_counter() - begin)

    def write_from(self, buffer: memoryview, offset: int) -> None:
        """Writes `buffer` to the file; the rest of its last page becomes zeros.

        Args:
            buffer: bytes at a page's address, of any number.
            offset: in the file, a multiple of pages.

        Raises:
            OffloadError: the disk failed.
        """
        self._check(buffer, offset)
        begin = time.perf_counter()
        whole, rest, page = _split(buffer)
        page[: rest.nbytes] = rest
        done, length = 0, whole.nbytes + page.nbytes
        while done < length:
            try:
                count = os.pwritev(self.descriptor, _from(done, whole, page), offset + done)
            except OSError as error:
                raise disk_error(self.path, f"cannot write {length} bytes at {offset}", error) from error
            # Direct writes go on at a page: what was written of a page is written again.
            done += count // PAGE_BYTES * PAGE_BYTES
            if count < PAGE_BYTES:
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise disk_error(self.path, f"cannot write {length} bytes at {offset}", full)
        self._figures.add_write(length, time.perf_counter() - begin)

    def num_links(self) -> int:
        """The number of names that the file has."""
        return os.fstat(self.descriptor).st_nlink

    def close(self) -> None:
        """To be called when nothing of the file is under way. What comes after fails."""
        self._closing()
        self.descriptor = -1  # the system gives the number to the next file that is opened

    @staticmethod
    def _check(buffer: memoryview, offset: int) -> None:
        assert buffer.itemsize == 1 and offset % PAGE_BYTES == 0


def _split(buffer: memoryview) -> tuple[memoryview, memoryview, memoryview]:
    """The whole pages of a buffer, the bytes after them, and a page of its own for those if there are any."""
    length = buffer.nbytes // PAGE_BYTES * PAGE_BYTES
    page = memoryview(mmap.mmap(-1, PAGE_BYTES)) if length < buffer.nbytes else memoryview(bytearray())
    return buffer[:length], buffer[length:], page


def _from(done: int, whole: memoryview, page: memoryview) -> list[memoryview]:
    """The rest of the two after `done` bytes."""
    parts = [whole[done:], page[max(0, done - whole.nbytes) :]]
    return [part for part in parts if part.nbytes]


def _make(path: Path, num_bytes: int) -> None:
    """A new file whose space is taken. Not through O_DIRECT: where the file system cannot, the C library writes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    try:
        if hasattr(os, "posix_fallocate") and num_bytes:
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.ftruncate(descriptor, num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def why_not_direct(folder: Path) -> str | None:
    """Why files of `folder` cannot be read and written past the page cache; None if they can.

    Raises:
        OffloadError: they cannot be written at all.
    """
    if not O_DIRECT:
        return "this system has no O_DIRECT"
    path = folder / f"probe-{secrets.token_hex(4)}"
    page = memoryview(mmap.mmap(-1, PAGE_BYTES))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_DIRECT, OWNER_ONLY)
        try:
            os.pwritev(descriptor, [page], 0)
            os.preadv(descriptor, [page], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in REFUSES_DIRECT:
            raise disk_error(folder, "cannot write there", error) from error
        return f"the file system refuses O_DIRECT ({error.strerror})"
    finally:
        path.unlink(missing_ok=True)
    return None
