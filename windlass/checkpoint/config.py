"""The settings of checkpoints: when to save, and what to keep. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from windlass.bounds import bounded, check_bounds
from windlass.errors import require


class CheckpointKind(StrEnum):
    none = "none"
    durable = "durable"
    """Written while training waits; state that is on a disk is pinned there, and committed behind the training."""
    lazy = "lazy"
    """Copied behind the training into the memory of a snapshot agent, which writes it; with state on a disk as durable,
    and weights are written behind the training, too."""
    erasure = "erasure"
    """As lazy, and in between kept in memory alone, with parity on other nodes."""


COPIES_IN_MEMORY = {
    CheckpointKind.none: 0,
    CheckpointKind.durable: 1,
    CheckpointKind.lazy: 2,
    CheckpointKind.erasure: 5,
}
"""The copies of a rank's state that checkpoints may hold in memory at a time: on its way to the disk, of the last two
snapshots, and what is sent between ranks for their parity."""


class FailureDomain(StrEnum):
    """The unit that is lost together: parity lies elsewhere. `rank` protects ranks of one machine from each other."""

    node = "node"
    rank = "rank"


@dataclass
class CheckpointConfig:
    name: CheckpointKind = CheckpointKind.durable
    dir: str | None = None
    """Null is `checkpoints/` in the run folder."""
    snapshot_every: int = bounded(10, at_least=1)
    """Steps between snapshots in memory; `erasure` only."""
    persist_every: int = 100
    """Steps between durable checkpoints. The last step and a requested stop are saved as well."""
    keep: int = bounded(2, at_least=0, fix="set checkpoint.keep=0 to keep all")
    """Newest checkpoints kept; older ones are deleted once a newer one is committed. 0 keeps all."""

    num_parity_shards: int = bounded(1, at_least=0, fix="set checkpoint.num_parity_shards=0 to keep no parity")
    """How many nodes may be lost at once without going back to a durable checkpoint; `erasure` only. Less than the
    number of nodes; 0 keeps no parity."""
    failure_domain: FailureDomain = FailureDomain.node
    shm_dir: str | None = None
    """Shared memory for snapshots; null is what the variable WINDLASS_SHM_DIR names on a node, or else /dev/shm."""
    agent_host: str | None = None
    """The address that this node's snapshot agent listens on; null is that from which it reaches the job's first."""
    lease_s: float = bounded(600.0, above=0)
    """How long a snapshot agent waits for trainers to come back, before it writes what it has to disk and ends."""
    max_send_bytes_per_s: float | None = bounded(None, above=0, fix="leave it null for no limit")
    """The most that a node sends to protect snapshots; null is no limit."""

    @property
    def num_slots(self) -> int:
        """Snapshots that have room on a node: with `erasure` two, so that one is whole while the next is taken."""
        return 2 if self.name == CheckpointKind.erasure else 1

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")
        require(
            self.persist_every >= 1 or self.name == CheckpointKind.none,
            "checkpoint.persist_every",
            self.persist_every,
            "must be at least 1",
            "set checkpoint.persist_every=100, or checkpoint=none to save nothing",
        )
