"""Files and folders that windlass writes: whole or not at all, and never through a symbolic link. Torch-free.

A run's folder, a checkpoint's, prepared data and their like may come from somebody else, with links under the names
that are written. The folder itself may be a link, or lie below one: users link disks. What is inside of it may not.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` when the body ends well, with its bytes on the disk.

    A link of that name is replaced, not followed. `make_folder` sees to the folders above.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_growing(path: Path) -> int:
    """The descriptor of a log or a lock that is there or is made, to read and to append to.

    Raises:
        OSError: it cannot be made or opened; with ELOOP if it is a link, with EINVAL if it is no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise _is_link(path) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):  # a pipe would wait for whoever reads it
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no regular file", str(path))
    return descriptor


def make_folder(folder: Path, below: Path) -> None:
    """Makes `folder`, which is `below` or inside of it, and those between them, where they are missing.

    Raises:
        OSError: one cannot be made, or is no folder; with ELOOP if one inside of `below` is a link.
    """
    below.mkdir(parents=True, exist_ok=True)
    refuse_links(folder, below)
    folder.mkdir(parents=True, exist_ok=True)


def refuse_links(path: Path, below: Path) -> None:
    """Raises OSError with ELOOP if `path`, or a folder between it and `below`, is a symbolic link."""
    for part in (path, *path.parents):
        if part == below:
            return
        if part.is_symlink():
            raise _is_link(part)
    raise ValueError(f"{path} is not inside of {below}")


def _is_link(path: Path) -> OSError:
    rule = f"{path.name} is a symbolic link, and inside of a folder that windlass writes none is followed"
    return OSError(errno.ELOOP, rule, str(path))


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, as fsync does for the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/windlass`, or `~/.cache/windlass`; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(given).expanduser() / "windlass"
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None


def real_path(path: Path) -> Path:
    """The place that `path` names, links followed.

    A link that leads to itself stays, and whoever uses it is told by the system; `Path.resolve` raises a RuntimeError.
    """
    return Path(os.path.realpath(path))
