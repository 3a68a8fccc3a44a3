"""Files as memory, without a descriptor a file: a run reads from thousands of shards and chunks. Torch-free."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import weakref
from pathlib import Path

from windlass.untrusted import Malformed

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path, copy_on_write: bool = False, begin: int = 0, size: int | None = None) -> memoryview:
    """The bytes of a regular file, for as long as something refers to them. A pipe or a device is not waited for.

    Python's own maps keep a descriptor each, and Arrow's too.

    Args:
        copy_on_write: they may be written to, which the file does not see. Else they are read-only.
        begin: the first of them.
        size: how many; None: to the end of the file.

    Raises:
        Malformed: it is no regular file, or shorter.
        OSError: it is not there, or the system does not map it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise Malformed("it is no regular file")
        size = status.st_size - begin if size is None else size
        if size < 0 or begin + size > status.st_size:
            raise Malformed(f"it has {status.st_size:,} bytes, and {begin + max(0, size):,} are expected")
        if size == 0:  # cannot be mapped
            return memoryview(b"")
        before = begin % mmap.ALLOCATIONGRANULARITY
        access, flags = mmap.PROT_READ, mmap.MAP_SHARED
        if copy_on_write:
            access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
        address = _LIBC.mmap(None, before + size, access, flags, descriptor, begin - before)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
    data = (ctypes.c_ubyte * (before + size)).from_address(address)
    unmap = weakref.finalize(data, _LIBC.munmap, address, before + size)
    unmap.atexit = False  # type: ignore[misc]  # other finalizers may still read it then
    view = memoryview(data).cast("B")[before:]
    return view if copy_on_write else view.toreadonly()
