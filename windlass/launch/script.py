"""Describes a job to batch systems, and checks its overrides as `windlass train` does: what all their scripts share.

windlass is no scheduler. A batch system gives the machines and starts a launcher on each; the launchers of a job find
each other by `launch.address`, and all that is special to a batch system is in the text of its script.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.errors import ConfigError, require
from windlass.launch.config import NODES_FIX, NODES_RULE, parse_nodes

OWN_KEYS = ("launch", "launch.nnodes", "launch.address", "launch.node_rank")
"""Keys that the script sets."""
COMMAND = ("windlass", "train", "launch=torchrun")

Options = TypeVar("Options", bound=Any)


@dataclass(frozen=True)
class Job:
    """Holds what a batch system is asked for; all counts are those of a node.

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
        """The number of nodes as `launch.nnodes` has it."""
        return f"{self.min_nodes}:{self.max_nodes}" if self.is_elastic else str(self.max_nodes)

    def command(
        self, nnodes: str, address: str, defaults: Mapping[str, object], quote: Callable[[str], str]
    ) -> list[str]:
        """Returns the words of `windlass train` on each node.

        Args:
            nnodes, address: the words that say how many nodes there are, and where they meet.
            defaults: what holds unless the user has an override of the key.
            quote: writes an override of the user so that the batch system hands it on as it is.
        """
        given = {key_of(override) for override in self.overrides}
        kept = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        return [*COMMAND, nnodes, address, *kept, *map(quote, self.overrides)]


def parse_job(options: argparse.Namespace) -> tuple[Job, Config]:
    """Returns the job that a command line of `windlass script` asks for, and the configuration of its nodes.

    Raises:
        ConfigError: it cannot be.
    """
    nodes = parse_nodes(options.nodes)
    if nodes is None:
        raise ConfigError("--nodes", options.nodes, NODES_RULE, NODES_FIX.format("--nodes "))
    job = Job(
        name=options.name,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        overrides=own_overrides(options.overrides),
        grace_s=options.grace_s,
        num_gpus=options.gpus,
        num_cpus=options.cpus,
        memory=options.memory,
    )
    return job, check(job)


def parse_options(kind: type[Options], options: argparse.Namespace) -> Options:
    """Returns what a command line says of one batch system alone, as that system's dataclass. Raises ConfigError."""
    given = {field.name: getattr(options, field.name) for field in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def require_match(pattern: str, flag: str, value: str | None, rule: str, fix: str) -> None:
    """Raises ConfigError unless the whole value is as the pattern has it, or there is none."""
    require(value is None or re.fullmatch(pattern, value) is not None, flag, value, rule, fix)


def own_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns the overrides that go into the script as they are.

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
    """Returns the configuration that the job's nodes will compose.

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
