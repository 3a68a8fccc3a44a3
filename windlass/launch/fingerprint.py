"""Compares the nodes of a job in what must be the same on all of them: one that differs is refused. Torch-free."""

from __future__ import annotations

import hashlib
import platform
import socket
from importlib import metadata

import windlass
from windlass.conf.dotted_keys import flatten
from windlass.conf.schema import Config
from windlass.conf.store import to_plain
from windlass.errors import ConfigError

VERSIONS = ("windlass", "torch", "python")
OWN_KEYS = frozenset(
    {
        "checkpoint.agent_host",
        "checkpoint.shm_dir",
        "data.cache_dir",
        "data.num_workers",
        "launch.node_rank",
        "launch.secret_file",
        "metrics.console",
        "offload.dir",
        "offload.max_host_bytes",
    }
)
"""Keys that may differ between nodes."""


def versions() -> dict[str, str]:
    """Returns this process's versions, by the names in `VERSIONS`, without importing what takes long."""
    return {
        "windlass": windlass.__version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def fingerprint(config: Config, num_local_ranks: int) -> dict[str, str]:
    """Gathers what must be alike on all nodes, and this node's name."""
    plain = {key: str(value) for key, value in flatten(to_plain(config)).items() if key not in OWN_KEYS}
    return {
        **plain,
        "launch.nproc_per_node": str(num_local_ranks),
        "launch.node_rank": "null" if config.launch.node_rank is None else "a number",
        **versions(),
        "node": socket.gethostname(),
    }


def difference(mine: dict[str, str], first: dict[str, str]) -> ConfigError | None:
    """Returns the error of a node that cannot be in one job with the first that came, or None."""
    for key in (*VERSIONS, *sorted((mine.keys() | first.keys()) - {*VERSIONS, "node"})):
        own, theirs = mine.get(key, "missing"), first.get(key, "missing")
        if own != theirs:
            where = f"on node {mine['node']}, and node {first['node']}"
            if key in VERSIONS:
                return ConfigError(key, own, f"{where} has {theirs}", f"install the same {key} on all nodes")
            return ConfigError(key, own, f"{where} has {theirs}", "start all nodes with the same overrides")
    return None


def job_name(config: Config) -> str:
    """Returns a name that is alike on all nodes and in every start of the job, and no other job's."""
    return hashlib.sha256(f"{config.run_dir}\n{config.checkpoint.dir}".encode()).hexdigest()[:16]
