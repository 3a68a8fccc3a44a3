"""Makes the parity that this node keeps of others' data, block by block, as it arrives."""

from __future__ import annotations

import threading

import numpy as np

from windlass.checkpoint.agent.slots import SlotMemory
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.codec.erasure import Codec
from windlass.checksum import crc32c


class Encoding:
    """The work on one snapshot.

    Args:
        memory: of its slot, begun.
    """

    def __init__(self, memory: SlotMemory) -> None:
        self.snapshot, self.memory = memory.header.snapshot, memory
        self.is_over = False
        self.stripes = stripes = memory.header.stripes
        m, k = stripes.num_parity_shards, stripes.num_data_shards
        self._codec = Codec(k, m) if m else None
        self._arrived = np.zeros((m, stripes.blocks_per_chunk), np.uint8)
        self._has = np.zeros((m, k, stripes.blocks_per_chunk), np.bool_)
        self._locks = [threading.Lock() for _ in range(m)]
        self._table, self._num_data_blocks = memory.table, stripes.data_bytes // BLOCK_BYTES
        self._padding_lock, self._is_padding_summed = threading.Lock(), False

    def mirror_block(self, row: int, block: int) -> memoryview | None:
        """The memory that a block can be received into, as the parity is the data itself; None if it is to be added."""
        if self._codec is None or not self._codec.is_copy(row):
            return None
        return self._parity_view(row, block)

    def expects(self, row: int, chunk: int, block: int) -> bool:
        """Tells whether a block is still to come: a sender whose connection broke begins again with the first."""
        return not (self.is_over or self._has[row, chunk, block])

    def add_block(self, row: int, chunk: int, block: int, data: memoryview, checksum: int) -> bool | None:
        """Adds a block of data shard `chunk` to parity `row`.

        Args:
            data: the block, or the parity's own memory if it was received there.
            checksum: of the data, which has been compared.

        Returns:
            True if that parity block is whole now; None if the block is not expected any more, and nothing was done.
        """
        assert self._codec is not None
        target = self._parity_view(row, block)
        with self._locks[row]:
            if not self.expects(row, chunk, block):
                return None
            self._has[row, chunk, block] = True
            first = self._arrived[row, block] == 0
            if not self._codec.is_copy(row):
                self._codec.add(row, chunk, data, target, first=bool(first))
            self._arrived[row, block] += 1
            is_whole = int(self._arrived[row, block]) == self.stripes.num_data_shards
            if is_whole:
                number = self._num_data_blocks + row * self.stripes.blocks_per_chunk + block
                self._table[number] = checksum if self._codec.is_copy(row) else crc32c(target)
            return is_whole

    def add_checksums(self, rank: int, checksums: np.ndarray) -> None:
        """Takes in the sums of the blocks of a local rank's region."""
        region = next(region for region in self.memory.header.own_regions if region.rank == rank)
        first = region.offset // BLOCK_BYTES
        self._table[first : first + checksums.size] = checksums

    def sum_padding(self) -> None:
        """Sums the blocks of the data that no rank's region covers: no trainer sends their checksums."""
        with self._padding_lock:
            if not self._is_padding_summed:
                for number in self.uncovered_blocks():
                    self._table[number] = crc32c(self.memory.blocks(number))
                self._is_padding_summed = True

    def uncovered_blocks(self) -> list[int]:
        """The numbers of the blocks of the data that no rank's region covers."""
        covered: set[int] = set()
        for region in self.memory.header.own_regions:
            first = region.offset // BLOCK_BYTES
            covered.update(range(first, first + -(-region.nbytes // BLOCK_BYTES)))
        return [number for number in range(self._num_data_blocks) if number not in covered]

    def _parity_view(self, row: int, block: int) -> memoryview:
        return self.memory.blocks(self._num_data_blocks + row * self.stripes.blocks_per_chunk + block)
