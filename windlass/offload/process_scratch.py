"""Folders that belong to one process and do not outlive it, below one that processes and runs may share.

A lock that its process holds tells a folder of the living from what a killed process has left, which the next process
removes. The system lets go of the lock when the process dies, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import weakref
from pathlib import Path

LOCK = "windlass.lock"
"""The lock file, held by the process that a folder belongs to as long as it lives."""

_NAME = re.compile(r".+\.[0-9a-f]{16}")

logger = logging.getLogger(__name__)


class ProcessScratch:
    """A new folder `parent`/`name`.<random> that only this user can open, for files.

    It is removed at the end of the program at the latest, unless the process is killed.

    Raises:
        OSError: it cannot be made or locked.
    """

    def __init__(self, parent: Path, name: str) -> None:
        self.path, self._lock = _make_locked(parent, name)
        self._removal = weakref.finalize(self, _remove_and_unlock, self.path, self._lock)
        _held.add(self)

    @property
    def is_held(self) -> bool:
        """True while it is this process's."""
        return self._removal.alive

    def remove(self) -> None:
        """Removes the folder with its files, which nothing may use any more."""
        self._removal()

    def _leave_to_parent(self) -> None:
        if self._removal.detach() is not None:
            os.close(self._lock)


_held: weakref.WeakSet[ProcessScratch] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked process, such as a data loader's, must not hold the lock when its parent is dead, nor remove files."""
    for folder in _held:
        folder._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


def _make_locked(folder: Path, name: str) -> tuple[Path, int]:
    """A new folder that only this user can open, and the descriptor of its lock, which is held."""
    while True:
        path = folder / f"{name}.{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            lock = _try_lock(path, os.O_CREAT)
        except FileNotFoundError:
            lock = None
        except OSError:
            _remove_folder(path)
            raise
        if lock is not None:
            if (path / LOCK).exists():
                return path, lock
            os.close(lock)
        # Another process that has just started took it for what a dead one had left.


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that are dead have left, of this run and of others."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # somebody else removes it
            if not _NAME.fullmatch(path.name) or path.lstat().st_uid != os.getuid():
                continue
            try:
                lock = _try_lock(path)
            except FileNotFoundError:
                with contextlib.suppress(OSError):  # not empty: somebody else's
                    path.rmdir()
                continue
            if lock is not None:
                logger.info("removing %s, which a process that was killed has left", path)
                _remove_and_unlock(path, lock)


def _try_lock(folder: Path, more_flags: int = 0) -> int | None:
    """The descriptor of the folder's lock; None if a process holds it. Raises FileNotFoundError if it has none."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | more_flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _remove_and_unlock(folder: Path, lock: int) -> None:
    try:
        _remove_folder(folder)
    finally:
        os.close(lock)


def _remove_folder(folder: Path) -> None:
    """Removes a folder of files, its lock last: what a kill in between leaves is still told from what others own."""
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        return  # somebody else has removed it
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
