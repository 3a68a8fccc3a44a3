"""Keeps the actors of a job, one a node: begins them, hears what they report, and lets them go.

The driver calls `tick` and then looks. Nothing here waits longer than that, so a node that does not answer holds up
nobody; and nothing here decides what the job does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from windlass.conf.schema import Config
from windlass.conf.store import to_yaml
from windlass.errors import ConfigError, WindlassError
from windlass.launch.fingerprint import VERSIONS, versions
from windlass.launch.node_workers import CLOSE_S, Line, Report
from windlass.launch.policy import Limits, Liveness, NodeHistory
from windlass.launch.ray_cluster import RayCluster, node_name
from windlass.launch.ray_node import RayNode
from windlass.launch.ray_reservations import Reservation, Reservations

WATCH_S = 1.0
"""How long an actor keeps a question that has no answer yet."""
LOST_AFTER_S = 1.0
"""An actor that cannot be reached for so long is lost. Ray says so 1.6 s after a kill, and why only 15 s after it."""
RETRY_S = 0.2
NUM_CALLS = 8
"""Questions that an actor answers at a time."""


@dataclass(eq=False)
class NodeActor:
    """Holds the actor of a node. It is asked one thing after the other: `stage` says what."""

    reservation: Reservation
    handle: Any
    stage: str = "facts"
    asked: ray.ObjectRef | None = None
    retry_at: float = 0.0
    node_id: str = ""
    address: str = ""
    name: str = "a node that is coming"
    report: Report | None = None
    lines: list[Line] = field(default_factory=list)
    """Not yet taken."""
    num_lines: int = 0

    @property
    def is_ready(self) -> bool:
        return self.stage == "watch"

    @property
    def is_warm(self) -> bool:
        return self.report is not None and self.report.is_warm

    def ask(self) -> None:
        if self.stage == "facts":
            self.asked = self.handle.facts.remote()
        elif self.stage == "prepare":
            self.asked = self.handle.prepare.remote()
        else:
            num_ended = 0 if self.report is None else len(self.report.ended)
            self.asked = self.handle.watch.remote(num_ended, self.num_lines, self.is_warm, WATCH_S)


class Actors:
    """Args:
    bundle: what a node of the job needs.
    folder: where relative paths of `config` begin.
    variables: environment variables of the workers.
    warn: told of nodes that cannot be used.
    """

    def __init__(
        self,
        config: Config,
        cluster: RayCluster,
        limits: Limits,
        bundle: Mapping[str, float],
        folder: str,
        variables: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._cluster, self._warn = config, cluster, warn
        self._arguments = (to_yaml(config), folder, dict(variables))
        self._options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "max_restarts": 0,
            "max_concurrency": NUM_CALLS,
        }
        self._reservations = Reservations(bundle, limits.min_nodes)
        self._limits = limits
        self._history, self._liveness = NodeHistory(), Liveness(LOST_AFTER_S)
        self._has_been_ready = False
        self._closing: dict[ray.ObjectRef, NodeActor] = {}
        self.all: list[NodeActor] = []
        self.lost: list[NodeActor] = []
        """Those that had been ready, since the driver cleared it."""

    # --- What the driver sees. ---

    def ready(self) -> list[NodeActor]:
        """Returns those on whose nodes workers can be started: not on nodes that are told to go."""
        draining = self._cluster.draining
        return [actor for actor in self.all if actor.is_ready and actor.node_id not in draining]

    def num_coming(self) -> int:
        """Counts nodes that Ray has given the job, and that are not ready yet."""
        return sum(not actor.is_ready and actor.reservation.node_id is not None for actor in self.all)

    def draining(self) -> list[NodeActor]:
        return [actor for actor in self.all if actor.node_id in self._cluster.draining]

    def tick(self, timeout_s: float) -> None:
        """Hears what there is to hear, waiting for it at most so long.

        Raises:
            ConfigError: the first nodes of the job cannot run it.
        """
        now = time.monotonic()
        for actor in self.all:
            if actor.asked is None and now >= actor.retry_at:
                actor.ask()
        by_ref = {actor.asked: actor for actor in self.all if actor.asked is not None}
        if by_ref:
            answered, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s)
            if answered:
                answered, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
            for ref in answered:
                self._hear(by_ref[ref], ref)
        else:
            time.sleep(timeout_s)
        for actor in list(self.all):
            if self._liveness.is_lost(actor.node_id, time.monotonic()):
                self.mark_lost(actor)
        self._forget_closed()
        if self._cluster.look():
            self._renew()

    def take_lines(self) -> list[Line]:
        lines = [line for actor in self.all for line in actor.lines]
        for actor in self.all:
            actor.lines = []
        return lines

    # --- Hearing. ---

    def _hear(self, actor: NodeActor, ref: ray.ObjectRef) -> None:
        actor.asked = None
        try:
            answer = ray.get(ref)
        except ActorUnavailableError:
            if actor.is_ready:  # one that starts is slow on a busy node
                self._liveness.note(actor.node_id, time.monotonic(), is_heard=False)
            actor.retry_at = time.monotonic() + RETRY_S
            return
        except RayActorError as error:
            node_id = actor.reservation.node_id or ""
            fails_to_start = not actor.is_ready and self._history.note_failed_start(node_id)
            if error.actor_init_failed or fails_to_start:
                self._refuse(actor, _cannot_run_here(actor, error))
            else:
                self._lose(actor)
            return
        except RayTaskError:
            raise
        except RayError as error:
            self._refuse(actor, _cannot_run_here(actor, error))
            return
        self._liveness.note(actor.node_id, time.monotonic(), is_heard=True)
        if actor.stage == "facts":
            self._meet(actor, answer)
        elif actor.stage == "prepare":
            actor.stage = "watch"
            self._history.note_started(actor.node_id)
        else:
            self._note(actor, answer)

    def _meet(self, actor: NodeActor, facts: dict[str, str]) -> None:
        actor.node_id, actor.address = facts["node_id"], facts["address"]
        actor.name = node_name(actor.address, actor.node_id)
        try:
            _check_facts(facts, actor.name, self._config, self._arguments[1])
        except ConfigError as error:
            self._refuse(actor, error)
            return
        actor.stage = "prepare"

    @staticmethod
    def _note(actor: NodeActor, report: Report) -> None:
        fresh = [line for line in report.lines if line.number >= actor.num_lines]
        actor.lines += fresh
        actor.num_lines += len(fresh)
        actor.report = report

    def _refuse(self, actor: NodeActor, error: WindlassError) -> None:
        """Drops a node. A job that has not begun ends and says what is wrong with it; a running one does without it."""
        if not self._has_been_ready:
            raise error
        self._warn(f"{error}")
        if node_id := actor.node_id or actor.reservation.node_id:
            self._history.refuse(node_id)
        if actor.is_ready:
            self.lost.append(actor)
        self._drop(actor)

    # --- Coming and going. ---

    def _renew(self) -> None:
        """Loses, begins and asks for actors as another look at the cluster has it."""
        now, alive, draining = time.monotonic(), self._cluster.nodes, self._cluster.draining
        for actor in list(self.all):
            if (actor.node_id or actor.reservation.node_id) not in alive:
                self._lose(actor)
        self._reservations.look(alive)
        with_actor = {actor.reservation for actor in (*self.all, *self._closing.values())}
        self.all += [self._begin(placed) for placed in self._reservations.placed if placed not in with_actor]
        self._has_been_ready |= len(self.ready()) >= self._limits.min_nodes
        num_expected = len(self.all) - len(self.draining()) + self._reservations.num_swapping
        if self._reservations.has_first and self._limits.wants_another(num_expected):
            in_use = (*self.all, *self._closing.values())
            used = {actor.reservation.node_id for actor in in_use if actor.reservation.node_id is not None}
            self._reservations.ask_for_one(frozenset(used | draining | self._history.to_avoid(now)))
        else:
            self._reservations.take_back()

    def _begin(self, reservation: Reservation) -> NodeActor:
        remote = ray.remote(RayNode).options(scheduling_strategy=reservation.strategy, **self._options)
        return NodeActor(reservation, remote.remote(*self._arguments))

    def _lose(self, actor: NodeActor) -> None:
        if actor.is_ready:
            self.lost.append(actor)
        self._drop(actor)
        self._cluster.look_again()

    def mark_lost(self, actor: NodeActor) -> None:
        """Gives up an actor that cannot be reached: its node may be gone, too, which Ray does not know yet."""
        if actor in self.all:
            self._history.note_lost(actor.node_id, time.monotonic())
            self._lose(actor)

    def _drop(self, actor: NodeActor) -> None:
        self.all.remove(actor)
        self._liveness.note(actor.node_id, 0.0, is_heard=True)  # the next actor there is another
        with contextlib.suppress(RayError, ValueError):
            ray.kill(actor.handle)
        self._reservations.give_back(actor.reservation)

    def let_go(self, actors: list[NodeActor], ends_agents: bool) -> list[str]:
        """Ends what runs on some nodes, all at once, and gives them back where Ray can take them back.

        Returns:
            The folders of snapshot agents that are still at work.
        """
        closing = {actor.handle.close.remote(ends_agents): actor for actor in actors if actor.stage != "facts"}
        left: list[str] = []
        if closing:
            done, _ = ray.wait(list(closing), num_returns=len(closing), timeout=2 * CLOSE_S)
            for ref in done:
                with contextlib.suppress(RayError):  # lost at the last moment
                    left += [f"{folder} on node {closing[ref].name}" for folder in ray.get(ref)]
        for actor in actors:
            if actor in self.all:
                self._drop(actor)
        return left

    def release_spares(self, used: list[NodeActor]) -> None:
        """Gives nodes back that the job has no use for."""
        if self._limits.wants_another(len(used)):
            return
        for actor in [actor for actor in self.all if actor not in used]:
            if actor.stage == "facts":
                self._drop(actor)
            else:  # which takes a while, and nobody waits for it
                self.all.remove(actor)
                self._closing[actor.handle.close.remote(False)] = actor

    def _forget_closed(self) -> None:
        if self._closing:
            closed, _ = ray.wait(list(self._closing), num_returns=len(self._closing), timeout=0)
            for ref in closed:
                actor = self._closing.pop(ref)
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(actor.handle)
                self._reservations.give_back(actor.reservation)

    def close(self) -> None:
        self._reservations.close()


def _check_facts(facts: Mapping[str, str], name: str, config: Config, folder: str) -> None:
    """Raises ConfigError if a node is not what the driver's is."""
    mine = versions()
    for key in VERSIONS:
        if facts[key] != mine[key]:
            raise ConfigError(
                key,
                facts[key],
                f"that is the version on node {name}, the driver has {mine[key]}, and all nodes must have the same",
                f"install {key} {mine[key]} on that node, or name it in launch.runtime_env",
            )
    is_relative = not config.run_dir.startswith("/")
    if facts["has_folder"] != "True" and is_relative:
        raise ConfigError(
            "run_dir",
            config.run_dir,
            f"begins in {folder}, which node {name} does not have",
            "give a path that all nodes have",
        )


def _cannot_run_here(actor: NodeActor, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    node_id = actor.reservation.node_id or "?"
    return ConfigError(
        "launch.runtime_env",
        "null",
        f"node {node_id[:8]} cannot run windlass: {lines[-1] if lines else error}",
        "install the same windlass, torch and Python on all nodes, or name them in launch.runtime_env",
    )
