"""What scripts for batch systems share: the job that is asked for, and its overrides, checked as `windlass train` does.

windlass is no scheduler. A batch system gives the machines and starts a launcher on each; the launchers of a job find
each other by `launch.address`, and all that is special to a batch system is in the text of its script.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.errors import ConfigError, require
from windlass.launch.config import NODES_FIX, NODES_RULE, parse_nodes

OWN_KEYS = ("launch", "launch.nnodes", "launch.address", "launch.node_rank")
"""What the script sets."""
COMMAND = ("windlass", "train", "launch=torchrun")


@dataclass(frozen=True)
class Job:
    """What a batch system is asked for; all counts are those of a node.

    Args:
        overrides: of `windlass train`, without `OWN_KEYS`.
        grace_s: how long a job that is told to end has to save.
        memory: as the batch system writes it.
    """

    name: str
    min_nodes: int
    max_nodes: int
    overrides: tuple[str, ...]
    grace_s: int
    num_gpus: int | None = None
    num_cpus: int | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        for flag, count in (("--gpus", self.num_gpus), ("--cpus", self.num_cpus), ("--grace-s", self.grace_s)):
            require(count is None or count >= 1, flag, count, "must be at least 1", "leave it out")

    @property
    def is_elastic(self) -> bool:
        return self.min_nodes < self.max_nodes

    @property
    def nnodes(self) -> str:
        """As `launch.nnodes` has it."""
        return f"{self.min_nodes}:{self.max_nodes}" if self.is_elastic else str(self.max_nodes)

    def sets(self, key: str) -> bool:
        """Whether the user has an override of this key."""
        return any(key_of(override) == key for override in self.overrides)


def job_of(options: argparse.Namespace) -> Job:
    """The job that a command line of `windlass script` asks for. Raises ConfigError."""
    nodes = parse_nodes(options.nodes)
    if nodes is None:
        raise ConfigError("--nodes", options.nodes, NODES_RULE, NODES_FIX.format("--nodes "))
    return Job(
        name=options.name,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        overrides=own_overrides(options.overrides),
        grace_s=options.grace_s,
        num_gpus=options.gpus,
        num_cpus=options.cpus,
        memory=options.memory,
    )


def own_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that go into the script as they are.

    Raises:
        ConfigError: one of them is for the script to set.
    """
    kept = tuple(override for override in overrides if override != "launch=torchrun")
    for override in kept:
        if key_of(override) in OWN_KEYS:
            raise ConfigError(
                key_of(override),
                override.partition("=")[2],
                "is what the script sets",
                "leave it out; --nodes says how many nodes there are",
            )
    return kept


def check(job: Job) -> Config:
    """The configuration that the job's nodes will compose.

    Raises:
        ConfigError: they could not, or their ranks cannot be laid out so.
    """
    config = compose([*job.overrides, *COMMAND[2:], f"launch.nnodes={job.nnodes}", "launch.address=first:1"])
    num_ranks = config.launch.nproc_per_node or job.num_gpus or 1
    for num_nodes in range(job.min_nodes, job.max_nodes + 1):
        config.parallel.mesh_axes(num_nodes * num_ranks, num_ranks)
    return config


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
