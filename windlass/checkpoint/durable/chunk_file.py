"""A chunk as a file: a safetensors file of whole pages before its data, named by the SHA-256 of all of it.

The format (https://huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header, and raw bytes. The
`safetensors` library reads what is written here; it writes only after it has copied every tensor into one Python
bytes object. The same tensors with the same bytes give the same name, which is how a checkpoint finds what an earlier
one has written already. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from windlass.checkpoint.durable.storage import Storage
from windlass.checkpoint.image import PAGE_BYTES, Entry
from windlass.untrusted import Malformed, parse_json

DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
FOLDER = "chunks"
FILE = re.compile(r"([0-9a-f]{64})\.safetensors")
FILLER = "windlass.filler."
"""The prefix of the names of bytes that mean nothing."""
MAX_HEADER_BYTES = 100_000_000
"""As the `safetensors` library has it."""
Part = tuple[str, str, tuple[int, ...], int, int]
"""A block in a chunk's file: its key, dtype, shape, and where it begins and ends."""
NAMED = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def chunk_name(sha256: str) -> str:
    """Where the storage of the checkpoints has a chunk."""
    return f"{FOLDER}/{sha256}.safetensors"


def chunk_of(name: str) -> str | None:
    """The SHA-256 that `name` is the chunk of; None if it is something else, such as a chunk that was set aside."""
    match = FILE.fullmatch(name.removeprefix(f"{FOLDER}/"))
    return match[1] if match else None


def chunks_named_in(manifest: bytes) -> set[str]:
    """Every SHA-256 in a manifest's text, sound or not: what a damaged one still names must not be deleted either."""
    return {match.decode() for match in NAMED.findall(manifest)}


def preamble(entries: Sequence[Entry]) -> bytes:
    """Everything before the data of a chunk's file: whole pages, so that direct I/O and maps of it are aligned.

    Raises:
        ValueError: two entries are of the same tensor, which would have the same key.
    """
    begin = entries[0].begin
    layout = {entry.spec.name: _described(entry, entry.begin - begin) for entry in entries}
    if len(layout) != len(entries):
        raise ValueError("a chunk has two parts of one tensor")
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE_BYTES)
    return len(header).to_bytes(8, "little") + header


def preamble_of_length(entries: Sequence[Entry], num_bytes: int, length: int) -> bytes | None:
    """The same for data that lie in a file already; None if it does not fit in `length` bytes, or nothing would.

    The format wants every byte of the data to be of some tensor, so what lies between and after the entries is one.

    Args:
        entries: of different tensors, in their order, from the first byte of the data.
        num_bytes: of all data, to the end of the file.
    """
    layout: dict[str, dict[str, Any]] = {}
    end = 0
    for entry in entries:
        if entry.begin > end:
            layout[f"{FILLER}{len(layout)}"] = _filler(end, entry.begin)
        layout[entry.spec.name] = _described(entry, entry.begin)
        end = entry.end
    if num_bytes > end:
        layout[f"{FILLER}{len(layout)}"] = _filler(end, num_bytes)
    header = json.dumps(layout, separators=(",", ":")).encode().ljust(length - 8)
    return (length - 8).to_bytes(8, "little") + header if len(header) == length - 8 else None


def _described(entry: Entry, begin: int) -> dict[str, Any]:
    dtype, shape = DTYPE_CODES[entry.spec.dtype], list(entry.spec.shape)
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + entry.spec.nbytes]}


def _filler(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def open_chunk(storage: Storage, sha256: str, size: int | None = None, parts: Iterable[Part] = ()) -> memoryview:
    """The bytes of a chunk's file, all of them checked.

    Args:
        size: of the file, where that is known.
        parts: blocks that a manifest finds in it: the chunk itself must say that they are there.

    Raises:
        ValueError: they are not those that were written.
        OSError: it is not there, or the system does not give it.
    """
    data = storage.open(chunk_name(sha256), None if size is None else size + 1)
    if size is not None and data.nbytes != size:
        raise ValueError(f"has {'more' if data.nbytes > size else data.nbytes} bytes where {size} were written")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("its bytes have changed")
    _check_layout(data, parts)
    return data


def _check_layout(data: memoryview, parts: Iterable[Part]) -> None:
    parts = list(parts)
    if not parts:
        return
    length = int.from_bytes(data[:8], "little")
    header = parse_json(bytes(data[8 : 8 + length]), MAX_HEADER_BYTES) if 8 + length <= data.nbytes else None
    if not isinstance(header, dict):
        raise Malformed("it has no header of safetensors")
    for key, dtype, shape, begin, end in parts:
        offsets = [begin - 8 - length, end - 8 - length]
        expected = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        if header.get(key) != expected:
            raise ValueError(f"has no {key} of {dtype} and shape {list(shape)} at byte {begin}")
