"""The C library's memory: what is freed goes back to the system.

By default glibc keeps what a program has freed, in pieces up to 32 MiB, for the program's next allocations. What is
moved to a disk would then free nothing that anybody else could use: the process stays as large as without moving.
"""

from __future__ import annotations

import ctypes
import logging

_M_MMAP_THRESHOLD = -3

logger = logging.getLogger(__name__)


def is_glibc() -> bool:
    """True if this process has glibc's malloc."""
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def give_back_free_memory() -> None:
    """Gives the system all whole pages of the heap that are not in use now, also those between others that are.

    Of use where much was allocated in small pieces that will not be again: they leave a heap of holes. Where the C
    library is not glibc it does nothing.
    """
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def free_to_system(min_bytes: int) -> None:
    """Has malloc map each allocation of `min_bytes` or more from now on, and unmap it when it is freed.

    That costs page faults: a step with many short-lived tensors of this size takes somewhat longer. Where the C library
    is not glibc nothing is changed, and the reason logged.
    """
    if not is_glibc() or ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, min_bytes) != 1:
        logger.warning("this system's malloc is not glibc's: memory of what is moved to the disk may stay taken")
