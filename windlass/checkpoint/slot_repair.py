"""Gives a node the slot that it lost, or parts of it, from those that the others still have."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from windlass.checkpoint.checksum import crc32c
from windlass.checkpoint.erasure import Codec
from windlass.checkpoint.handshake import TransportError
from windlass.checkpoint.ledger import SnapshotId
from windlass.checkpoint.slots import SlotFiles
from windlass.checkpoint.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.transport import Connection, connect

BLOCKS_PER_READ = 4
RUNS_AHEAD = 1
"""Asked for beside the one that is put together: others read and send meanwhile."""
TRAINER = -1
"""The position of whoever only reads."""


class TooFewShards(Exception):
    """More is lost than the parity makes up for."""


class BlockSource:
    """The slot of another node, read over its agent.

    Raises:
        TransportError: the agent is not there, or does not let us in.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, generation: int, snapshot: SnapshotId, position: int
    ) -> None:
        self.snapshot, self.position = snapshot, position
        self._connection: Connection = connect(address, secret)
        self._connection.send({"position": TRAINER, "generation": generation})

    def ask(self, first: int, count: int) -> None:
        self._connection.send(
            {"type": "read", "snapshot": self.snapshot, "position": self.position, "first": first, "count": count}
        )

    def take(self, into: np.ndarray) -> bool:
        """Receives the blocks that were asked for; whether all are as they were written.

        Raises:
            TransportError: the agent is gone, or does not hold the slot.
        """
        header, num_bytes = self._connection.receive()
        if "error" in header or num_bytes != into.size:
            self._connection.close()
            raise TransportError(f"{self._connection.peer}: {header.get('error', 'answered with another length')}")
        self._connection.receive_into(into.data)
        blocks = into.reshape(-1, BLOCK_BYTES)
        return all(crc32c(block) == expected for block, expected in zip(blocks, header["crcs"], strict=True))

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of one shard of one stripe."""

    stripe: int
    shard: int
    block: int
    """The first, from the start of the chunk."""
    count: int


def block_number(stripes: Stripes, shard: int, block: int) -> int:
    """The number in its slot of a block of a node's shard (0..k-1 data, then parity)."""
    return shard * stripes.blocks_per_chunk + block


def runs_of(stripes: Stripes, position: int, wanted: set[int] | None) -> Iterator[Run]:
    """What a node holds, in pieces that are read at once; only the block numbers `wanted`, or all for None."""
    for shard in range(stripes.num_nodes):
        k = stripes.num_data_shards
        is_data = shard < k
        stripe = stripes.stripe_of_chunk(position, shard) if is_data else stripes.stripe_of_parity(position, shard - k)
        step = BLOCKS_PER_READ if wanted is None else 1
        for block in range(0, stripes.blocks_per_chunk, step):
            if wanted is None or block_number(stripes, shard, block) in wanted:
                yield Run(stripe, shard, block, min(step, stripes.blocks_per_chunk - block))


class Pending:
    """What was asked for to restore one run: `take` receives it, into memory that is used again and again."""

    def __init__(self, run: Run, num_shards: int, num_blocks: int) -> None:
        self.run = run
        self.asked: list[tuple[int, BlockSource]] = []
        """(shard, who was asked for it), in the order of asking."""
        self.found: dict[int, np.ndarray] = {}
        """Shard -> its blocks, sound."""
        self.tried: set[int] = set()
        self._buffers = np.empty((num_shards, num_blocks * BLOCK_BYTES), np.uint8)

    def begin(self, run: Run) -> None:
        self.run = run
        self.found.clear()
        self.tried = {run.shard}

    def take(self) -> list[BlockSource]:
        """Receives all that was asked for; returns those that did not answer."""
        gone = []
        for shard, source in self.asked:
            buffer = self._buffers[len(self.found), : self.run.count * BLOCK_BYTES]
            try:
                if source.take(buffer):
                    self.found[shard] = buffer
            except TransportError:
                gone.append(source)
        self.asked.clear()
        return gone


class Rebuilder:
    """Restores blocks of the slot `files` from `sources`, the slots of other nodes by position.

    While one run is put together the next is on its way.
    """

    def __init__(self, files: SlotFiles, sources: Mapping[int, BlockSource]) -> None:
        assert files.header is not None
        self.files, self.sources = files, dict(sources)
        self.stripes, self.position = files.header.stripes, files.header.position
        self._codec = Codec(self.stripes.num_data_shards, self.stripes.num_parity_shards)

    def rebuild(self, wanted: set[int] | None = None) -> int:
        """Restores the blocks `wanted`, or all, and their checksums where there were none; returns how many.

        Raises:
            TooFewShards: fewer than k of a stripe are left.
        """
        total = 0
        pending: deque[Pending] = deque()
        unused: list[Pending] = []
        for run in runs_of(self.stripes, self.position, wanted):
            size = BLOCKS_PER_READ if wanted is None else 1
            slot = unused.pop() if unused else Pending(run, self.stripes.num_data_shards, size)
            slot.begin(run)
            self._ask_more(slot)
            pending.append(slot)
            if len(pending) > RUNS_AHEAD:
                unused.append(pending[0])
                total += self._restore(pending, wanted is not None)
        while pending:
            total += self._restore(pending, wanted is not None)
        return total

    def _restore(self, pending: deque[Pending], has_checksums: bool) -> int:
        """Restores the first run of `pending` and takes it out; returns how many blocks it has."""
        self._gather(pending)
        slot = pending.popleft()
        run = slot.run
        number = block_number(self.stripes, run.shard, run.block)
        target = self.files.blocks(number, run.count)
        self._codec.reconstruct(slot.found, {run.shard: target})
        for index in range(run.count):
            checksum = crc32c(target[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
            if has_checksums and checksum != int(self.files.table[number + index]):
                raise TooFewShards(f"block {number + index} does not come out as it was written")
            self.files.table[number + index] = checksum
        return run.count

    def _gather(self, pending: deque[Pending]) -> None:
        """Has k sound shards found for the first run of `pending`."""
        first, needed = pending[0], self.stripes.num_data_shards
        self._take(first)
        while len(first.found) < needed:
            for later in list(pending)[1:]:
                self._take(later)  # answers come in the order of the questions
            if not self._ask_more(first):
                raise TooFewShards(
                    f"stripe {first.run.stripe}: {len(first.found)} sound shards are left where {needed} are needed"
                )
            self._take(first)

    def _take(self, slot: Pending) -> None:
        for source in slot.take():
            self._drop(source)

    def _ask_more(self, slot: Pending) -> bool:
        """Asks for as many shards as are missing, each once; False if there is nobody left to ask."""
        stripes, run = self.stripes, slot.run
        for shard in range(stripes.num_nodes):
            if len(slot.found) + len(slot.asked) == stripes.num_data_shards:
                break
            if shard in slot.tried:
                continue
            slot.tried.add(shard)
            source = self.sources.get(stripes.node_of_shard(run.stripe, shard))
            if source is not None and self._ask(source, block_number(stripes, shard, run.block), run.count):
                slot.asked.append((shard, source))
        return bool(slot.asked)

    def _ask(self, source: BlockSource, first: int, count: int) -> bool:
        try:
            source.ask(first, count)
        except TransportError:
            self._drop(source)
            return False
        return True

    def _drop(self, source: BlockSource) -> None:
        """Does not ask a node again that did not answer."""
        source.close()
        self.sources.pop(source.position, None)
