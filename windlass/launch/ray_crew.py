"""The actors of a job, one a node: how they come, what they report, and how they are lost or let go.

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
from windlass.launch.node_workers import CLOSE_S, Line, Report
from windlass.launch.ray_cluster import RayCluster, node_name
from windlass.launch.ray_node import RayNode
from windlass.launch.ray_places import Place, Places
from windlass.launch.versions import VERSIONS, versions

WATCH_S = 1.0
"""How long an actor keeps a question that has no answer yet."""
LOST_AFTER_S = 1.0
"""An actor that cannot be reached for so long is lost. Ray says so 1.6 s after a kill, and why only 15 s after it."""
DOUBT_S = 60.0
"""How long a node is avoided after its actor was lost: by then Ray knows whether the node is alive."""
RETRY_S = 0.2
MAX_FAILURES = 5
"""Actors that do not start on a node before it is refused."""
NUM_CALLS = 8
"""That an actor answers at a time."""


@dataclass(eq=False)
class Member:
    """An actor. It is asked one thing after the other: `stage` says what."""

    place: Place
    actor: Any
    stage: str = "facts"
    asked: ray.ObjectRef | None = None
    retry_at: float = 0.0
    unreachable_since: float | None = None
    node_id: str = ""
    address: str = ""
    name: str = "a node that is coming"
    ready_at: float = 0.0
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
            self.asked = self.actor.facts.remote()
        elif self.stage == "prepare":
            self.asked = self.actor.prepare.remote()
        else:
            num_ended = 0 if self.report is None else len(self.report.ended)
            self.asked = self.actor.watch.remote(num_ended, self.num_lines, self.is_warm, WATCH_S)


class Crew:
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
        self._places = Places(bundle, config.launch.min_nodes)
        self._doubted: dict[str, float] = {}  # node -> when its actor was lost
        self._failures: dict[str, int] = {}  # node -> actors that did not start there, in a row
        self._refused: set[str] = set()
        self._has_been_ready = False
        self._closing: dict[ray.ObjectRef, Member] = {}
        self.members: list[Member] = []
        self.lost: list[Member] = []
        """Since the driver cleared it; of those that had been ready."""

    # --- What the driver sees. ---

    def ready(self) -> list[Member]:
        """On which workers can be started: nodes that are told to go are none."""
        draining = self._cluster.draining
        return [member for member in self.members if member.is_ready and member.node_id not in draining]

    def num_coming(self) -> int:
        """Nodes that Ray has given the job, and that are not ready yet."""
        return sum(not member.is_ready and member.place.node_id is not None for member in self.members)

    def draining(self) -> list[Member]:
        return [member for member in self.members if member.node_id in self._cluster.draining]

    def tick(self, timeout_s: float) -> None:
        """Hears what there is to hear, waiting for it at most so long.

        Raises:
            ConfigError: the first nodes of the job cannot run it.
        """
        now = time.monotonic()
        for member in self.members:
            if member.asked is None and now >= member.retry_at:
                member.ask()
        by_ref = {member.asked: member for member in self.members if member.asked is not None}
        if by_ref:
            answered, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s)
            if answered:
                answered, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
            for ref in answered:
                self._hear(by_ref[ref], ref)
        else:
            time.sleep(timeout_s)
        for member in list(self.members):
            since = member.unreachable_since
            if since is not None and time.monotonic() - since > LOST_AFTER_S:
                self.mark_lost(member)
        self._forget_closed()
        if self._cluster.look():
            self._renew()

    def take_lines(self) -> list[Line]:
        lines = [line for member in self.members for line in member.lines]
        for member in self.members:
            member.lines = []
        return lines

    # --- Hearing. ---

    def _hear(self, member: Member, ref: ray.ObjectRef) -> None:
        member.asked = None
        try:
            answer = ray.get(ref)
        except ActorUnavailableError:
            if member.is_ready:  # one that starts is slow on a busy node
                member.unreachable_since = member.unreachable_since or time.monotonic()
            member.retry_at = time.monotonic() + RETRY_S
            return
        except RayActorError as error:
            node_id = member.place.node_id or ""
            if not member.is_ready:
                self._failures[node_id] = self._failures.get(node_id, 0) + 1
            if error.actor_init_failed or self._failures.get(node_id, 0) > MAX_FAILURES:
                self._refuse(member, _cannot_run_here(member, error))
            else:
                self._lose(member)
            return
        except RayTaskError:
            raise
        except RayError as error:
            self._refuse(member, _cannot_run_here(member, error))
            return
        member.unreachable_since = None
        if member.stage == "facts":
            self._meet(member, answer)
        elif member.stage == "prepare":
            member.stage, member.ready_at = "watch", time.monotonic()
            self._failures.pop(member.node_id, None)
            self._doubted.pop(member.node_id, None)
        else:
            self._note(member, answer)

    def _meet(self, member: Member, facts: dict[str, str]) -> None:
        member.node_id, member.address = facts["node_id"], facts["address"]
        member.name = node_name(member.address, member.node_id)
        try:
            _check_facts(facts, member.name, self._config, self._arguments[1])
        except ConfigError as error:
            self._refuse(member, error)
            return
        member.stage = "prepare"

    @staticmethod
    def _note(member: Member, report: Report) -> None:
        fresh = [line for line in report.lines if line.number >= member.num_lines]
        member.lines += fresh
        member.num_lines += len(fresh)
        member.report = report

    def _refuse(self, member: Member, error: WindlassError) -> None:
        """A job that has not begun says what is wrong with a node; a running one does without that node."""
        if not self._has_been_ready:
            raise error
        self._warn(f"{error}")
        if node_id := member.node_id or member.place.node_id:
            self._refused.add(node_id)
        self._drop(member)

    # --- Coming and going. ---

    def _renew(self) -> None:
        """What follows from another look at the cluster: who is lost, who is missing, who is too many."""
        now, alive, draining = time.monotonic(), self._cluster.nodes, self._cluster.draining
        for member in list(self.members):
            if (member.node_id or member.place.node_id) not in alive:
                self._lose(member)
        self._places.look(alive)
        manned = {member.place for member in (*self.members, *self._closing.values())}
        self.members += [self._begin(place) for place in self._places.places if place not in manned]
        self._doubted = {node: at for node, at in self._doubted.items() if now < at + DOUBT_S}
        self._has_been_ready |= len(self.ready()) >= self._config.launch.min_nodes
        num_expected = len(self.members) - len(self.draining()) + self._places.num_swapping
        if self._places.has_first and num_expected < self._config.launch.max_nodes:
            in_use = (*self.members, *self._closing.values())
            used = {member.place.node_id for member in in_use if member.place.node_id is not None}
            self._places.ask_for_one(frozenset(used | draining | self._refused | self._doubted.keys()))
        else:
            self._places.take_back()

    def _begin(self, place: Place) -> Member:
        remote = ray.remote(RayNode).options(scheduling_strategy=place.strategy, **self._options)
        return Member(place, remote.remote(*self._arguments))

    def _lose(self, member: Member) -> None:
        if member.is_ready:
            self.lost.append(member)
        self._drop(member)
        self._cluster.look_again()

    def mark_lost(self, member: Member) -> None:
        """It cannot be reached: its node may be gone, too, which Ray does not know yet."""
        if member in self.members:
            self._doubted[member.node_id] = time.monotonic()
            self._lose(member)

    def _drop(self, member: Member) -> None:
        self.members.remove(member)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(member.actor)
        self._places.give_back(member.place)

    def let_go(self, members: list[Member], ends_agents: bool) -> list[str]:
        """Ends what runs on some nodes, all at once, and gives them back where Ray can take them back.

        Returns:
            The folders of snapshot agents that are still at work.
        """
        closing = {member.actor.close.remote(ends_agents): member for member in members if member.stage != "facts"}
        left: list[str] = []
        if closing:
            done, _ = ray.wait(list(closing), num_returns=len(closing), timeout=2 * CLOSE_S)
            for ref in done:
                with contextlib.suppress(RayError):  # lost at the last moment
                    left += [f"{folder} on node {closing[ref].name}" for folder in ray.get(ref)]
        for member in members:
            if member in self.members:
                self._drop(member)
        return left

    def release_spares(self, seats: list[Member]) -> None:
        """Gives nodes back that the job has no use for."""
        if len(seats) < self._config.launch.max_nodes:
            return
        for member in [member for member in self.members if member not in seats]:
            if member.stage == "facts":
                self._drop(member)
            else:  # which takes a while, and nobody waits for it
                self.members.remove(member)
                self._closing[member.actor.close.remote(False)] = member

    def _forget_closed(self) -> None:
        if self._closing:
            closed, _ = ray.wait(list(self._closing), num_returns=len(self._closing), timeout=0)
            for ref in closed:
                member = self._closing.pop(ref)
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(member.actor)
                self._places.give_back(member.place)

    def close(self) -> None:
        self._places.close()


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


def _cannot_run_here(member: Member, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    node_id = member.place.node_id or "?"
    return ConfigError(
        "launch.runtime_env",
        "null",
        f"node {node_id[:8]} cannot run windlass: {lines[-1] if lines else error}",
        "install the same windlass, torch and Python on all nodes, or name them in launch.runtime_env",
    )
