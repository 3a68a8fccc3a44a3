"""Describes a node's part in an attempt: one start of all workers of a job. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from windlass.launch.job_store import store_variables


@dataclass(frozen=True)
class Attempt:
    """Args:
    number: from 0.
    node_rank: of this node, among `num_nodes`.
    store_host, store_port, secret: of the job store on which the ranks meet; it is there.
    job: tells jobs apart that share a store.
    """

    number: int
    node_rank: int
    num_nodes: int
    num_local_ranks: int
    store_host: str
    store_port: int
    secret: bytes = field(repr=False)
    job: str = ""

    @property
    def first_rank(self) -> int:
        return self.node_rank * self.num_local_ranks

    def variables(self, local_rank: int) -> dict[str, str]:
        """Returns a worker's environment: torchrun's, and the store, which is a launcher's."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(self.node_rank),
            "WORLD_SIZE": str(self.num_nodes * self.num_local_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_local_ranks),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "MASTER_ADDR": self.store_host,
            "MASTER_PORT": str(self.store_port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": self.job,
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
            **store_variables((self.store_host, self.store_port), self.secret),
        }
