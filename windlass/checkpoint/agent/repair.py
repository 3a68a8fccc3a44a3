"""Gives a node the slot that it lost, or parts of it, from those that the others still have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.slots import SlotMemory
from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.codec.erasure import Codec
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.transport import Connection, connect
from windlass.checksum import crc32c

BLOCKS_PER_READ = 4
TRAINER = -1
"""The position of whoever only reads."""
PATIENCE_S = 2.0
"""With an agent that strangers keep busy."""


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
        self._connection: Connection = connect(address, secret, patience_s=PATIENCE_S)
        self._connection.send({"position": TRAINER, "generation": generation})

    def ask(self, first: int, count: int) -> None:
        self._connection.send(
            {"type": "read", "snapshot": self.snapshot, "position": self.position, "first": first, "count": count}
        )

    def take(self, into: np.ndarray) -> bool:
        """Receives the blocks that were asked for; False if one is not as it was written.

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


def runs_of(stripes: Stripes, position: int, wanted: Set[int] | None) -> Iterator[Run]:
    """Yields what a node holds, in pieces that are read at once; only the block numbers `wanted`, or all for None."""
    for shard in range(stripes.num_nodes):
        k = stripes.num_data_shards
        is_data = shard < k
        stripe = stripes.stripe_of_chunk(position, shard) if is_data else stripes.stripe_of_parity(position, shard - k)
        step = BLOCKS_PER_READ if wanted is None else 1
        for block in range(0, stripes.blocks_per_chunk, step):
            if wanted is None or block_number(stripes, shard, block) in wanted:
                yield Run(stripe, shard, block, min(step, stripes.blocks_per_chunk - block))


class Rebuilder:
    """Restores blocks of a slot.

    Args:
        memory: of the slot, begun.
        sources: the slots of other nodes, by position.
        troubles: position -> why the slot of another node cannot be read; what else is found is added.
    """

    def __init__(
        self, memory: SlotMemory, sources: Mapping[int, BlockSource], troubles: Mapping[int, str] | None = None
    ) -> None:
        self.memory, self.sources, self.troubles = memory, dict(sources), dict(troubles or {})
        self.stripes, self.position = memory.header.stripes, memory.header.position
        self._codec = Codec(self.stripes.num_data_shards, self.stripes.num_parity_shards)

    def rebuild(self, wanted: Set[int] | None = None) -> int:
        """Restores the blocks `wanted`, or all, and their checksums where there were none; returns how many.

        Raises:
            TooFewShards: fewer than k of a stripe are left.
        """
        total = 0
        for run in runs_of(self.stripes, self.position, wanted):
            shards = self._gather(run)
            number = block_number(self.stripes, run.shard, run.block)
            target = self.memory.blocks(number, run.count)
            self._codec.reconstruct(shards, {run.shard: target})
            for index in range(run.count):
                checksum = crc32c(target[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
                if wanted is not None and checksum != int(self.memory.table[number + index]):
                    raise TooFewShards(f"block {number + index} does not come out as it was written")
                self.memory.table[number + index] = checksum
            total += run.count
        return total

    def _gather(self, run: Run) -> dict[int, np.ndarray]:
        """k shards of the stripe, sound, at the blocks of `run`."""
        stripes, needed = self.stripes, self.stripes.num_data_shards
        found: dict[int, np.ndarray] = {}
        left = [shard for shard in range(stripes.num_nodes) if shard != run.shard]
        while len(found) < needed:
            batch, left = left[: needed - len(found)], left[needed - len(found) :]
            if not batch:
                why = "; ".join(f"node {position}: {trouble}" for position, trouble in sorted(self.troubles.items()))
                raise TooFewShards(
                    f"stripe {run.stripe}: {len(found)} sound shards are left where {needed} are needed ({why})"
                )
            asked = []
            for shard in batch:
                source = self.sources.get(stripes.node_of_shard(run.stripe, shard))
                if source is not None and self._ask(source, block_number(stripes, shard, run.block), run.count):
                    asked.append((shard, source))
            for shard, source in asked:
                buffer = np.empty(run.count * BLOCK_BYTES, np.uint8)
                try:
                    if source.take(buffer):
                        found[shard] = buffer
                    else:
                        self.troubles[source.position] = "a block of it is not as it was written"
                except TransportError as error:
                    self._drop(source, error)
        return found

    def _ask(self, source: BlockSource, first: int, count: int) -> bool:
        try:
            source.ask(first, count)
        except TransportError as error:
            self._drop(source, error)
            return False
        return True

    def _drop(self, source: BlockSource, error: TransportError) -> None:
        """Does not ask a node again that did not answer."""
        self.troubles[source.position] = str(error)
        source.close()
        self.sources.pop(source.position, None)
