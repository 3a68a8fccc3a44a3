"""Turns a rank's tensors into chunks of bytes."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator

import torch

from windlass.checkpoint.image import Chunk, FragmentSpec, lay_out
from windlass.parallel.fragment import Fragment


def spec_of(fragment: Fragment) -> FragmentSpec:
    dtype = str(fragment.dtype).removeprefix("torch.")
    return FragmentSpec(fragment.name, dtype, fragment.global_shape, fragment.offset, fragment.shape)


def part_of(tensor: torch.Tensor, fragment: Fragment, spec: FragmentSpec) -> torch.Tensor:
    """The part of the local `tensor`, which holds `fragment`, that `spec` describes."""
    starts = [start - first for start, first in zip(spec.offset, fragment.offset, strict=True)]
    return tensor[tuple(slice(start, start + size) for start, size in zip(starts, spec.shape, strict=True))]


class StageBuffer:
    """Memory in which chunks are staged, as large as the largest so far. It begins at a page: direct I/O wants that."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def of(self, num_bytes: int) -> memoryview:
        if self._memory.nbytes < num_bytes:
            self._memory = memoryview(mmap.mmap(-1, num_bytes))
        return self._memory


@torch.no_grad()
def stage_chunks(
    fragments: Iterable[tuple[Fragment, torch.Tensor]], memory: StageBuffer | None = None
) -> Iterator[tuple[Chunk, memoryview]]:
    """Lays `fragments` out and yields each chunk with its bytes.

    The bytes are of one buffer, in which the next chunk replaces them: the memory is that of the largest chunk, not of
    the state.

    Args:
        fragments: fragments of tensors of different names, and the local tensors that hold them.
        memory: for the buffer, where several calls are to share it.
    """
    tensors = {fragment.name: (fragment, tensor) for fragment, tensor in fragments}
    chunks = lay_out(spec_of(fragment) for fragment, _ in tensors.values())
    buffer = (memory or StageBuffer()).of(max((chunk.end - chunk.begin for chunk in chunks), default=0) or 1)
    staged = torch.frombuffer(buffer, dtype=torch.uint8)
    for chunk in chunks:
        for entry in chunk.entries:
            fragment, tensor = tensors[entry.spec.name]
            place = staged[entry.begin - chunk.begin : entry.end - chunk.begin]
            place.view(fragment.dtype).view(entry.spec.shape).copy_(part_of(tensor, fragment, entry.spec))
        yield chunk, buffer[: chunk.end - chunk.begin]
