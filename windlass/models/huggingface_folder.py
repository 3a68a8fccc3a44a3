"""Reads folders of weights as Hugging Face keeps them: config.json, safetensors in one file or in shards with an index.

Nothing is read but safetensors: a folder that has only `.bin` files is one of pickles and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.durable.chunk_file import MAX_HEADER_BYTES
from windlass.errors import ConfigError, CorruptCheckpoint, RunFolderError, WindlassError
from windlass.mapped_file import map_file
from windlass.models.safetensors_file import Entry, read_header
from windlass.os_errors import MISSING, remedy, said
from windlass.untrusted import Malformed, convert, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
ITEM_BYTES = {code: dtype.itemsize for code, dtype in DTYPES.items()}


class HuggingFaceFolder:
    """A folder to import from. Says what it has, and reads a tensor at a time.

    Args:
        key: what a user calls the folder by.

    Attributes:
        config: what config.json says.
        tensors: name -> (shape, dtype).

    Raises:
        ConfigError: it is no such folder, or has weights of a dtype that is not a float of at most 32 bits.
        CorruptCheckpoint: a file of it is missing or cannot be read.
    """

    def __init__(self, folder: Path, key: str = "path") -> None:
        self.folder, self.key = folder, key
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                key, folder, f"is not a Hugging Face folder: it has no {CONFIG}", "name a folder that has one"
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
            raise self._damaged(f"{name} cannot be read: {error}") from None
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
                raise self._damaged(f"the weight_map of {INDEX} does not map names of tensors to files")
        elif (self.folder / SINGLE).is_file():
            weight_map = None
        else:
            raise ConfigError(
                self.key,
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
                raise self._damaged(f"{INDEX} says that {file} has {name[:200]!r}, and it has not")
        return {name: files[file][name] for name, file in weight_map.items()}

    def _read_file(self, file: str, max_bytes: int) -> dict[str, _Location]:
        try:
            header = read_header(self.folder / file, ITEM_BYTES, max_bytes)
        except FileNotFoundError:
            raise self._damaged(f"{INDEX} names {file}, which is missing") from None
        except Malformed as error:
            raise self._damaged(f"{file} cannot be used: {error}") from None
        except OSError as error:
            raise self._not_given(file, error) from error
        return {name: _Location(file, entry, header.num_bytes) for name, entry in header.tensors.items()}

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._locations[name].entry
        code = entry.dtype
        if code not in DTYPES:
            raise ConfigError(
                self.key,
                self.folder,
                f"has {name} as {code}, and only {', '.join(DTYPES)} are imported",
                "convert it to one of them first",
            )
        return entry.shape, DTYPES[code]

    def _read_json(self, file: str) -> dict[str, Any]:
        try:
            document = read_json(self.folder / file, MAX_HEADER_BYTES)
        except Malformed as error:
            raise self._damaged(f"{file} cannot be used: {error}") from None
        except OSError as error:
            raise self._not_given(file, error) from error
        if not isinstance(document, dict):
            raise self._damaged(f"{file} is not a JSON object")
        return document

    def _not_given(self, file: str, error: OSError) -> WindlassError:
        if isinstance(error, MISSING):
            return self._damaged(f"{file} cannot be used: {said(error)}")
        rule, fix = f"cannot be read: {said(error)}", remedy(error, "mend that and start again")
        return RunFolderError(self.key, self.folder / file, rule, fix)

    def _damaged(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.key, self.folder, what, "copy or download the folder again, whole")


@dataclass(frozen=True)
class _Location:
    file: str
    entry: Entry
    data_begin: int
    """Where the data of the file begin."""


def _is_file_name(value: str) -> bool:
    """True if it names a file of the folder itself: an index must not lead anywhere else."""
    return value not in ("", "..") and value.isprintable() and Path(value).name == value


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors have the same bytes, also where they are not a number."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
