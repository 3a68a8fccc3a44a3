"""An image: the bytes of a rank's fragments of tensors, one after the other, in a snapshot's slot or a durable file.

A rank's image is a list of chunks. A chunk is what the durable tier writes as one file and may find unchanged from one
checkpoint to the next, so chunks are cut by names and shapes alone. Torch-free: agents write what trainers copied.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes an element, by torch's name of the dtype without the `torch.`."""
PAGE_BYTES = 4096
"""Chunks begin at multiples of it: direct I/O takes them as they are."""
CHUNK_BYTES = 4 << 20
"""Fragments are gathered in chunks until they have so much; a larger fragment has a chunk of its own."""
MAX_CHUNK_BYTES = 64 << 20
"""A larger fragment is cut along its first dim, so that it moves, and is checked, a part at a time."""


@dataclass(frozen=True)
class FragmentSpec:
    """The fragment of the global tensor `name` that starts at `offset` and has `shape`, both in elements a dim.

    It says what `windlass.parallel.fragment.Fragment` does, without torch.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def parts(self, max_bytes: int) -> list[FragmentSpec]:
        """The fragment in parts of at most `max_bytes`, cut along its first dim of more than one element.

        One that cannot be cut so is one part. A part is contiguous in the fragment; in order they are the fragment.
        """
        dim = next((i for i, size in enumerate(self.shape) if size > 1), None)
        if self.nbytes <= max_bytes or dim is None:
            return [self]
        row_bytes = self.nbytes // self.shape[dim]
        rows = max(1, max_bytes // row_bytes)
        found: list[FragmentSpec] = []
        for start in range(0, self.shape[dim], rows):
            offset, shape = list(self.offset), list(self.shape)
            offset[dim] += start
            shape[dim] = min(rows, self.shape[dim] - start)
            found.append(dataclasses.replace(self, offset=tuple(offset), shape=tuple(shape)))
        return found


@dataclass(frozen=True)
class Entry:
    """A fragment and where its bytes are, from the start of the image."""

    spec: FragmentSpec
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.spec.nbytes


@dataclass(frozen=True)
class Chunk:
    """A run of entries without gaps. `begin` is a multiple of `PAGE_BYTES`."""

    entries: tuple[Entry, ...]

    @property
    def begin(self) -> int:
        return self.entries[0].begin

    @property
    def end(self) -> int:
        return self.entries[-1].end


def lay_out(specs: Iterable[FragmentSpec]) -> list[Chunk]:
    """Lays `specs` out in an image: large ones in their order, then small ones in theirs, many to a chunk.

    Else the norms between the matrices of a network would each be a file.
    """
    parts = [part for spec in specs for part in spec.parts(MAX_CHUNK_BYTES)]
    groups = [[part] for part in parts if part.nbytes >= CHUNK_BYTES]
    groups += _gather([part for part in parts if part.nbytes < CHUNK_BYTES])
    chunks: list[Chunk] = []
    for group in groups:
        entries, end = [], round_up(chunks[-1].end, PAGE_BYTES) if chunks else 0
        for spec in group:
            entries.append(Entry(spec, end))
            end += spec.nbytes
        chunks.append(Chunk(tuple(entries)))
    return chunks


def _gather(specs: Sequence[FragmentSpec]) -> list[list[FragmentSpec]]:
    """`specs` in their order, in groups that are not too large and in which each is aligned."""
    groups: list[list[FragmentSpec]] = []
    filled = 0
    for spec in specs:
        is_aligned = filled % DTYPE_BYTES[spec.dtype] == 0
        if not groups or filled + spec.nbytes > CHUNK_BYTES or not is_aligned:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    return groups


def image_bytes(chunks: Sequence[Chunk]) -> int:
    """The length of the image, in whole pages."""
    return round_up(chunks[-1].end, PAGE_BYTES) if chunks else 0


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


MAGIC = b"windlas2"


@dataclass(frozen=True)
class Description:
    """Describes the image of a region: it goes before the image, and is protected as the image is."""

    rank: int
    chunks: list[Chunk]
    objects: dict[str, Any]
    """JSON state that is not tensors; of one rank, empty in the others."""

    def to_bytes(self) -> bytes:
        return describe(self.rank, json.dumps(chunks_to_json(self.chunks), separators=(",", ":")), self.objects)

    @staticmethod
    def num_bytes(region: memoryview) -> int:
        """The length of the description at the start of `region`. Raises ValueError if there is none."""
        if bytes(region[:8]) != MAGIC:
            raise ValueError("the region holds no image")
        return 16 + int.from_bytes(region[8:16], "little")

    @staticmethod
    def from_region(region: memoryview) -> tuple[Description, int]:
        """The description, and where in the region the image begins.

        Raises:
            ValueError: there is none.
        """
        document = json.loads(bytes(region[16 : Description.num_bytes(region)]))
        chunks = chunks_from_json(document["chunks"])
        return Description(document["rank"], chunks, document["objects"]), len(region) - image_bytes(chunks)


def describe(rank: int, chunks: str, objects: dict[str, Any]) -> bytes:
    """A `Description`, of chunks that are JSON already: they are the same from one snapshot to the next."""
    rest = json.dumps({"rank": rank, "objects": objects}, separators=(",", ":"))
    text = f'{rest[:-1]},"chunks":{chunks}}}'.encode()
    return MAGIC + len(text).to_bytes(8, "little") + text


def chunks_to_json(chunks: Sequence[Chunk]) -> list[list[dict[str, Any]]]:
    # Not dataclasses.asdict, which copies everything and takes ten times as long.
    return [[vars(entry.spec) | {"begin": entry.begin} for entry in chunk.entries] for chunk in chunks]


def chunks_from_json(document: list[list[dict[str, Any]]]) -> list[Chunk]:
    return [
        Chunk(
            tuple(
                Entry(
                    FragmentSpec(
                        entry["name"],
                        entry["dtype"],
                        tuple(entry["global_shape"]),
                        tuple(entry["offset"]),
                        tuple(entry["shape"]),
                    ),
                    entry["begin"],
                )
                for entry in chunk
            )
        )
        for chunk in document
    ]
