"""When to save and what to keep. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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
"""How many copies of a rank's state checkpoints may hold in memory at a time: on its way to the disk, of the last two
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
    snapshot_every: int = 10
    """Steps between snapshots in memory; `erasure` only."""
    persist_every: int = 100
    """Steps between durable checkpoints. The last step and a requested stop are saved as well."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is committed. 0 keeps all."""

    num_parity_shards: int = 1
    """How many nodes may be lost at once without going back to a durable checkpoint; `erasure` only. Less than the
    number of nodes; 0 keeps no parity."""
    failure_domain: FailureDomain = FailureDomain.node
    shm_dir: str | None = None
    """Shared memory for snapshots; null is what the variable WINDLASS_SHM_DIR names on a node, or else /dev/shm."""
    agent_host: str | None = None
    """The address that this node's snapshot agent listens on; null is that from which it reaches the job's first."""
    lease_s: float = 600.0
    """How long a snapshot agent waits for trainers to come back, before it writes what it has to disk and ends."""
    max_send_bytes_per_s: float | None = None
    """The most that a node sends to protect snapshots; null is no limit."""

    def __post_init__(self) -> None:
        for key in ("snapshot_every", "lease_s"):
            value = getattr(self, key)
            require(value > 0, f"checkpoint.{key}", value, "must be above 0", f"leave checkpoint.{key} as it is")
        require(
            self.num_parity_shards >= 0,
            "checkpoint.num_parity_shards",
            self.num_parity_shards,
            "must not be negative",
            "set checkpoint.num_parity_shards=0 to keep no parity",
        )
        require(
            self.max_send_bytes_per_s is None or self.max_send_bytes_per_s > 0,
            "checkpoint.max_send_bytes_per_s",
            self.max_send_bytes_per_s,
            "must be above 0",
            "leave it null for no limit",
        )
        require(
            self.persist_every >= 1 or self.name == CheckpointKind.none,
            "checkpoint.persist_every",
            self.persist_every,
            "must be at least 1",
            "set checkpoint.persist_every=100, or checkpoint=none to save nothing",
        )
        require(
            self.keep >= 0,
            "checkpoint.keep",
            self.keep,
            "must not be negative",
            "set checkpoint.keep=0 to keep all",
        )
