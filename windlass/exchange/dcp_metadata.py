"""The table of contents of a torch.distributed.checkpoint (DCP) folder, read without running anything it brings.

DCP keeps the table in `.metadata` as a pickle, and torch reads it with `pickle.load`, which calls whatever the file
names. Here `plain_pickle` turns the few classes of such a table into inert records, looks nothing else up, and refuses
a file that names anything else. What it found is then checked field by field.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.tiling import MAX_DIMS, MAX_ELEMENTS, tiling_problem
from windlass.errors import ConfigError, CorruptCheckpoint
from windlass.exchange import plain_pickle
from windlass.exchange.folder import not_given
from windlass.exchange.plain_pickle import Record
from windlass.os_errors import MISSING
from windlass.untrusted import Malformed, read_bytes

METADATA = ".metadata"
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)


@dataclass(frozen=True)
class ByteRange:
    """A range of bytes of a file of the folder: a `torch.save` stream."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Part:
    """The block of a tensor that starts at `offset` and has `shape`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    byte_range: ByteRange


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part]


@dataclass(frozen=True)
class Contents:
    """The entries of a folder, by flat name.

    Attributes:
        values: what is not a tensor.
        paths: the keys that led to an entry of the nested state dict, e.g. ("model", "layers.0.weight"), -> its name.
    """

    tensors: dict[str, StoredTensor]
    values: dict[str, ByteRange]
    paths: dict[tuple[str | int, ...], str]


class _Table(Record): ...


class _Tensor(Record): ...


class _Value(Record): ...


class _Chunk(Record): ...


class _Properties(Record): ...


class _Index(Record): ...


class _StorageInfo(Record): ...


def _size(value: Any) -> tuple[int, ...]:
    return _sizes(value)


def _ordered() -> dict[str, Any]:
    return {}


ByteRanges = dict[tuple[str, tuple[int, ...] | None], ByteRange]
"""The ranges by the name of an entry, and the offset of a part of a tensor."""
ADMITTED: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): _Table,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Tensor,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Value,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): _Chunk,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Properties,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,  # of older torch
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Record,
    # What no reader needs: the layout and memory format of tensors, who saved, and the path of the folder then.
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): Record,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "WindowsPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
    ("pathlib._local", "WindowsPath"): Record,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _ordered,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
}
"""Every global that a table may name, and what is taken for it."""


def read_contents(folder: Path) -> Contents:
    """Reads the table of contents of a DCP folder. Runs nothing that its files bring.

    Raises:
        ConfigError: it is no DCP folder, or was saved in a way that is not read.
        CorruptCheckpoint: `.metadata` is no table of contents, or names what none needs.
    """
    try:
        data = read_bytes(folder / METADATA)
    except MISSING:
        raise ConfigError(
            "path",
            folder,
            f"is not a folder of torch.distributed.checkpoint: it has no {METADATA}",
            "name the folder that `dcp.save` wrote, with all that is in it",
        ) from None
    except Malformed as error:
        raise damaged(folder, f"{METADATA} cannot be used: {error}") from None
    except OSError as error:
        raise not_given(folder / METADATA, error) from error
    try:
        table = plain_pickle.load(data, ADMITTED)
    except plain_pickle.Refused as error:
        raise damaged(folder, f"{METADATA} is refused: {error}") from None
    try:
        return _contents(table)
    except Malformed as error:
        raise damaged(folder, f"{METADATA} is not a table of contents: {error}") from None


def _contents(table: Any) -> Contents:
    _require(isinstance(table, _Table), "no entries")
    entries, storage = table.field("state_dict_metadata"), table.field("storage_data")
    _require(isinstance(entries, dict) and isinstance(storage, dict), "no entries")
    byte_ranges: ByteRanges = {}
    for index, info in storage.items():
        _require(isinstance(index, _Index), "its places are of no entries")
        offset = index.field("offset")
        byte_ranges[_name(index.field("fqn")), None if offset is None else _sizes(offset)] = _byte_range(info)
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, ByteRange] = {}
    num_parts = 0
    for name, entry in entries.items():
        _name(name)
        if isinstance(entry, _Tensor):
            chunks = entry.field("chunks")
            _require(isinstance(chunks, list), f"it does not say what the parts of {name} are")
            num_parts += len(chunks)  # a file may have one list of parts for many tensors
            _require(num_parts <= len(byte_ranges), "its tensors have more parts than it has places")
            tensors[name] = _tensor(name, entry, chunks, byte_ranges)
        else:
            _require(isinstance(entry, _Value) and (name, None) in byte_ranges, f"it does not say where {name} is")
            values[name] = byte_ranges[name, None]
    nested = table.field("planner_data")
    paths = {_path(nested[name]) if isinstance(nested, dict) and name in nested else (name,): name for name in entries}
    return Contents(tensors, values, paths)


def _tensor(name: str, entry: _Tensor, chunks: list[Any], byte_ranges: ByteRanges) -> StoredTensor:
    shape, properties = _sizes(entry.field("size")), entry.field("properties")
    state = properties.state if isinstance(properties, _Properties) else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(dtype, torch.dtype):
        raise Malformed(f"{name} has no dtype")
    _require(all(isinstance(chunk, _Chunk) for chunk in chunks), f"it does not say what the parts of {name} are")
    blocks = [(_sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))) for chunk in chunks]
    problem = tiling_problem(shape, blocks)
    _require(problem is None, f"{name} {problem}")
    _require(all((name, offset) in byte_ranges for offset, _ in blocks), f"it does not say where {name} is")
    return StoredTensor(shape, dtype, [Part(offset, size, byte_ranges[name, offset]) for offset, size in blocks])


def _byte_range(info: Any) -> ByteRange:
    _require(isinstance(info, _StorageInfo), "it does not say where its entries are")
    file, begin, length = info.field("relative_path"), info.field("offset"), info.field("length")
    is_inside = isinstance(file, str) and Path(file).name == file and file not in ("", "..") and file.isprintable()
    _require(is_inside, f"{file!r} is no file of the folder")
    _require(not info.field("transform_descriptors"), "its entries are transformed (compressed, perhaps)")
    _sizes((begin, length))
    return ByteRange(file, begin, length)


def _name(value: Any) -> str:
    _require(isinstance(value, str) and value.isprintable(), "an entry has no name, or one that cannot be shown")
    return value


def _path(value: Any) -> tuple[str | int, ...]:
    is_path = isinstance(value, list | tuple) and 0 < len(value) <= MAX_DIMS
    _require(is_path and all(isinstance(key, str | int) for key in value), "an entry has no place in the state dict")
    return tuple(value)


def _sizes(value: Any) -> tuple[int, ...]:
    is_short = isinstance(value, list | tuple) and len(value) <= MAX_DIMS
    _require(is_short and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value), "it has no sizes")
    return tuple(value)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise Malformed(rule)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def damaged(folder: Path, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("path", folder, what, "copy the folder again, whole, from where `dcp.save` wrote it")
