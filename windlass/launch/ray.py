"""`launch=ray`: this process is the driver of a Ray cluster, and an actor a node keeps that node's workers.

The driver runs the job by its policy (`windlass.launch.driver`). This module is how it sees and reaches the nodes.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayActorError

from windlass.conf.schema import Config
from windlass.errors import ConfigError
from windlass.launch.attempt import Attempt
from windlass.launch.driver import Driver
from windlass.launch.interfaces import LOOPBACK, interface_of
from windlass.launch.policy import Limits, Order, OrderKind, Policy, Seen, WorkerEnd
from windlass.launch.ray_actors import Actors, NodeActor
from windlass.launch.ray_cluster import RayCluster, connected, too_small
from windlass.outcome import LAUNCHER
from windlass.text import printable
from windlass.train.signals import SECOND_PRESS_S, STOP_SIGNALS, handle, stop_heard

FIRST_S = 10.0
"""The least that a job waits for its nodes at its beginning, when processes on all of them start."""


class Interrupts:
    """Keeps what the user has asked this process for."""

    def __init__(self) -> None:
        self.stop = False
        self.at_once = False
        """A second Ctrl-C came, two seconds later or more."""
        self._first_at = 0.0

    def note(self, number: int, _: object) -> None:
        stop_heard()
        if self.stop and number == signal.SIGINT and time.monotonic() - self._first_at > SECOND_PRESS_S:
            self.at_once = True
        if not self.stop:
            self.stop, self._first_at = True, time.monotonic()

    @contextmanager
    def heard(self) -> Iterator[None]:
        previous = handle(dict.fromkeys(STOP_SIGNALS, self.note))
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def launch(config: Config) -> int:
    """Runs the job on a Ray cluster and returns its exit code.

    Raises:
        ConfigError: the cluster is not there, or cannot run it.
    """
    interrupts = Interrupts()
    with interrupts.heard(), connected(config) as cluster, interrupts.heard():  # again: Ray takes SIGTERM for itself
        bundle = cluster.bundle(config)
        num_local_ranks = config.launch.nproc_per_node or int(bundle.get("GPU", 1))
        for num_nodes in {config.launch.min_nodes, config.launch.max_nodes}:
            config.parallel.mesh_axes(num_nodes * num_local_ranks, num_local_ranks)
        limits = limits_of(config)
        policy = Policy(limits, num_local_ranks, config.launch.max_restarts, time.monotonic())
        nodes = RayNodes(config, cluster, limits, bundle, num_local_ranks, interrupts)
        try:
            outcome = Driver(nodes, policy, config.run_dir, _say).run()
            if outcome.message is not None and outcome.rank != 0:  # what rank 0 says is shown
                by = "" if outcome.rank == LAUNCHER else f"rank {outcome.rank}: "
                _error(f"{by}{outcome.message}")
            return outcome.exit_code
        finally:
            nodes.close()


def limits_of(config: Config) -> Limits:
    """Returns the limits of a job on Ray: it waits for lost nodes without end, and for its first ones it does not."""
    launch = config.launch
    first_give_up_s = max(launch.wait_for_nodes_s, FIRST_S)
    return Limits(launch.min_nodes, launch.max_nodes, launch.wait_for_nodes_s, FIRST_S, first_give_up_s)


class RayNodes:
    """Sees and reaches the nodes of a job on Ray, as `windlass.launch.driver.Nodes`; their IDs are Ray's."""

    def __init__(
        self,
        config: Config,
        cluster: RayCluster,
        limits: Limits,
        bundle: dict[str, float],
        num_local_ranks: int,
        interrupts: Interrupts,
    ) -> None:
        self._config, self._cluster, self._bundle, self._interrupts = config, cluster, bundle, interrupts
        self._num_local_ranks = num_local_ranks
        self._is_alone = config.launch.address == "local"
        folder = os.getcwd()  # noqa: PTH109
        self._actors = Actors(config, cluster, limits, bundle, folder, self._variables(), _warn)
        self._attempt = -1
        self._used: list[NodeActor] = []
        self._names: dict[str, str] = {}

    def _variables(self) -> dict[str, str]:
        """Ray gives an actor one thread, or as many as it has reserved for all of its ranks together. Ranks of a job
        that is alone on this machine are for no other to reach."""
        variables = {"OMP_NUM_THREADS": str(max(1, int(self._config.launch.cpus_per_rank)))}
        interface = interface_of(LOOPBACK) if self._is_alone else None
        if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            variables["GLOO_SOCKET_IFNAME"] = interface
        return variables

    def close(self) -> None:
        self._let_go(list(self._actors.all))
        self._actors.close()

    # --- What the driver sees. ---

    def look(self, timeout_s: float) -> None:
        self._actors.tick(timeout_s)
        for line in self._actors.take_lines():
            stream = sys.stderr if line.is_error else sys.stdout
            stream.write(f"{line.text}\n")
            stream.flush()

    def seen(self, has_workers: bool) -> Seen:
        """Leaves out, while an attempt runs, nodes whose workers could not start in a moment."""
        ready = self._actors.ready()
        self._names |= {actor.node_id: actor.name for actor in ready}
        return Seen(
            ready=[actor.node_id for actor in ready if actor.is_warm or not has_workers],
            num_coming=self._actors.num_coming(),
            leaving=[actor.node_id for actor in self._actors.draining()],
            is_stopping=self._interrupts.stop,
            is_interrupted=self._interrupts.at_once,
        )

    def take_lost(self) -> list[str]:
        lost = [actor.node_id for actor in self._actors.lost]
        self._actors.lost.clear()
        return lost

    def take_ends(self) -> list[WorkerEnd]:
        return [
            WorkerEnd(end.rank, node_rank, end.exit_code, end.outcome)
            for node_rank, actor in enumerate(self._used)
            if actor.report is not None and actor.report.attempt == self._attempt
            for end in actor.report.ended
        ]

    def name(self, node: str) -> str:
        return self._names.get(node, node[:8])

    def too_few(self, num_ready: int) -> ConfigError:
        return too_small(self._cluster, self._bundle, self._config, num_ready)

    # --- What it has them do. ---

    def start(self, attempt: int, nodes: Sequence[str]) -> bool:
        """Returns False if the node is lost where the ranks were to meet."""
        by_id = {actor.node_id: actor for actor in self._actors.ready()}
        self._attempt, self._used = attempt, [by_id[node] for node in nodes]
        first, secret = self._used[0], secrets.token_bytes(32)
        host = LOOPBACK if self._is_alone else first.address
        try:
            port = ray.get(first.handle.serve_store.remote(host, secret))
        except RayActorError:
            self._actors.mark_lost(first)
            return False
        starts = [
            actor.handle.start.remote(
                Attempt(attempt, node_rank, len(nodes), self._num_local_ranks, host, port, secret)
            )
            for node_rank, actor in enumerate(self._used)
        ]
        for actor, start in zip(self._used, starts, strict=True):
            try:
                ray.get(start)
            except RayActorError:
                self._actors.mark_lost(actor)
        self._actors.release_spares(self._used)
        return True

    def tell(self, order: Order) -> None:
        for actor in self._used:
            if actor not in self._actors.all or actor.node_id not in order.nodes:
                continue
            if order.kind == OrderKind.kill:
                actor.handle.kill.remote()
            elif order.kind == OrderKind.stop:
                actor.handle.stop.remote()
            else:
                number = signal.SIGUSR1 if order.kind == OrderKind.leave else signal.SIGTERM
                actor.handle.signal.remote(number)

    def conclude(self, leaving: Collection[str]) -> None:
        gone = [actor for actor in self._used if actor.node_id in leaving and actor in self._actors.all]
        if gone:
            _say(f"{', '.join(f'node {actor.name}' for actor in gone)} has left")
            self._let_go(gone)

    def _let_go(self, actors: list[NodeActor]) -> None:
        for folder in self._actors.let_go(actors, ends_agents=True):
            _warn(f"the snapshot agent in {folder} is still at work")

    def show_last_words(self, end: WorkerEnd) -> None:
        report = self._used[end.node_rank].report
        for ended in () if report is None else report.ended:
            if ended.rank == end.rank and ended.last_words:
                sys.stderr.write("\n".join(ended.last_words) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def _warn(text: str) -> None:
    sys.stderr.write(f"windlass: warning: {printable(text)}\n")
    sys.stderr.flush()


def _error(text: str) -> None:
    sys.stderr.write(f"windlass: error: {printable(text)}\n")
    sys.stderr.flush()
