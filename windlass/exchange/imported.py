"""Makes a checkpoint of tensors that come from elsewhere, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.durable.store import DurableStore, WrittenChunk
from windlass.checkpoint.image import Chunk, FragmentSpec, lay_out
from windlass.errors import RunFolderError
from windlass.exchange.folder import Report

Described = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""
Read = Callable[[str], torch.Tensor]
"""Gives the tensor of a name, whole and on the CPU."""


def write_checkpoint(
    folder: Path,
    step: int,
    world_size: int,
    objects: dict[str, Any],
    tensors: Mapping[str, Described],
    read: Read,
    report: Report,
) -> None:
    """Commits a checkpoint of `step` in the empty `folder`; memory is one tensor and one chunk.

    Args:
        world_size: of the run that saved it, whose random generators are among the tensors; 0 if they are not.
        objects: JSON state by name.
        tensors: those to write; what `read` gives is cast to their dtypes.

    Raises:
        OSError: the disk is full or refuses.
    """
    specs = [
        FragmentSpec(name, str(dtype).removeprefix("torch."), shape, (0,) * len(shape), shape)
        for name, (shape, dtype) in tensors.items()
    ]
    store, source = DurableStore(folder), _LastRead(tensors, read)
    written: list[WrittenChunk] = []
    num_done = 0
    try:
        store.open_for_writing()
        for chunk in lay_out(specs):
            written.append(store.put_chunk(chunk, _assembled(chunk, source)))
            num_done += chunk.end - chunk.begin
            report(num_done)
        store.commit(step, 0, world_size, objects, written)
    except RunFolderError as error:
        if isinstance(error.__cause__, OSError):  # the store's own message speaks of a run, and there is none
            raise error.__cause__ from None
        raise


class _LastRead:
    """Keeps the tensor that was read last: a large one is cut into many chunks, one after the other."""

    def __init__(self, tensors: Mapping[str, Described], read: Read) -> None:
        self.tensors, self.read = tensors, read
        self.name, self.tensor = "", torch.empty(0)

    def load(self, spec: FragmentSpec) -> torch.Tensor:
        if spec.name != self.name:
            self.tensor = torch.empty(0)  # gone before the next one is read
            self.name, self.tensor = spec.name, self.read(spec.name).to(self.tensors[spec.name][1])
        slices = tuple(slice(start, start + size) for start, size in zip(spec.offset, spec.shape, strict=True))
        return self.tensor[slices]


def _assembled(chunk: Chunk, source: _LastRead) -> memoryview:
    data = torch.empty(chunk.end - chunk.begin, dtype=torch.uint8)
    for entry in chunk.entries:
        part = source.load(entry.spec).contiguous().reshape(-1).view(torch.uint8)
        data[entry.begin - chunk.begin : entry.end - chunk.begin] = part
    return data.numpy().data
