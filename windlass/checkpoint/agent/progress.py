"""Keeps how far the snapshot in flight has come on a node: whose data is awaited, and which parity. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import SnapshotId


@dataclass
class Progress:
    """Counts what is still to come."""

    header: Header
    """The slot's, when it was begun."""
    began: float
    waiting: set[int]
    """Local ranks whose data is awaited."""
    owed: dict[int, int] = field(default_factory=dict)
    """Blocks that each other node has still to send."""
    all_owed: dict[int, int] = field(default_factory=dict)
    parity_left: int = 0
    """Blocks of parity that are not whole yet."""
    copied_at: float = 0.0
    prepared_at: float = 0.0

    @staticmethod
    def begin(header: Header, now: float) -> Progress:
        stripes = header.stripes
        progress = Progress(header, now, {region.rank for region in header.own_regions})
        for row in range(stripes.num_parity_shards):
            stripe = stripes.stripe_of_parity(header.position, row)
            for chunk in range(stripes.num_data_shards):
                position = stripes.node_of_shard(stripe, chunk)
                progress.owed[position] = progress.owed.get(position, 0) + stripes.blocks_per_chunk
        progress.all_owed = progress.owed.copy()
        progress.parity_left = stripes.num_parity_shards * stripes.blocks_per_chunk
        return progress

    @property
    def snapshot(self) -> SnapshotId:
        return self.header.snapshot

    def has_begun_to_send(self, position: int) -> bool:
        """Tells whether a node has sent some of what it owes, and not all."""
        return 0 < self.owed.get(position, 0) < self.all_owed.get(position, 0)
