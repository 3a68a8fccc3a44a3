"""`launch=ray`: this process is the driver of a Ray cluster, and an actor a node keeps that node's workers.

The driver is the only one that decides. It starts lives: all workers, until they have ended or one of them has ended
too early. What a life comes to, and who is in the next one, is for `windlass.launch.membership` to say.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayActorError

from windlass.conf.schema import Config
from windlass.errors import EXIT_FAILURE, EXIT_STOPPED
from windlass.launch.interfaces import LOOPBACK, interface_of
from windlass.launch.membership import Action, Decision, Policy, Verdict, WorkerEnd, exhausted, judge, seats
from windlass.launch.node_workers import Life
from windlass.launch.ray_cluster import RayCluster, connected, too_small
from windlass.launch.ray_crew import Crew, Member
from windlass.text import printable
from windlass.train.signals import SECOND_PRESS_S, STOP_SIGNALS, handle, stop_heard

TICK_S = 0.2
GRACE_S = 1.0
"""What workers have to fail by themselves when one of them has died: their logs then say where."""
PROGRESS_S = 10.0
"""How often a user is told what is waited for."""


class Interrupts:
    """What the user has asked this process for."""

    def __init__(self) -> None:
        self.stop = False
        self.at_once = False
        """A second Ctrl-C, two seconds later or more."""
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
        return _Driver(config, cluster, interrupts).run()


class _Driver:
    def __init__(self, config: Config, cluster: RayCluster, interrupts: Interrupts) -> None:
        launch = config.launch
        self._config, self._cluster, self._interrupts = config, cluster, interrupts
        self._is_alone = launch.address == "local"
        self._bundle = cluster.bundle(config)
        self._num_local_ranks = launch.nproc_per_node or int(self._bundle.get("GPU", 1))
        for num_nodes in {launch.min_nodes, launch.max_nodes}:
            config.parallel.mesh_axes(num_nodes * self._num_local_ranks, self._num_local_ranks)
        self._policy = Policy(launch.min_nodes, launch.max_nodes, launch.wait_for_nodes_s)
        self._crew = Crew(config, cluster, self._bundle, os.getcwd(), self._variables(), _warn)  # noqa: PTH109
        self._life = -1
        self._seats: list[Member] = []
        self._ends: list[WorkerEnd] = []  # of this life's ranks, the first to be heard of first
        self._short_since = time.monotonic()
        self._num_counted = 0

    def _variables(self) -> dict[str, str]:
        """Ray gives an actor one thread, or as many as it has reserved for all of its ranks together. Ranks of a job
        that is alone on this machine are for no other to reach."""
        variables = {"OMP_NUM_THREADS": str(max(1, int(self._config.launch.cpus_per_rank)))}
        interface = interface_of(LOOPBACK) if self._is_alone else None
        if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            variables["GLOO_SOCKET_IFNAME"] = interface
        return variables

    def run(self) -> int:
        try:
            while True:
                if not self._gather():
                    return EXIT_STOPPED
                verdict = self._settle(self._live())
                if verdict.exit_code is not None:
                    if verdict.message is not None:
                        _error(verdict.message)
                    return verdict.exit_code
        finally:
            for folder in self._crew.let_go(list(self._crew.members), ends_agents=True):
                _warn(f"the snapshot agent in {folder} is still at work")
            self._crew.close()

    # --- Between lives. ---

    def _gather(self) -> bool:
        """Waits until there are nodes to start workers on, and seats them. False: the user does not want them."""
        crew = self._crew
        # A loss has just been said, and what is waited for.
        said, said_at = (len(crew.ready()), time.monotonic()) if self._life >= 0 else (-1, 0.0)
        while not self._interrupts.stop:
            crew.tick(TICK_S)
            self._note_losses(has_workers=False)
            ready = crew.ready()
            decision = self._decide()
            if decision.action == Action.start:
                self._seat(ready, decision.num_nodes)
                return True
            if decision.action == Action.fail:
                raise too_small(self._cluster, self._bundle, self._config, len(ready))
            if len(ready) != said or time.monotonic() > said_at + PROGRESS_S:
                said, said_at = len(ready), time.monotonic()
                _say(f"waiting for {self._policy.max_nodes - said} of {self._policy.max_nodes} nodes")
        return False

    def _decide(self) -> Decision:
        ready, short_s = self._crew.ready(), time.monotonic() - self._short_since
        return self._policy.decide(len(ready), self._crew.num_coming(), short_s, has_begun=self._life >= 0)

    def _seat(self, ready: list[Member], num_nodes: int) -> None:
        by_id = {member.node_id: member for member in ready}
        before = [member.node_id for member in self._seats]
        self._seats = [by_id[node_id] for node_id in seats(before, list(by_id), num_nodes)]
        newcomers = [member.name for member in self._seats if member.node_id not in before]
        if not before:
            _say(f"nodes   {num_nodes}: {', '.join(newcomers)}")
        elif num_nodes != len(before):
            _say(f"going on with {num_nodes} nodes")
        elif newcomers:
            _say(f"going on with node {', '.join(newcomers)} in its place")

    def _note_losses(self, has_workers: bool) -> None:
        for member in self._crew.lost:
            if has_workers and member not in self._seats:
                continue  # a spare
            self._short_since = time.monotonic()
            decision = self._decide()
            then = ""
            if decision.action == Action.wait:
                then = "; waiting" + ("" if decision.left_s is None else f" up to {decision.left_s:.0f} s")
                then += " for another"
            _say(f"node {member.name} is lost{then}")
        self._crew.lost.clear()

    def _settle(self, verdict: Verdict) -> Verdict:
        """Sees to it that the next life can be started."""
        leaving = [self._seats[seat] for seat in verdict.leaving if self._seats[seat] in self._crew.members]
        if leaving:
            _say(f"{', '.join(f'node {member.name}' for member in leaving)} has left")
            for folder in self._crew.let_go(leaving, ends_agents=True):
                _warn(f"the snapshot agent in {folder} is still at work")
            self._short_since = time.monotonic()
        if verdict.counts:
            self._num_counted += 1
        return verdict

    # --- One life. ---

    def _live(self) -> Verdict:
        """Starts workers and watches them until all have ended, or were ended."""
        self._life += 1
        self._ends = []
        if not self._start_workers():
            self._note_losses(has_workers=True)
            return Verdict()
        self._watch_life()
        if self._interrupts.at_once and any(end.outcome is None for end in self._ends):
            return Verdict(EXIT_FAILURE, "interrupted")
        verdict = judge(self._ends, self._interrupts.stop)
        if verdict.counts and self._num_counted >= self._config.launch.max_restarts:
            self._show_last_words()
            return exhausted(self._ends, self._config.launch.max_restarts, self._config.run_dir)
        return verdict

    def _start_workers(self) -> bool:
        """False: the node where they were to meet is lost."""
        first, secret = self._seats[0], secrets.token_bytes(32)
        host = LOOPBACK if self._is_alone else first.address
        try:
            port = ray.get(first.actor.serve_store.remote(host, secret))
        except RayActorError:
            self._crew.mark_lost(first)
            return False
        num_nodes, num_local = len(self._seats), self._num_local_ranks
        lives = [Life(self._life, seat, num_nodes, num_local, host, port, secret) for seat in range(num_nodes)]
        starts = [member.actor.start.remote(life) for member, life in zip(self._seats, lives, strict=True)]
        for member, start in zip(self._seats, starts, strict=True):
            try:
                ray.get(start)
            except RayActorError:
                self._crew.mark_lost(member)
        self._crew.release_spares(self._seats)
        return True

    def _watch_life(self) -> None:
        asked: set[str] = set()
        while True:
            self._crew.tick(TICK_S)
            self._print_lines()
            self._note_losses(has_workers=True)
            self._note_ends()
            if len(self._ends) == len(self._seats) * self._num_local_ranks:
                return
            if any(end.is_early for end in self._ends) and _is_new("end", asked):
                self._tell("end", GRACE_S)
            self._pass_requests_on(asked)

    def _pass_requests_on(self, asked: set[str]) -> None:
        """Tells workers what the user, Ray and nodes that have come ask of them; once, as no signal is lost."""
        interrupts, crew = self._interrupts, self._crew
        if interrupts.at_once and _is_new("at once", asked):
            self._tell("end", 0.0)
        if interrupts.stop and _is_new("stop", asked):
            self._tell("stop")
        if asked:
            return
        for member in crew.draining():
            if member in self._seats and _is_new(member.node_id, asked):
                _say(f"node {member.name} is about to go")
                member.actor.signal.remote(signal.SIGUSR1)
        newcomers = [member for member in crew.ready() if member not in self._seats and member.is_warm]
        quiet_s = time.monotonic() - max((member.ready_at for member in newcomers), default=0.0)
        num_ready = len(self._seats) + len(newcomers)
        if not asked and self._policy.should_grow(len(self._seats), num_ready, quiet_s):
            asked.add("grow")
            _say(f"{', '.join(f'node {member.name}' for member in newcomers)} can join: the workers start again")
            self._tell("signal", signal.SIGTERM)

    def _tell(self, method: str, *arguments: object) -> None:
        for member in self._seats:
            if member in self._crew.members:
                getattr(member.actor, method).remote(*arguments)

    def _note_ends(self) -> None:
        """Adds to `_ends` what has ended since: those that were killed before those that failed in their turn."""
        fresh: list[WorkerEnd] = []
        known = {end.rank for end in self._ends}
        for seat, member in enumerate(self._seats):
            report = member.report
            ended = report.ended if report is not None and report.life == self._life else ()
            fresh += [WorkerEnd(end.rank, seat, end.exit_code, end.outcome) for end in ended if end.rank not in known]
            if member not in self._crew.members:
                first = seat * self._num_local_ranks
                gone = set(range(first, first + self._num_local_ranks)) - known - {end.rank for end in ended}
                fresh += [WorkerEnd(rank, seat, None) for rank in sorted(gone)]
        self._ends += sorted(fresh, key=lambda end: end.exit_code is not None and end.exit_code >= 0)

    # --- What the user sees. ---

    def _print_lines(self) -> None:
        for line in self._crew.take_lines():
            stream = sys.stderr if line.is_error else sys.stdout
            stream.write(f"{line.text}\n")
            stream.flush()

    def _show_last_words(self) -> None:
        first = next(end for end in self._ends if end.is_early)
        report = self._seats[first.seat].report
        for ended in () if report is None else report.ended:
            if ended.rank == first.rank and ended.last_words:
                sys.stderr.write("\n".join(ended.last_words) + "\n")


def _is_new(request: str, asked: set[str]) -> bool:
    if request in asked:
        return False
    asked.add(request)
    return True


def _say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def _warn(text: str) -> None:
    sys.stderr.write(f"windlass: warning: {printable(text)}\n")
    sys.stderr.flush()


def _error(text: str) -> None:
    sys.stderr.write(f"windlass: error: {printable(text)}\n")
    sys.stderr.flush()
