"""Joins or starts the Ray cluster that a job runs on, asks it, and says what its errors mean to a user."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.runtime_env import RuntimeEnv

from windlass.conf.schema import Config
from windlass.errors import ConfigError
from windlass.launch.node_workers import temporary_folder
from windlass.train.config import Device
from windlass.untrusted import read_yaml

REACH_S = 5.0
"""How long the machine of a given address may take to answer."""
HTTP2_SETTINGS = b"\x04"
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + HTTP2_SETTINGS + bytes(5)
"""The first bytes of a client of gRPC, which Ray speaks; the server's first frame is its settings, too (RFC 9113)."""
OBJECT_STORE_BYTES = 80 * 2**20
"""About the least that Ray takes. Nothing of windlass goes into it."""
LONGEST_TEMP_DIR = 30
"""Ray's sockets lie some 70 characters below its folder."""
RENEW_S = 0.5
"""How old what is known of the cluster may be."""
RAYS_ERRORS = (RayError, ConnectionError, RuntimeError, ValueError, TypeError, OSError)
"""Errors that `ray.init` raises for what is wrong outside of it."""


@dataclass(frozen=True)
class ClusterNode:
    node_id: str
    address: str
    resources: Mapping[str, float]
    """All that it has, in use or not."""

    @property
    def name(self) -> str:
        return node_name(self.address, self.node_id)

    def fits(self, bundle: Mapping[str, float]) -> bool:
        return all(self.resources.get(key, 0.0) >= amount for key, amount in bundle.items())


def node_name(address: str, node_id: str) -> str:
    """Returns the name of a node in messages: several nodes may share an address."""
    return f"{address} ({node_id[:8]})"


