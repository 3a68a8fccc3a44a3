"""Reads checkpoints: any block of any tensor, whatever cut it was written in, with every byte checked first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import torch

from windlass.checkpoint.durable.chunk_file import chunk_name, open_chunk
from windlass.checkpoint.durable.manifest import Manifest, StoredFragment, corrupt, unreadable
from windlass.checkpoint.durable.storage import Location, Storage, open_storage, resolved, split
from windlass.checkpoint.tensors import TORCH_DTYPES, empty_on_host
from windlass.parallel.fragment import Fragment

OPEN_BYTES = 1 << 30
"""The most of chunks that stays open, and in memory if it comes from an object store: neighbours are read together."""


class Source(Protocol):
    """A source of the bytes of stored fragments."""

    def read(self, stored: StoredFragment) -> memoryview:
        """The bytes of a fragment, checked; `ValueError` if they are damaged, `OSError` if they cannot be read."""
        ...

    def describe(self) -> Location:
        """The checkpoint's name in messages."""
        ...

    def close(self) -> None: ...


class ChunkSource:
    """The chunks of one committed checkpoint. Each is checked, all of it, when it is opened.

    Args:
        storage: the place of all checkpoints of the run.
        folder: the checkpoint's.
    """

    def __init__(self, storage: Storage, folder: Location, manifest: Manifest) -> None:
        self.storage, self.folder, self.manifest = storage, folder, manifest
        self._open: OrderedDict[str, memoryview] = OrderedDict()
        self._parts = manifest.parts_of_chunks()
        self._unread = {sha256: {key for key, *_ in parts} for sha256, parts in self._parts.items()}
        """The keys of each chunk that nobody has asked for yet. One that was read through is not kept open."""

    def read(self, stored: StoredFragment) -> memoryview:
        data = self._open.get(stored.chunk)
        if data is None:
            parts = self._parts[stored.chunk]
            data = open_chunk(self.storage, stored.chunk, self.manifest.chunks[stored.chunk], parts)
            self._open[stored.chunk] = data
            while len(self._open) > 1 and sum(other.nbytes for other in self._open.values()) > OPEN_BYTES:
                self._open.popitem(last=False)
        self._open.move_to_end(stored.chunk)
        self._unread[stored.chunk].discard(stored.key)
        if not self._unread[stored.chunk]:
            del self._open[stored.chunk]
        return data[stored.begin : stored.end]

    def describe(self) -> Location:
        return self.folder

    def close(self) -> None:
        self._open.clear()


class CheckpointReader:
    """Reads blocks of the tensors of one checkpoint.

    Raises:
        CorruptCheckpoint: from `read` and `read_whole`, naming the chunk and what is wrong with it.
    """

    def __init__(self, manifest: Manifest, source: Source) -> None:
        self.manifest, self.source = manifest, source

    def read(self, fragment: Fragment, into: torch.Tensor) -> None:
        """Fills the local tensor `into`, which holds `fragment`."""
        stored_tensor = self.manifest.tensors[fragment.name]
        dtype = TORCH_DTYPES[stored_tensor.dtype]
        num_read = 0
        for stored in stored_tensor.fragments:
            block = Fragment(fragment.name, stored_tensor.shape, stored.offset, stored.shape, dtype)
            indexes = fragment.overlap(block)
            if indexes is None:
                continue
            mine, theirs = indexes
            source = self._read_stored(stored, dtype)[theirs]
            into[mine].copy_(source)
            num_read += source.numel()
        if num_read != fragment.numel:
            missing = fragment.numel - num_read
            raise corrupt(self.source.describe(), f"{fragment.name} lacks {missing} of its elements")

    def read_whole(self, name: str) -> torch.Tensor:
        """The global tensor `name`, on the CPU."""
        stored = self.manifest.tensors[name]
        dtype = TORCH_DTYPES[stored.dtype]
        tensor = empty_on_host(stored.shape, dtype, name)
        self.read(Fragment(name, stored.shape, (0,) * len(stored.shape), stored.shape, dtype), tensor)
        return tensor

    def close(self) -> None:
        self.source.close()

    def _read_stored(self, stored: StoredFragment, dtype: torch.dtype) -> torch.Tensor:
        """A stored block, in the source's own memory where torch takes that."""
        try:
            data = self.source.read(stored)
            if data.nbytes != torch.Size(stored.shape).numel() * dtype.itemsize:
                raise ValueError(f"{stored.key} has {data.nbytes} bytes, which is not its shape")
        except ValueError as error:
            raise corrupt(self.source.describe(), f"{chunk_name(stored.chunk)}: {error}") from error
        except OSError as error:
            raise unreadable(self.source.describe(), chunk_name(stored.chunk), error) from error
        if data.nbytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        if data.readonly:  # torch takes no memory that must not be written
            data = memoryview(bytearray(data))
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(stored.shape)


def open_checkpoint(folder: Location) -> CheckpointReader:
    """A reader of the checkpoint in `folder`, `.../step-00000300`, whose chunks are beside it.

    Raises:
        CorruptCheckpoint: its manifest is damaged.
        IncompatibleCheckpoint: another version of windlass wrote it.
        RunFolderError: the disk does not give it.
    """
    place, _ = split(resolved(folder))
    manifest = Manifest.read(folder)
    return CheckpointReader(manifest, ChunkSource(open_storage(place), folder, manifest))
