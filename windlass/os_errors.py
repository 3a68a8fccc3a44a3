"""What an error of the operating system means for the user: a limit that is met or a permission, and never damage."""

from __future__ import annotations

import errno
import os
import resource

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is not there, or is not what it was: of files that were written, damage. All else may pass."""


def said(error: OSError) -> str:
    """The system's words for it."""
    return error.strerror or str(error) or type(error).__name__


def remedy(error: OSError, otherwise: str) -> str:
    """What the user can do about it, as an order: it names the limit that was met. `otherwise` where none is known."""
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
