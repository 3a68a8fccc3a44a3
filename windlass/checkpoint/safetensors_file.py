"""Safetensors files, written and read a tensor at a time.

The format (https://huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header, and raw bytes. The
`safetensors` library reads what is written here; it writes only after it has copied every tensor into one Python
bytes object, which doubles the memory of a checkpoint, and it neither syncs to disk nor hashes on the way.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
ALIGNMENT = 64
WRITE_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are (from the start of the file) and their SHA-256."""

    key: str
    begin: int
    end: int
    sha256: str


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[Stored], str]:
    """Writes `tensors` to the new file `path` and syncs it to disk. Tensors of a device are copied one at a time.

    Returns:
        Where each tensor is, and the SHA-256 of everything before the first of them.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors = list(tensors)
    layout, offset = {}, 0
    for key, tensor in tensors:
        layout[key] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)  # so that a map of the file is aligned for every dtype
    preamble = len(header).to_bytes(8, "little") + header
    stored = []
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(preamble))
        begin = len(preamble)
        for key, tensor in tensors:
            data = tensor_bytes(tensor.detach().cpu().contiguous())
            digest = hashlib.sha256()
            for start in range(0, len(data), WRITE_BYTES):
                part = data[start : start + WRITE_BYTES]
                digest.update(part)
                _write_all(file.fileno(), part)
            stored.append(Stored(key, begin, begin + len(data), digest.hexdigest()))
            begin += len(data)
        os.fsync(file.fileno())
    return stored, hashlib.sha256(preamble).hexdigest()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class SafetensorsReader:
    """A mapped file. `read` checks the bytes it returns.

    Raises:
        ValueError: the file is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError(f"{path.name} has {size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        header_bytes = int.from_bytes(self._map[:8], "little")
        if 8 + header_bytes > size:
            raise ValueError(f"{path.name} ends inside its header")
        self.data_begin = 8 + header_bytes
        self.header_sha256 = hashlib.sha256(self._map[: self.data_begin]).hexdigest()
        self.size = size

    def read(self, stored: Stored, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy of one tensor.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        self.check(stored)
        tensor = torch.empty(shape, dtype=dtype)
        tensor_bytes(tensor)[:] = memoryview(self._map)[stored.begin : stored.end]
        return tensor

    def check(self, stored: Stored) -> None:
        """Raises ValueError unless the bytes of a tensor are those that were written."""
        if stored.end > self.size:
            raise ValueError(f"the file ends inside {stored.key}")
        if hashlib.sha256(memoryview(self._map)[stored.begin : stored.end]).hexdigest() != stored.sha256:
            raise ValueError(f"the bytes of {stored.key} have changed")

    def close(self) -> None:
        self._map.close()
