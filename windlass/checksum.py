"""CRC32C (Castagnoli et al. 1993; polynomial 0x1EDC6F41, as in iSCSI and ext4): finds damage, not forgery.

It finds every error within 32 adjacent bits, and of the others all but one in 2^32. ISA-L computes it at twice the
speed of a copy; the `crc32c` package (LGPL, so only where there is no ISA-L) at that of a copy. Both release the GIL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np

from windlass import isal

if TYPE_CHECKING:
    from windlass.isal import Memory

_CALL_BYTES = 1 << 30
"""ISA-L takes lengths as an int."""


def crc32c(buffer: Memory, value: int = 0) -> int:
    """The checksum of `buffer`, or, of what `value` is the checksum of followed by `buffer`.

    Args:
        buffer: contiguous memory of any length: a CPU tensor, memoryview, mmap, bytes.
        value: the checksum so far.

    Raises:
        ValueError: the memory is not contiguous, or on a device.
        RuntimeError: neither ISA-L nor the package `crc32c` is installed.
    """
    data = isal.byte_array(buffer, "buffer")
    library = isal.load()
    if library is None:
        return _package_crc32c(data, value)
    register = value ^ 0xFFFFFFFF
    for start in range(0, data.size, _CALL_BYTES):
        part = data[start : start + _CALL_BYTES]
        register = library.crc32_iscsi(isal.address(part), part.size, register)
    return register ^ 0xFFFFFFFF


def _package_crc32c(data: np.ndarray, value: int) -> int:
    try:
        package = importlib.import_module("crc32c")
    except ImportError as error:
        raise RuntimeError(f"there is nothing to compute CRC32C with: {isal.FIX}, or pip install crc32c") from error
    return package.crc32c(data, value)
