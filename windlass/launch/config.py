"""Configures how workers are started. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from windlass.bounds import bounded, check_bounds
from windlass.errors import require


class LaunchKind(StrEnum):
    """`local` trains in this process; `torchrun` starts torch's elastic agent on this node and a process a rank; `ray`
    has a Ray cluster start them.
    """

    local = "local"
    torchrun = "torchrun"
    ray = "ray"


NODES_RULE = "must be a number of nodes, or the fewest and the most"
NODES_FIX = "write {0}4 or {0}2:4"


def parse_nodes(text: str) -> tuple[int, int] | None:
    """Returns the fewest and the most nodes of `N` or `MIN:MAX`; None if it is neither."""
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        return None
    return int(match[1]), int(match[2] or match[1])


@dataclass
class LaunchConfig:
    name: LaunchKind = LaunchKind.local
    nproc_per_node: int | None = bounded(None, at_least=1, fix="leave it null for one rank a GPU")
    """Ranks a node; null is one a GPU, or one on a machine without."""
    nnodes: str = "1"
    """Nodes: `4`, or `2:4` for a job that goes on with as few as 2 when nodes are lost, and grows to 4 as they come."""
    node_rank: int | None = None
    """`torchrun` only: the rank of this node among them, from 0; null has the job number them."""
    address: str = "auto"
    """`torchrun`: HOST:PORT where the nodes meet, HOST being one of them. `ray`: HOST:PORT of a cluster, `local` for
    one on this machine alone, `auto` for the one that `ray start` has started here."""
    secret_file: str | None = None
    """`torchrun` with an address: the file with the secret by which the job's nodes know each other, alike on all and
    readable by its user alone; null is `~/.config/windlass/secret`. It is made if it is missing. The variable
    `WINDLASS_SECRET` has the secret itself, and comes first."""
    max_restarts: int = bounded(3, at_least=0, fix="set launch.max_restarts=0 to never restart")
    """How often the workers are started again after one dies; they go on from the newest checkpoint."""
    wait_for_nodes_s: float = bounded(
        60.0, at_least=0, fix="set launch.wait_for_nodes_s=0 to go on with the nodes that are left at once"
    )
    """How long a job waits for another node in place of a lost one before it goes on with those that are left; of no
    meaning if `nnodes` is one number: then it waits, as long as for the first ones."""
    join_timeout_s: float = bounded(1800.0, above=0)
    """`torchrun` only: how long nodes wait until the fewest of them have met; those of a batch job start minutes
    apart."""
    hang_timeout_s: float | None = bounded(None, above=0, fix="leave it null for 10 times the longest step")
    """A step, or a batch of an evaluation, that takes longer has hung: all workers write where they are to their logs
    and are started again. Null is 10 times the longest step so far and at least 120 s."""
    cpus_per_rank: float = bounded(1.0, at_least=0)
    """`ray` only: what is reserved for each rank; and a GPU for each where ranks have one."""
    runtime_env: str | None = None
    """`ray` only: a YAML file with the runtime environment of the nodes' processes, as Ray's documentation has it."""

    def __post_init__(self) -> None:
        check_bounds(self, "launch")
        is_multi_node = self.name != LaunchKind.local
        require(
            is_multi_node or self.nproc_per_node in (None, 1),
            "launch.nproc_per_node",
            self.nproc_per_node,
            "launch=local trains on one rank, in this process",
            "choose launch=torchrun",
        )
        require(
            is_multi_node or self.nnodes == "1",
            "launch.nnodes",
            self.nnodes,
            "launch=local trains on one rank, in this process",
            "choose launch=torchrun or launch=ray",
        )
        require(
            parse_nodes(self.nnodes) is not None,
            "launch.nnodes",
            self.nnodes,
            NODES_RULE,
            NODES_FIX.format("launch.nnodes="),
        )
        self._check_address()

    def _check_address(self) -> None:
        is_host = re.fullmatch(r"(\[[^\]]+\]|[^:\s/]+):\d+", self.address) is not None
        if self.name == LaunchKind.torchrun:
            require(
                is_host or (self.address == "auto" and self.nnodes == "1"),
                "launch.address",
                self.address,
                "several nodes must know where to meet",
                "give all of them the same launch.address=HOST:PORT, HOST being one of them and PORT free there",
            )
            require(
                self.node_rank is None or (not self.is_elastic and 0 <= self.node_rank < self.max_nodes),
                "launch.node_rank",
                self.node_rank,
                f"must be from 0 to {self.max_nodes - 1}, and launch.nnodes one number",
                "leave it null to have the nodes sort it out",
            )
        elif self.name == LaunchKind.ray:
            require(
                is_host or self.address in ("auto", "local"),
                "launch.address",
                self.address,
                "must be auto, local or HOST:PORT of a Ray cluster",
                "leave it auto for the cluster that `ray start` has started",
            )

    @property
    def min_nodes(self) -> int:
        return int(self.nnodes.split(":")[0])

    @property
    def max_nodes(self) -> int:
        return int(self.nnodes.split(":")[-1])

    @property
    def is_elastic(self) -> bool:
        """The job may go on with fewer nodes."""
        return self.min_nodes < self.max_nodes
