"""Reads a snapshot from the slots of all nodes as a checkpoint from disk: any fragment, whatever the sharding."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.repair import BlockSource
from windlass.checkpoint.agent.slots import SlotMemory
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.manifest import Manifest, StoredFragment, StoredTensor
from windlass.checkpoint.image import Chunk, Description, chunks_from_json, chunks_to_json
from windlass.checksum import crc32c

KEPT_BYTES = 64 << 20
"""The most that is kept of what was read from other nodes: the next tensor may be in the same blocks."""


@dataclass(frozen=True)
class Part:
    """The content of one rank's region."""

    position: int
    rank: int
    begin: int
    """The begin of its image, from the start of the node's data."""
    chunks: list[Chunk]
    objects: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"chunks": chunks_to_json(self.chunks)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> Part:
        return Part(**document | {"chunks": chunks_from_json(document["chunks"])})


def read_parts(memory: SlotMemory) -> list[Part]:
    """Reads what the regions of a slot hold.

    Raises:
        ValueError: their bytes have changed.
    """
    parts = []
    reader = CheckedBlocks(memory)
    for region in memory.header.own_regions:
        view = memory.data[region.offset : region.offset + region.nbytes]
        reader.check(region.offset, region.offset + 16)
        reader.check(region.offset, region.offset + Description.num_bytes(view))
        description, image = Description.from_region(view)
        parts.append(
            Part(memory.header.position, region.rank, region.offset + image, description.chunks, description.objects)
        )
    return parts


class CheckedBlocks:
    """Compares the checksum of each block of a slot's data once, when it is first read."""

    def __init__(self, memory: SlotMemory) -> None:
        self.memory = memory
        self._is_checked = np.zeros(memory.table.size, np.bool_)

    def check(self, begin: int, end: int) -> None:
        """Raises ValueError if the data's bytes from `begin` to `end` are not as they were written."""
        for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not self._is_checked[number]:
                if crc32c(self.memory.blocks(number)) != int(self.memory.table[number]):
                    raise ValueError(f"block {number} of the snapshot has changed in memory")
                self._is_checked[number] = True


class SlotSource:
    """A `Source` of the bytes of one snapshot: from this node's memory, or over the agents of others.

    Args:
        local: slots of this node, by position.
        addresses: the agents that hold each position.
    """

    def __init__(
        self,
        snapshot: SnapshotId,
        step: int,
        local: dict[int, SlotMemory],
        addresses: dict[int, tuple[str, int]],
        secret: bytes,
        generation: int,
    ) -> None:
        self.snapshot, self.step = snapshot, step
        self._local = {position: CheckedBlocks(memory) for position, memory in local.items()}
        self._addresses, self._secret, self._generation = addresses, secret, generation
        self._remote: dict[int, BlockSource] = {}
        self._recent: dict[int, tuple[int, np.ndarray]] = {}  # position -> first block and bytes of the last far read

    def read(self, stored: StoredFragment) -> memoryview:
        position = int(stored.chunk)
        checked = self._local.get(position)
        if checked is None:
            return self._read_far(position, stored.begin, stored.end)
        checked.check(stored.begin, stored.end)
        return checked.memory.data[stored.begin : stored.end]

    def describe(self) -> str:
        return f"the snapshot of step {self.step} in memory"

    def close(self) -> None:
        for source in self._remote.values():
            source.close()
        self._remote.clear()
        self._local.clear()
        self._recent.clear()

    def _read_far(self, position: int, begin: int, end: int) -> memoryview:
        """Reads from another node, in whole blocks. What ranks hold alike is in few, a little on each node."""
        first, count = begin // BLOCK_BYTES, max(1, -(-end // BLOCK_BYTES) - begin // BLOCK_BYTES)
        recent_first, recent = self._recent.get(position, (0, np.empty(0, np.uint8)))
        if first < recent_first or (first + count - recent_first) * BLOCK_BYTES > recent.size:
            source = self._remote.get(position)
            if source is None:
                source = self._remote[position] = BlockSource(
                    self._addresses[position], self._secret, self._generation, self.snapshot, position
                )
            blocks = np.empty(count * BLOCK_BYTES, np.uint8)
            source.ask(first, count)
            if not source.take(blocks):
                raise ValueError(f"a block of the snapshot has changed in the memory of another node ({position})")
            recent_first, recent = first, blocks
            self._keep(position, first, blocks)
        start = begin - recent_first * BLOCK_BYTES
        return recent.data[start : start + end - begin]

    def _keep(self, position: int, first: int, blocks: np.ndarray) -> None:
        self._recent.pop(position, None)
        num_bytes = blocks.size + sum(other.size for _, other in self._recent.values())
        while self._recent and num_bytes > KEPT_BYTES:
            num_bytes -= self._recent.pop(next(iter(self._recent)))[1].size
        self._recent[position] = (first, blocks)


def manifest_of(step: int, generation: int, world_size: int, parts: list[Part]) -> Manifest:
    """The snapshot as a checkpoint's manifest, whose chunks are positions and whose offsets are in nodes' data."""
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Any] = {}
    for part in parts:
        objects |= part.objects
        for chunk in part.chunks:
            for entry in chunk.entries:
                spec = entry.spec
                tensor = tensors.setdefault(spec.name, StoredTensor(spec.global_shape, spec.dtype))
                begin = part.begin + entry.begin
                tensor.fragments.append(
                    StoredFragment(str(part.position), spec.name, begin, begin + spec.nbytes, spec.offset, spec.shape)
                )
    return Manifest(step, generation, world_size, time.time(), objects, tensors, {})
