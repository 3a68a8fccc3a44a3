"""The table of contents of a torch.distributed.checkpoint (DCP) folder, read without running anything it brings.

DCP keeps the table in `.metadata` as a pickle, and torch reads it with `pickle.load`, which calls whatever the file
names. Here an unpickler turns the few classes of such a table into inert records, looks nothing else up, and refuses
a file that names anything else. What it found is then checked field by field.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.errors import ConfigError, CorruptCheckpoint

METADATA = ".metadata"
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)


@dataclass(frozen=True)
class Place:
    """Bytes of a file of the folder: a `torch.save` stream."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Part:
    """The block of a tensor that starts at `offset` and has `shape`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part]


@dataclass(frozen=True)
class Contents:
    """What a folder has, by flat name.

    Attributes:
        values: what is not a tensor.
        paths: the keys that led to an entry of the nested state dict, e.g. ("model", "layers.0.weight"), -> its name.
    """

    tensors: dict[str, StoredTensor]
    values: dict[str, Place]
    paths: dict[tuple[str | int, ...], str]


class _Record:
    """What an object of the table held, and nothing that it could do."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Table(_Record): ...


class _Tensor(_Record): ...


class _Value(_Record): ...


class _Chunk(_Record): ...


class _Properties(_Record): ...


class _Index(_Record): ...


class _StorageInfo(_Record): ...


ADMITTED: dict[tuple[str, str], Callable[..., Any] | torch.dtype] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): _Table,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Tensor,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Value,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): _Chunk,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Properties,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,  # of older torch
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _Record,
    # What no reader needs: the layout and memory format of tensors, who saved, and the path of the folder then.
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "WindowsPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    ("pathlib._local", "WindowsPath"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
}
"""Every global that a table may name, and what is taken for it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which no table of contents needs"
            ) from None


def read_contents(folder: Path) -> Contents:
    """What a DCP folder has. Runs nothing that its files bring.

    Raises:
        ConfigError: it is no DCP folder, or was saved in a way that is not read.
        CorruptCheckpoint: `.metadata` is no table of contents, or names what none needs.
    """
    try:
        data = (folder / METADATA).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(
            "path",
            folder,
            f"is not a folder of torch.distributed.checkpoint: it has no {METADATA}",
            "name the folder that `dcp.save` wrote, with all that is in it",
        ) from None
    except OSError as error:
        raise damaged(folder, f"{METADATA} cannot be read: {error}") from error
    try:
        table = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # the file's bytes decide which one
        raise damaged(folder, f"{METADATA} is refused: {first_line(error)}") from error
    try:
        return _contents(table)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise damaged(folder, f"{METADATA} is not a table of contents: {first_line(error)}") from error


def _contents(table: Any) -> Contents:
    entries, storage = table.field("state_dict_metadata"), table.field("storage_data")
    _require(isinstance(table, _Table) and isinstance(entries, dict) and isinstance(storage, dict), "no entries")
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, info in storage.items():
        offset = index.field("offset")
        places[index.field("fqn"), None if offset is None else _sizes(offset)] = _place(info)
    tensors, values = {}, {}
    for name, entry in entries.items():
        _require(isinstance(name, str), f"{name!r} is no name")
        if isinstance(entry, _Tensor):
            tensors[name] = _tensor(name, entry, places)
        else:
            _require(isinstance(entry, _Value) and (name, None) in places, f"it does not say where {name} is")
            values[name] = places[name, None]
    nested = table.field("planner_data")
    paths = {tuple(nested[name]) if isinstance(nested, dict) and name in nested else (name,): name for name in entries}
    return Contents(tensors, values, paths)


def _tensor(name: str, entry: _Tensor, places: dict[tuple[str, tuple[int, ...] | None], Place]) -> StoredTensor:
    shape, properties = _sizes(entry.field("size")), entry.field("properties")
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.field("dtype")
    _require(isinstance(dtype, torch.dtype), f"{name} has no dtype")
    parts = []
    for chunk in entry.field("chunks"):
        offset, part_shape = _sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))
        is_inside = len(offset) == len(part_shape) == len(shape) and all(
            start + size <= total for start, size, total in zip(offset, part_shape, shape, strict=True)
        )
        _require(is_inside, f"a part of {name} lies outside of it")
        _require((name, offset) in places, f"it does not say where {name} is")
        parts.append(Part(offset, part_shape, places[name, offset]))
    # A tensor whose parts are fewer is damaged; one whose parts overlap was not written by DCP.
    num_elements = sum(math.prod(part.shape) for part in parts)
    _require(
        num_elements == math.prod(shape), f"the parts of {name} have {num_elements} of {math.prod(shape)} elements"
    )
    return StoredTensor(shape, dtype, parts)


def _place(info: Any) -> Place:
    _require(isinstance(info, _StorageInfo), "it does not say where its entries are")
    file, begin, length = info.field("relative_path"), info.field("offset"), info.field("length")
    is_inside = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
    _require(is_inside, f"{file!r} is no file of the folder")
    _require(not info.field("transform_descriptors"), "its entries are transformed (compressed, perhaps)")
    _sizes((begin, length))
    return Place(file, begin, length)


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(value)
    _require(all(type(size) is int and size >= 0 for size in sizes), f"{sizes} are no sizes")
    return sizes


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def damaged(folder: Path, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("path", folder, what, "copy the folder again, whole, from where `dcp.save` wrote it")
