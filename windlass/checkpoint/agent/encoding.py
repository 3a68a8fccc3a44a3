"""How far a snapshot in flight has come on this node: whose data is still awaited, and which parity."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import numpy as np

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.slots import SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.codec.erasure import Codec
from windlass.checksum import crc32c


class Encoding:
    """The parity that this node keeps, block by block, from the data of others as it arrives.

    Args:
        files: the slot, begun.
        ranks: local ranks whose data is awaited.
    """

    def __init__(self, snapshot: SnapshotId, files: SlotFiles, ranks: Iterable[int], began: float) -> None:
        assert files.header is not None and files.data is not None and files.parity is not None
        self.snapshot, self.files, self.began = snapshot, files, began
        self.waiting = set(ranks)
        self.copied_at = self.prepared_at = began
        """`time.monotonic()`, once the data of this node is whole, and once the parity is too."""
        self.is_over = False
        header = files.header
        self.stripes = stripes = header.stripes
        m, k = stripes.num_parity_shards, stripes.num_data_shards
        self._codec = Codec(k, m) if m else None
        self._arrived = np.zeros((m, stripes.blocks_per_chunk), np.uint8)
        self._has = np.zeros((m, k, stripes.blocks_per_chunk), np.bool_)
        self._locks = [threading.Lock() for _ in range(m)]
        self._parity, self._table, self._num_data_blocks = files.parity, files.table, stripes.data_bytes // BLOCK_BYTES
        self.parity_left = m * stripes.blocks_per_chunk
        """Blocks of parity that are not whole yet."""
        self.owed: Counter[int] = Counter()
        """Blocks that each other node has still to send."""
        for row in range(m):
            stripe = stripes.stripe_of_parity(header.position, row)
            for chunk in range(k):
                self.owed[stripes.node_of_shard(stripe, chunk)] += stripes.blocks_per_chunk
        self._all_owed = dict(self.owed)

    def has_begun_to_send(self, position: int) -> bool:
        """Whether a node has sent some of what it owes, and not all."""
        return 0 < self.owed[position] < self._all_owed.get(position, 0)

    def mirror_block(self, row: int, block: int) -> memoryview | None:
        """Where a block can be received at once, because this parity is the data itself; None if it is to be added."""
        if self._codec is None or not self._codec.is_copy(row):
            return None
        return self._parity_view(row, block)

    def expects(self, row: int, chunk: int, block: int) -> bool:
        """Whether a block is still to come: a sender whose connection broke begins again with the first."""
        return not (self.is_over or self._has[row, chunk, block])

    def add_block(self, row: int, chunk: int, block: int, data: memoryview, checksum: int) -> bool | None:
        """Adds a block of data shard `chunk` to parity `row`; whether that parity block is whole now.

        Args:
            data: the block, or the parity's own memory if it was received there.
            checksum: of the data, which has been compared.

        Returns:
            None if the block is not expected any more, and nothing was done.
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

    def uncovered_blocks(self) -> list[int]:
        """Blocks of the data that no rank's region covers: padding, whose checksums no trainer sends."""
        assert self.files.header is not None
        covered: set[int] = set()
        for region in self.files.header.own_regions:
            first = region.offset // BLOCK_BYTES
            covered.update(range(first, first + -(-region.nbytes // BLOCK_BYTES)))
        return [number for number in range(self._num_data_blocks) if number not in covered]

    def _parity_view(self, row: int, block: int) -> memoryview:
        begin = row * self.stripes.chunk_bytes + block * BLOCK_BYTES
        return self._parity.view[begin : begin + BLOCK_BYTES]
