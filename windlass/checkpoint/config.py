"""When to save and what to keep. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from windlass.errors import require


class CheckpointKind(StrEnum):
    none = "none"
    durable = "durable"


@dataclass
class CheckpointConfig:
    name: CheckpointKind = CheckpointKind.durable
    dir: str | None = None
    """Null is `checkpoints/` in the run folder."""
    persist_every: int = 100
    """Steps between durable checkpoints. The last step and a requested stop are saved as well."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is committed. 0 keeps all."""

    def __post_init__(self) -> None:
        require(
            self.persist_every >= 1,
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
