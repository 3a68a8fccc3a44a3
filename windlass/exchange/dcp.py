"""Folders of torch.distributed.checkpoint (DCP): written through torch, a tensor at a time, and read with nothing run.

`dcp_metadata` reads the table of contents; the entries are `torch.save` streams, which `weights_only=True` reads.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta

from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.tensors import TORCH_DTYPES, empty_on_host
from windlass.exchange.dcp_metadata import ByteRange, damaged, first_line, read_contents
from windlass.exchange.folder import Report, not_given
from windlass.mapped_file import map_file
from windlass.os_errors import MISSING, said
from windlass.untrusted import MAX_BYTES, Malformed

MORE_BYTES = 1 << 20
"""More than `torch.save` adds to a tensor, by far."""
END_BYTES = 22
"""The size of the last record of a zip archive without a comment."""
MAX_RECORDS = 10_000
"""The most that an archive may have. The bytes of a tensor may look like some."""
Tree = Mapping[str, Any]


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each from the checkpoint when it is its turn.

    Args:
        names: a tensor's flat name in the DCP folder -> its name in the checkpoint.
    """

    def __init__(self, names: Mapping[str, str], reader: CheckpointReader, report: Report) -> None:
        super().__init__()
        self.names, self.reader, self.report, self.num_done = names, reader, report, 0

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn not in self.names:
            return super().lookup_object(index)
        tensor = self.reader.read_whole(self.names[index.fqn])
        self.num_done += tensor.nbytes
        self.report(self.num_done)
        return tensor


class _Writer(dcp.FileSystemWriter):
    """A file an entry: of what goes into one file torch keeps all tensors in memory until that file is closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=False)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch's own holds the path of the folder, which is a temporary one here


def write_folder(folder: Path, reader: CheckpointReader, tensors: Tree, values: Tree, report: Report) -> None:
    """Writes and syncs a DCP folder in one process; memory is two tensors.

    Args:
        folder: empty.
        tensors: the nested state dict's tensors, each by its name in the checkpoint of `reader`.
        values: the rest of the state dict.

    Raises:
        OSError: the disk is full or refuses.
    """
    names: dict[str, str] = {}
    state = _merged(_on_meta(tensors, reader, names, ""), values)
    planner = _LazyPlanner(names, reader, report)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
            dcp.save(state, storage_writer=_Writer(folder), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:  # dcp's own, around what each rank raised
        raise next(iter(error.failures.values()))[0] from error


def _on_meta(tree: Tree, reader: CheckpointReader, names: dict[str, str], prefix: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, str):
            names[f"{prefix}{key}"] = value
            stored = reader.manifest.tensors[value]
            state[key] = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device="meta")
        else:
            state[key] = _on_meta(value, reader, names, f"{prefix}{key}.")
    return state


def _merged(first: Tree, second: Tree) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        in_both = isinstance(value, Mapping) and key in merged
        merged[key] = _merged(merged[key], value) if in_both else value
    return merged


class DcpFolder:
    """A DCP folder to import from: says what it has, and reads an entry at a time.

    Attributes:
        contents: what it has.

    Raises:
        ConfigError, CorruptCheckpoint: as `read_contents`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = read_contents(folder)

    def read_tensor(self, name: str) -> torch.Tensor:
        """The tensor with the flat name `name`, put together from its parts, on the CPU.

        Raises:
            CorruptCheckpoint: a part is missing, or is not what the table of contents says.
        """
        stored = self.contents.tensors[name]
        whole = empty_on_host(stored.shape, stored.dtype, name)
        for part in stored.parts:
            num_bytes = math.prod(part.shape) * stored.dtype.itemsize
            loaded = self._load(name, part.byte_range, 2 * num_bytes + MORE_BYTES)
            if not _is_plain_tensor(loaded) or loaded.shape != part.shape or loaded.dtype != stored.dtype:
                raise damaged(self.folder, f"a part of {name} is not what the table of contents says")
            block = tuple(slice(start, start + size) for start, size in zip(part.offset, part.shape, strict=True))
            whole[block].copy_(loaded)
        return whole

    def read_value(self, name: str) -> Any:
        """The entry `name` that is not a tensor: a number, a string, or a list, tuple or dict of such.

        Raises:
            CorruptCheckpoint: it is missing, or an object that only unpickling would give.
        """
        return self._load(name, self.contents.values[name], MAX_BYTES)

    def _load(self, name: str, byte_range: ByteRange, max_bytes: int) -> Any:
        try:
            if byte_range.length > max_bytes:
                raise Malformed(f"it has {byte_range.length:,} bytes there, and at most {max_bytes:,} are expected")
            stream = io.BytesIO(map_file(self.folder / byte_range.file, begin=byte_range.begin, size=byte_range.length))
            _check_archive(stream)
        except Malformed as error:
            raise damaged(self.folder, f"{name} cannot be read from {byte_range.file}: {error}") from None
        except MISSING as error:
            raise damaged(self.folder, f"{name} cannot be read from {byte_range.file}: {said(error)}") from error
        except OSError as error:
            raise not_given(self.folder / byte_range.file, error) from error
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # the stream's bytes decide which one
            raise damaged(self.folder, f"{name} cannot be read from {byte_range.file}: {first_line(error)}") from error


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_archive(stream: io.BytesIO) -> None:
    """Raises Malformed unless a stream of `torch.save` is an archive of parts that are as long as they say.

    Compressed ones may be of gigabytes, and so is what an older format says of itself.
    """
    data = stream.getbuffer()
    end = data.nbytes - END_BYTES
    is_plain = end >= 0 and bytes(data[:4]) == b"PK\x03\x04" and bytes(data[end : end + 4]) == b"PK\x05\x06"
    if not is_plain or stream.getvalue().count(b"PK\x01\x02") > MAX_RECORDS:
        raise Malformed("it is no archive of torch.save")
    try:
        records = zipfile.ZipFile(stream).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise Malformed(f"it is no archive of torch.save ({error})") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise Malformed("it is compressed")
    if sum(record.file_size for record in records) > data.nbytes:
        raise Malformed("its parts are longer than it is")
    stream.seek(0)
