"""Folders of weights as Hugging Face keeps them: sharded safetensors, an index, config.json.

Which weights a model has and what its config.json says is the business of who knows the model; here is the format.
Shards are written a tensor at a time, so that a model larger than memory is exported from a small machine. Nothing is
read but safetensors: a folder that has only `.bin` files is one of pickles and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.durable.chunk_file import MAX_HEADER_BYTES
from windlass.errors import ConfigError, CorruptCheckpoint, WindlassError
from windlass.exchange.folder import Report, not_given
from windlass.exchange.safetensors_file import Entry, read_header
from windlass.mapped_file import map_file
from windlass.os_errors import MISSING, said
from windlass.untrusted import Malformed, convert, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
ITEM_BYTES = {code: dtype.itemsize for code, dtype in DTYPES.items()}
ALIGNMENT = 64


@dataclass(frozen=True)
class Weight:
    """A tensor to export: `read` returns it, whole and on the CPU, in any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In the export."""
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cut_into_shards(weights: Iterable[Weight], max_shard_bytes: int) -> list[list[Weight]]:
    """The weights in their order, in shards of at most `max_shard_bytes` of tensors; a larger one has its own."""
    shards: list[list[Weight]] = []
    num_bytes = 0
    for weight in weights:
        if not shards or num_bytes + weight.nbytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(weight)
        num_bytes += weight.nbytes
    return shards


def write_weights(
    folder: Path, weights: Sequence[Weight], config: Mapping[str, Any], max_shard_bytes: int, report: Report
) -> list[Path]:
    """Writes and syncs the shards, the index and config.json into the empty `folder`; memory is one tensor.

    Returns:
        The shards.

    Raises:
        OSError: the disk is full or refuses.
    """
    shards = cut_into_shards(weights, max_shard_bytes)
    paths, weight_map, num_done = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        num_done = _write_shard(path, shard, num_done, report)
        weight_map |= {weight.name: path.name for weight in shard}
        paths.append(path)
    _write_json(folder / INDEX, {"metadata": {"total_size": num_done}, "weight_map": weight_map})
    _write_json(folder / CONFIG, config)
    return paths


def _write_shard(path: Path, weights: Sequence[Weight], num_done: int, report: Report) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    offset = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": DTYPE_CODES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.nbytes],
        }
        offset += weight.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-(8 + len(data)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for weight in weights:
            tensor = weight.read().to(weight.dtype).contiguous()
            assert tuple(tensor.shape) == weight.shape, f"{weight.name}: {tensor.shape} is not {weight.shape}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # gone before the next one is read
            num_done += weight.nbytes
            report(num_done)
        file.flush()
        os.fsync(file.fileno())
    return num_done


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


class HuggingFaceFolder:
    """A folder to import from. Says what it has, and reads a tensor at a time.

    Attributes:
        config: what config.json says.
        tensors: name -> (shape, dtype).

    Raises:
        ConfigError: it is no such folder, or has weights of a dtype that is not a float of at most 32 bits.
        CorruptCheckpoint: a file of it is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                "path", folder, f"is not a Hugging Face folder: it has no {CONFIG}", "name a folder that has one"
            )
        self.config = self._read_json(CONFIG)
        self._locations = self._find()
        self.tensors = {name: self._describe(name) for name in self._locations}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU."""
        location = self._locations[name]
        begin, end = location.entry.data_offsets
        try:
            data = map_file(self.folder / location.file, True, location.data_begin + begin, end - begin)
        except Malformed as error:
            raise _damaged(self.folder, f"{name} cannot be read: {error}") from None
        except OSError as error:
            raise self._not_given(location.file, error) from error
        dtype = DTYPES[location.entry.dtype]
        if not data:
            return torch.empty(location.entry.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(location.entry.shape)

    def _find(self) -> dict[str, _Location]:
        """Tensor name -> where it is, as the index says or as the only file does."""
        if (self.folder / INDEX).is_file():
            try:
                weight_map = convert(self._read_json(INDEX).get("weight_map"), dict[str, str], "weight_map")
            except Malformed:
                weight_map = {"": ""}
            if not all(_is_file_name(file) for file in weight_map.values()):
                raise _damaged(self.folder, f"the weight_map of {INDEX} does not map names of tensors to files")
        elif (self.folder / SINGLE).is_file():
            weight_map = None
        else:
            raise ConfigError(
                "path",
                self.folder,
                f"has neither {INDEX} nor {SINGLE}; other formats hold pickles, which are not read",
                "save it with transformers' save_pretrained(..., safe_serialization=True)",
            )
        files, left = {}, MAX_HEADER_BYTES
        for file in sorted(set(weight_map.values()) if weight_map is not None else {SINGLE}):
            files[file] = self._read_file(file, left)
            left -= max((location.data_begin for location in files[file].values()), default=0)
        if weight_map is None:
            return dict(sorted(files[SINGLE].items()))
        for name, file in weight_map.items():
            if name not in files[file]:
                raise _damaged(self.folder, f"{INDEX} says that {file} has {name[:200]!r}, and it has not")
        return {name: files[file][name] for name, file in weight_map.items()}

    def _read_file(self, file: str, max_bytes: int) -> dict[str, _Location]:
        try:
            header = read_header(self.folder / file, ITEM_BYTES, max_bytes)
        except FileNotFoundError:
            raise _damaged(self.folder, f"{INDEX} names {file}, which is missing") from None
        except Malformed as error:
            raise _damaged(self.folder, f"{file} cannot be used: {error}") from None
        except OSError as error:
            raise self._not_given(file, error) from error
        return {name: _Location(file, entry, header.num_bytes) for name, entry in header.tensors.items()}

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._locations[name].entry
        code = entry.dtype
        if code not in DTYPES:
            raise ConfigError(
                "path",
                self.folder,
                f"has {name} as {code}, and only {', '.join(DTYPES)} are imported",
                "convert it to one of them first",
            )
        return entry.shape, DTYPES[code]

    def _read_json(self, file: str) -> dict[str, Any]:
        try:
            document = read_json(self.folder / file, MAX_HEADER_BYTES)
        except Malformed as error:
            raise _damaged(self.folder, f"{file} cannot be used: {error}") from None
        except OSError as error:
            raise self._not_given(file, error) from error
        if not isinstance(document, dict):
            raise _damaged(self.folder, f"{file} is not a JSON object")
        return document

    def _not_given(self, file: str, error: OSError) -> WindlassError:
        if isinstance(error, MISSING):
            return _damaged(self.folder, f"{file} cannot be used: {said(error)}")
        return not_given(self.folder / file, error)


@dataclass(frozen=True)
class _Location:
    file: str
    entry: Entry
    data_begin: int
    """Where the data of the file begin."""


def _is_file_name(value: str) -> bool:
    """True if it names a file of the folder itself: an index must not lead anywhere else."""
    return value not in ("", "..") and value.isprintable() and Path(value).name == value


def _damaged(folder: Path, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("path", folder, what, "copy or download the folder again, whole")
