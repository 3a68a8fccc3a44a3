"""Cuts the nodes' data into stripes, and says which node keeps which parity.

n nodes, m parity shards, k = n - m. Every node's data is cut into k chunks, and there are n stripes: stripe s has its
parity r on node s + r and its data chunk c on node s + m + c (mod n). So each node gives k chunks to k stripes and
keeps the parity of the m others: data stays where it is made, no node is spare, and any m may go (after REFT, 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from windlass.checkpoint.image import round_up

BLOCK_BYTES = 1 << 20
"""The unit of checksums, and of all that moves. Copied and then summed, a block stays in a core's cache."""


@dataclass(frozen=True)
class Stripes:
    """Args:
    num_nodes: n, at least 1.
    num_parity_shards: m, less than n; 0 keeps no parity.
    node_bytes: the data of the node that has the most.
    """

    num_nodes: int
    num_parity_shards: int
    node_bytes: int

    def __post_init__(self) -> None:
        assert 0 <= self.num_parity_shards < self.num_nodes

    @property
    def num_data_shards(self) -> int:
        return self.num_nodes - self.num_parity_shards

    @property
    def chunk_bytes(self) -> int:
        """The size of a node's data, and of a parity: whole blocks."""
        return round_up(-(-self.node_bytes // self.num_data_shards), BLOCK_BYTES)

    @property
    def data_bytes(self) -> int:
        """A node's data with its padding."""
        return self.num_data_shards * self.chunk_bytes

    @property
    def parity_bytes(self) -> int:
        return self.num_parity_shards * self.chunk_bytes

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_bytes // BLOCK_BYTES

    def stripe_of_chunk(self, node: int, chunk: int) -> int:
        """The stripe that chunk `chunk` of a node's data belongs to; in it, it is data shard `chunk`."""
        return (node - self.num_parity_shards - chunk) % self.num_nodes

    def stripe_of_parity(self, node: int, row: int) -> int:
        """The stripe whose parity `row` a node keeps."""
        return (node - row) % self.num_nodes

    def node_of_shard(self, stripe: int, shard: int) -> int:
        """The node that holds a shard of a stripe: 0..k-1 are data, k..n-1 parity."""
        k = self.num_data_shards
        return (stripe + self.num_parity_shards + shard if shard < k else stripe + shard - k) % self.num_nodes

    def parity_targets(self, node: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, parity row, node that keeps it) for all that `node` has to send: m times its data."""
        for chunk in range(self.num_data_shards):
            stripe = self.stripe_of_chunk(node, chunk)
            for row in range(self.num_parity_shards):
                yield chunk, row, (stripe + row) % self.num_nodes
