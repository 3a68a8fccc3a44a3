"""Checkpoints in a folder: files that get their names when all of their bytes are on the disk.

Large files are written past the page cache (O_DIRECT) where the file system takes that: the copy into the cache, and
the pages that it drives out, cost several times the CPU of the write itself, and that CPU is the trainers'.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from windlass import isal
from windlass.checkpoint.image import PAGE_BYTES, round_up
from windlass.files import TEMPORARY_SUFFIX, make_folder, refuse_links, sync_folder
from windlass.mapped_file import map_file
from windlass.untrusted import MAX_BYTES, Malformed, read_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIRECT_MIN_BYTES = 1 << 20
"""Smaller files go through the page cache: they are read again soon, and are not worth their own trip to the disk."""
WRITE_BYTES = 16 << 20
REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Another file system, or one without links, or enough of them."""
O_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has none (macOS): files then go through the page cache."""


class LocalStorage:
    """A folder of a file system that renames atomically, of this machine or shared by several."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def make(self) -> None:
        self.location.mkdir(parents=True, exist_ok=True)
        folders = [path for path in self.location.iterdir() if path.is_dir() and not path.is_symlink()]
        for folder in (self.location, *folders):
            for path in folder.glob("*" + TEMPORARY_SUFFIX):
                path.unlink()

    def write(self, name: str, parts: Iterable[Buffer], guard: Callable[[], None] | None = None) -> None:
        path = self.location / name
        self._make_folder(path.parent)
        temporary = _temporary(path)
        try:
            _write_file(temporary, [memoryview(part).cast("B") for part in parts])
            if guard is not None:
                guard()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def adopt(self, name: str, file: Path) -> bool:
        path = self.location / name
        self._make_folder(path.parent)
        temporary = _temporary(path)
        try:
            temporary.hardlink_to(file)
        except OSError as error:
            if error.errno in CANNOT_LINK:
                return False
            raise
        try:
            # As a file that is made here: the one that is linked may be for its owner alone.
            temporary.chmod(path.parent.stat().st_mode & 0o666)
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # a rename to another name of the same file leaves both
        sync_folder(path.parent)
        return True

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        try:
            return read_bytes(self.location / name, max_bytes)
        except Malformed as error:
            raise Malformed(f"{name}: {error}") from None

    def open(self, name: str, max_bytes: int | None = None) -> memoryview:
        # Copy on write: torch takes no read-only memory, and nobody writes to it.
        return map_file(self.location / name, copy_on_write=True)

    def size(self, name: str) -> int | None:
        try:
            return (self.location / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> list[str]:
        folder = self.location / prefix
        if not folder.is_dir():
            return []
        return sorted(path.relative_to(self.location).as_posix() for path in folder.iterdir())

    def delete(self, names: Sequence[str]) -> None:
        paths = [self.location / name for name in names]
        for folder in {path.parent for path in paths}:
            refuse_links(folder, self.location)
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        for folder in {path.parent for path in paths}:
            if folder.is_dir():
                sync_folder(folder)
                if folder != self.location and not any(folder.iterdir()):
                    folder.rmdir()
                    sync_folder(folder.parent)

    def move(self, source: str, target: str) -> None:
        (self.location / source).rename(self.location / target)
        sync_folder((self.location / target).parent)

    def _make_folder(self, folder: Path) -> None:
        is_new = not folder.is_dir()
        make_folder(folder, self.location)
        if is_new:
            sync_folder(folder.parent)


def _temporary(path: Path) -> Path:
    """A name of its own: ranks of several nodes may write the same file at the same time."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _write_file(path: Path, parts: Sequence[memoryview]) -> None:
    """Writes and syncs the new file `path`."""
    if O_DIRECT and sum(part.nbytes for part in parts) >= DIRECT_MIN_BYTES:
        try:
            _write_and_sync(path, parts, os.O_CREAT | os.O_EXCL | O_DIRECT, _write_direct)
            return
        except OSError as error:
            if error.errno not in REFUSES_DIRECT:
                raise
        path.unlink(missing_ok=True)
    _write_and_sync(path, parts, os.O_CREAT | os.O_EXCL, _write_buffered)


def _write_and_sync(
    path: Path, parts: Sequence[memoryview], flags: int, write: Callable[[int, Sequence[memoryview]], None]
) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags, 0o666)
    try:
        write(descriptor, parts)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_buffered(descriptor: int, parts: Sequence[memoryview]) -> None:
    for part in parts:
        _write_all(descriptor, part)


def _write_direct(descriptor: int, parts: Sequence[memoryview]) -> None:
    """Writes through O_DIRECT, which takes whole pages at page addresses only.

    Pages of the parts that lie so are written from where they are. The rest goes through a buffer of such pages, whose
    padding is cut off at the end.
    """
    buffer = memoryview(mmap.mmap(-1, DIRECT_MIN_BYTES))
    filled = 0
    for part in parts:
        is_aligned = isal.address(isal.byte_array(part, "part")) % PAGE_BYTES == 0
        done = 0
        while done < part.nbytes:
            whole = (part.nbytes - done) // PAGE_BYTES * PAGE_BYTES
            if is_aligned and whole and filled == 0:
                _write_all(descriptor, part[done : done + whole])
                done += whole
                continue
            size = min(part.nbytes - done, DIRECT_MIN_BYTES - filled)
            buffer[filled : filled + size] = part[done : done + size]
            filled, done = filled + size, done + size
            if filled == DIRECT_MIN_BYTES or (done == part.nbytes and filled % PAGE_BYTES == 0):
                _write_all(descriptor, buffer[:filled])
                filled = 0
    if filled:
        _write_all(descriptor, buffer[: round_up(filled, PAGE_BYTES)])
        os.ftruncate(descriptor, sum(part.nbytes for part in parts))


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]