class RayCluster:
    """Keeps the driver's view of the cluster, and renews it when it is older than `RENEW_S`."""

    def __init__(self) -> None:
        self._seen_at = float("-inf")
        self.nodes: dict[str, ClusterNode] = {}
        """Those that Ray knows to live."""
        self.draining: set[str] = set()
        """Those that are about to go, by Ray's notice."""

    def look(self) -> bool:
        """Renews what is known, if it is time to; returns whether it was."""
        if time.monotonic() < self._seen_at + RENEW_S:
            return False
        self.nodes = {
            node["NodeID"]: ClusterNode(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
            for node in ray.nodes()
            if node["Alive"]
        }
        # Ray has no public call for it; its own Serve and autoscaler ask here.
        self.draining = set(ray._private.state.state.get_draining_nodes())
        self._seen_at = time.monotonic()
        return True

    def look_again(self) -> None:
        """Has the next look be a new one: something has changed."""
        self._seen_at = float("-inf")

    def bundle(self, config: Config) -> dict[str, float]:
        """Returns what a node of the job needs. Ranks have GPUs where any node has, unless the job trains on CPUs."""
        num_gpus = [int(node.resources["GPU"]) for node in self.nodes.values() if node.resources.get("GPU", 0) >= 1]
        launch = config.launch
        if config.train.device == Device.cpu or not (num_gpus or config.train.device == Device.cuda):
            num_ranks = launch.nproc_per_node or 1
            return {"CPU": max(0.001, num_ranks * launch.cpus_per_rank)}  # Ray refuses to reserve nothing
        num_ranks = launch.nproc_per_node or min(num_gpus, default=1)
        bundle = {"GPU": float(num_ranks), "CPU": num_ranks * launch.cpus_per_rank}
        return {key: amount for key, amount in bundle.items() if amount > 0}

    def describe(self, bundle: Mapping[str, float]) -> str:
        """Describes what the nodes have of what is needed."""
        keys = sorted(bundle)
        rows = [
            f"{node.name} with {_amounts({key: node.resources.get(key, 0) for key in keys})}"
            for node in sorted(self.nodes.values(), key=lambda node: node.name)
        ]
        return f"{len(rows)} node{'s' * (len(rows) != 1)}: {', '.join(rows)}"


def too_small(cluster: RayCluster, bundle: Mapping[str, float], config: Config, num_ready: int) -> ConfigError:
    num_fit = sum(node.fits(bundle) for node in cluster.nodes.values())
    num_nodes = config.launch.min_nodes
    busy = "; another job may hold the rest" if num_fit >= num_nodes else ""
    return ConfigError(
        "launch.nnodes",
        config.launch.nnodes,
        f"needs {num_nodes} nodes with {_amounts(bundle)} free on each, and after {config.launch.wait_for_nodes_s:g} s "
        f"{num_ready} could be had; the cluster has {cluster.describe(bundle)}{busy}",
        "add nodes, lower launch.nnodes, launch.nproc_per_node or launch.cpus_per_rank, "
        "or raise launch.wait_for_nodes_s for a cluster that grows",
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {key}" for key, amount in sorted(resources.items()))


@contextmanager
def connected(config: Config) -> Iterator[RayCluster]:
    """Joins the cluster that `launch.address` names, or starts one here, for as long as the context lasts.

    Raises:
        ConfigError: there is none, it does not answer, or it cannot run this.
    """
    address, runtime_env = config.launch.address, read_runtime_env(config.launch.runtime_env)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    with contextlib.ExitStack() as stack:
        if address == "local":
            settings |= _settings_of_own_cluster(stack)
        else:
            if address == "auto":
                address = os.environ.get("RAY_ADDRESS") or "auto"
            settings["address"] = address
            _check_address(address)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        try:
            ray.init(runtime_env=runtime_env, job_config=_JobOfNoFolder(), **settings)
        except RAYS_ERRORS as error:
            raise _cannot_join(address, error) from error
        stack.callback(ray.shutdown)
        cluster = RayCluster()
        cluster.look()
        yield cluster


class _JobOfNoFolder(JobConfig):
    """Ray would put the driver's working directory, and the folder of its command, first where workers find modules."""

    def _runtime_env_has_working_dir(self) -> bool:
        """Tells Ray not to do so; an own `working_dir` of the runtime environment is added elsewhere."""
        return True


def _settings_of_own_cluster(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Ray keeps a folder of each cluster for ever, so this one gets a folder that goes."""
    folder = temporary_folder("windlass-ray-", LONGEST_TEMP_DIR)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {
        "address": "local",
        "_temp_dir": folder,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def _check_address(address: str) -> None:
    """Ray waits long for a machine that is not there, and may end the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise ConfigError(
            "launch.address",
            address,
            "is no HOST:PORT of a Ray cluster's head, which the driver joins as a node of that cluster",
            "start windlass on a node of the cluster with launch.address=auto",
        )
    fix = "give the address that `ray start --head` has printed, or start a cluster there"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as sock:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            sock.sendall(HTTP2_GREETING)
            is_grpc = sock.recv(4)[3:] == HTTP2_SETTINGS
    except TimeoutError as error:
        raise ConfigError("launch.address", address, f"does not answer within {REACH_S:g} s", fix) from error
    except OSError as error:
        raise ConfigError("launch.address", address, f"cannot be reached: {error.strerror or error}", fix) from error
    if not is_grpc:
        raise ConfigError("launch.address", address, "answers, but is no Ray cluster", fix)


def _cannot_join(address: str, error: Exception) -> ConfigError:
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and address == "auto":
        return ConfigError(
            "launch.address",
            "auto",
            "no Ray cluster runs on this machine",
            "run `ray start --head`, name one with launch.address=HOST:PORT, or set launch.address=local",
        )
    if "ersion mismatch" in text:
        return ConfigError("launch.address", address, text.rstrip("."), "use the Python and the Ray of the cluster")
    return ConfigError(
        "launch.address",
        address,
        f"cannot be joined: {text.rstrip('.')}",
        "start windlass on a node of that cluster, with the Python and the Ray of the cluster",
    )


def read_runtime_env(path: str | None) -> dict[str, Any]:
    """Reads the runtime environment of a YAML file, as Ray takes it.

    Raises:
        ConfigError: the file is missing, or is not what Ray's documentation describes.
    """
    if path is None:
        return {}
    try:
        plain = read_yaml(Path(path))
        if not isinstance(plain, dict):
            raise ValueError("it holds no keys")
        if unknown := plain.keys() - RuntimeEnv.known_fields:  # Ray would pass over them
            raise ValueError(f"{', '.join(sorted(map(str, unknown)))} is no key of it")
        return dict(RuntimeEnv(**plain))
    except (OSError, TypeError, ValueError) as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError(
            "launch.runtime_env",
            path,
            f"is no runtime environment of Ray: {text.rstrip('.')}",
            "write a YAML file with keys such as env_vars, pip and working_dir, or leave it null",
        ) from error
