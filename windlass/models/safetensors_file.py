"""Reads safetensors files that somebody else has written: the header first, each tensor when it is wanted.

The format (https://huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header, and raw bytes. The
`safetensors` library keeps a file mapped as long as it is open, and says of every error of the system that the file is
missing. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from windlass.checkpoint.durable.chunk_file import MAX_HEADER_BYTES
from windlass.checkpoint.tiling import shape_problem
from windlass.mapped_file import map_file
from windlass.untrusted import Malformed, convert, parse_json

METADATA = "__metadata__"
"""The key of a header that is no tensor."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    """As the format has it: `F32`."""
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]
    """Where it begins and ends, from the end of the header."""


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    num_bytes: int
    """With the length before it: where the data begin."""


def read_header(path: Path, item_bytes: dict[str, int], max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Reads the header of a file.

    Args:
        item_bytes: dtype -> bytes an element, of those whose lengths are compared with their shapes.
        max_bytes: of the header.

    Raises:
        Malformed: it is no such file, or its tensors are not where it says.
        OSError: the system does not give it.
    """
    length = int.from_bytes(map_file(path, size=8), "little")
    if length > max_bytes:
        raise Malformed(f"its header has {length:,} bytes, and at most {max_bytes:,} are read")
    document = parse_json(bytes(map_file(path, begin=8, size=length)), max_bytes)
    if not isinstance(document, dict):
        raise Malformed("its header is no JSON object")
    num_data = path.stat().st_size - 8 - length
    tensors = {name: convert(value, Entry, name) for name, value in document.items() if name != METADATA}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        _check(name, entry, num_data, item_bytes)
        if entry.data_offsets[0] != end:  # which the format does not allow
            raise Malformed(
                f"{name} begins at byte {entry.data_offsets[0]:,}, and the tensor before it ends at {end:,}"
            )
        end = entry.data_offsets[1]
    if end != num_data:
        raise Malformed(f"it has {num_data:,} bytes of data, and its tensors end at {end:,}")
    return Header(tensors, 8 + length)


def _check(name: str, entry: Entry, num_data: int, item_bytes: dict[str, int]) -> None:
    if not name.isprintable():
        raise Malformed(f"{name[:80]!a} is no name of a tensor")
    problem = shape_problem(entry.shape)
    if problem is not None:
        raise Malformed(f"{name} {problem}")
    if len(entry.data_offsets) != 2 or not 0 <= entry.data_offsets[0] <= entry.data_offsets[1] <= num_data:
        raise Malformed(f"{name} is at {list(entry.data_offsets)} of {num_data:,} bytes of data")
    begin, end = entry.data_offsets
    expected = math.prod(entry.shape) * item_bytes.get(entry.dtype, 0)
    if entry.dtype in item_bytes and end - begin != expected:
        raise Malformed(
            f"{name} has {end - begin:,} bytes, and {entry.dtype} of shape {list(entry.shape)} {expected:,}"
        )
