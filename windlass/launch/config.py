"""How workers are started. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from windlass.errors import require


class LaunchKind(StrEnum):
    """`local` trains in this process; `torchrun` starts torch's elastic agent and a process a rank."""

    local = "local"
    torchrun = "torchrun"


@dataclass
class LaunchConfig:
    name: LaunchKind = LaunchKind.local
    nproc_per_node: int | None = None
    """Ranks; null is one a GPU, or one on a machine without."""
    max_restarts: int = 3
    """How often the workers are started again after one dies; they go on from the newest checkpoint."""

    def __post_init__(self) -> None:
        require(
            self.nproc_per_node is None or self.nproc_per_node >= 1,
            "launch.nproc_per_node",
            self.nproc_per_node,
            "must be at least 1",
            "leave it null for one rank a GPU",
        )
        require(
            self.name != LaunchKind.local or self.nproc_per_node in (None, 1),
            "launch.nproc_per_node",
            self.nproc_per_node,
            "launch=local trains on one rank, in this process",
            "choose launch=torchrun",
        )
        require(
            self.max_restarts >= 0,
            "launch.max_restarts",
            self.max_restarts,
            "must not be negative",
            "set launch.max_restarts=0 to never restart",
        )
