"""Says what an error of the operating system means for the user: a limit that is met or a permission, never damage."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from windlass.errors import SystemLimit

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of what is not there, or is not what it was: damage to files that were written. All else may pass."""


def said(error: OSError) -> str:
    """The system's words for it."""
    return error.strerror or str(error) or type(error).__name__


def remedy(error: OSError, otherwise: str) -> str:
    """Says what the user can do about it, and names the limit that was met; `otherwise` where none is known."""
    if error.errno == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"allow this process more open files than {soft}: `ulimit -n 4096`"
    if error.errno == errno.ENFILE:
        return "allow this machine more open files: `sysctl fs.file-max`"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return "free memory of this machine or its container, or raise `ulimit -v`, and start again"
    if error.errno == errno.EFBIG:
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = "the file system's limit" if soft == resource.RLIM_INFINITY else f"{soft} bytes: `ulimit -f unlimited`"
        return f"make room for larger files than {limit}"
    if error.errno == errno.EDQUOT:
        return "make room within your quota, and start again"
    if error.errno in (errno.EACCES, errno.EPERM):
        name = error.filename if isinstance(error.filename, str | bytes) else None
        return f"mend the permissions{f' of {os.fsdecode(name)}' if name else ''} and start again"
    return otherwise


def limit_met(error: BaseException) -> SystemLimit | None:
    """The limit of the system or the machine that `error` tells of, as a message for the user; None if of none."""
    if isinstance(error, OSError) and error.errno in _LIMITS:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "this run"
        fix = remedy(error, "make room there")
        return SystemLimit("system", name, f"met a limit: {said(error)}", f"{fix}; the same command goes on from there")
    # torch has no class of its own for want of memory on the host.
    if isinstance(error, MemoryError) or (type(error) is RuntimeError and "can't allocate memory" in str(error)):
        fix = "use a smaller model or batch (`windlass plan` forecasts them), free memory, or raise `ulimit -v`"
        return SystemLimit("system", "memory", "the system does not give as much as this run needs", fix)
    return None


@contextmanager
def limits_named() -> Iterator[None]:
    """Raises `SystemLimit` where the body raises what tells of a limit, wherever it was met."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        named = limit_met(error)
        if named is None:
            raise
        raise named from error


_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_open_files(least: int) -> None:
    """Sees that this process and its children may have so many files open, as far as the user is allowed to.

    Raises:
        SystemLimit: they may not. Later it would be an error of whatever library meets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return
    if hard != resource.RLIM_INFINITY and hard < least:
        raise SystemLimit(
            "ulimit -n",
            hard,
            f"a job of these ranks needs at least {least} open files",
            "start it after `ulimit -n 4096`",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
