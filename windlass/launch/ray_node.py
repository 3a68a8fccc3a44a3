"""Keeps the workers of a node, as a Ray actor, and tells the driver of them. It decides nothing."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import ray

from windlass.launch.attempt import Attempt
from windlass.launch.fingerprint import versions
from windlass.launch.node_workers import NodeWorkers, Report, temporary_folder

LONGEST_TEMP_DIR = 50
"""multiprocessing's socket lies some 50 characters below."""


class RayNode:
    """Args:
    config_yaml: the job's configuration, resolved.
    folder: where relative paths begin, if this node has it.
    variables: environment variables of the workers.
    """

    def __init__(self, config_yaml: str, folder: str, variables: Mapping[str, str]) -> None:
        self._config_yaml = config_yaml
        self._has_folder = os.path.isdir(folder)  # noqa: PTH112
        if self._has_folder:
            os.chdir(folder)
        os.environ.update(variables)
        # Ray's own main module: multiprocessing would have each worker run it.
        if hasattr(sys.modules["__main__"], "__file__"):
            del sys.modules["__main__"].__file__
        self._workers: NodeWorkers | None = None
        self._preparing = threading.Lock()

    def facts(self) -> dict[str, str]:
        """Describes this node in plain strings, so that every version understands them."""
        return {
            **versions(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "host": socket.gethostname(),
            "has_folder": str(self._has_folder),
        }

    def prepare(self) -> None:
        """Begins to import what workers need."""
        with self._preparing:
            scratch = temporary_folder("windlass-", LONGEST_TEMP_DIR)
            tempfile.tempdir = scratch  # multiprocessing's socket, too: Ray kills actors, and they cannot tidy up
            self._workers = NodeWorkers(self._config_yaml, Path(scratch))

    @property
    def workers(self) -> NodeWorkers:
        assert self._workers is not None, "the driver prepares a node before it uses it"
        return self._workers

    def serve_store(self, host: str, secret: bytes) -> int:
        return self.workers.serve_store(host, secret)

    def start(self, attempt: Attempt) -> None:
        self.workers.start(attempt)

    def watch(self, num_ended: int, num_lines: int, was_warm: bool, wait_s: float) -> Report:
        return self.workers.watch(num_ended, num_lines, was_warm, wait_s)

    def signal(self, number: int) -> None:
        self.workers.signal(number)

    def stop(self) -> None:
        self.workers.stop()

    def kill(self) -> None:
        self.workers.kill()

    def close(self, ends_agents: bool) -> list[str]:
        with self._preparing:
            return [] if self._workers is None else self._workers.close(ends_agents)
