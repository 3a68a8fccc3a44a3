"""ISA-L, Intel's storage library (https://github.com/intel/isa-l), through ctypes, which releases the GIL in each call.

The wheel of `pyeclib` carries the library for Linux on x86-64 and ARM. pyeclib's own interface copies every shard, so
it is never imported. Where the wheel is not installed, a library of the system serves.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, c_char_p, c_int, c_ubyte, c_uint, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    Memory = Buffer | np.ndarray | torch.Tensor
    """A contiguous CPU tensor, or anything with the buffer protocol: memoryview, mmap, bytearray, array."""

FIX = "pip install pyeclib (its wheel carries ISA-L), or install libisal.so.2 on the system"
XOR_ALIGNMENT = 32
"""Bytes at whose multiples all buffers of `xor_gen` must begin."""

_SYSTEM_NAMES = ("libisal.so.2", "libisal.2.dylib")
_FUNCTIONS = {
    # int k, int rows, unsigned char *coefficients, unsigned char *tables
    "ec_init_tables": (None, [c_int, c_int, c_char_p, POINTER(c_ubyte)]),
    # int length, int k, int rows, unsigned char *tables, unsigned char **sources, unsigned char **targets
    "ec_encode_data": (None, [c_int, c_int, c_int, POINTER(c_ubyte), POINTER(c_void_p), POINTER(c_void_p)]),
    # int length, int k, int rows, int column, unsigned char *tables, unsigned char *source, unsigned char **targets
    "ec_encode_data_update": (None, [c_int, c_int, c_int, c_int, POINTER(c_ubyte), c_void_p, POINTER(c_void_p)]),
    # int num_vectors, int length, void **sources_and_target; not 0 if it refuses
    "xor_gen": (c_int, [c_int, c_int, POINTER(c_void_p)]),
    # unsigned char *buffer, int length, unsigned int register
    "crc32_iscsi": (c_uint, [c_void_p, c_int, c_uint]),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library with its prototypes, from pyeclib's wheel or else the system; None if neither has it whole."""
    for path in [*_in_wheel(), *_SYSTEM_NAMES]:
        try:
            library = ctypes.CDLL(path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):  # not there, or so old that it lacks a function
            continue
        return library
    return None


def _in_wheel() -> list[str]:
    spec = find_spec("pyeclib")  # of a package at the top: found without running a line of it
    places = spec.submodule_search_locations if spec is not None else None
    return [str(path) for place in places or () for path in sorted(Path(place).parent.glob("pyeclib.libs/libisal*"))]


def byte_array(buffer: Memory, name: str, writable: bool = False) -> np.ndarray:
    """The memory of `buffer` as a uint8 array of one dim, shared with it.

    Args:
        buffer: a tensor of the CPU, or anything with the buffer protocol: memoryview, mmap, bytearray, bytes, array.
        name: what to call it in an error.
        writable: refuse memory that cannot be written.

    Raises:
        ValueError: it is on a device, not contiguous, or read-only where `writable`.
        TypeError: it holds no memory.
    """
    torch = sys.modules.get("torch")  # who has a tensor has imported it; agents never do
    if torch is not None and isinstance(buffer, torch.Tensor):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError(f"{name} must be a contiguous tensor of the CPU")
        buffer = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(cast("Buffer", buffer))
    if not view.c_contiguous:
        raise ValueError(f"{name} must be contiguous")
    if writable and view.readonly:
        raise ValueError(f"{name} is read-only")
    return np.frombuffer(view, np.uint8)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
