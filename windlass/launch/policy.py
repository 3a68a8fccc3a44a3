"""Decides who is in a job, how long it waits for nodes, and what an attempt came to: observations and times in,
decisions out.

Both launchers run it by `windlass.launch.driver`: `launch=ray` in the driver's process, `launch=torchrun` in the
launcher that serves the job store. Nothing here waits, sends, starts or reads a clock, so every case can be tried.

An *attempt* is all workers of a job between a start and an end. Nodes have IDs, which are the transport's; their number
in an attempt is their node rank.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED
from windlass.outcome import LAUNCHER, Outcome

GRACE_S = 1.0
"""How long workers may take to fail by themselves when one of them has died: their logs then say where."""
REFUSAL_S = 5.0
"""How long workers may take to refuse, too, when one of them has: the lowest rank's words are shown."""
LAST_S = 30.0
"""How long workers may take to end when one of them has trained to the end, or has stopped, as all do then."""
SAVE_S = 600.0
"""How long workers that are to start again may take to save."""
SETTLE_S = 2.0
"""Nodes come in groups: one that has come is used when none has followed it for so long."""
DOUBT_S = 60.0
"""How long a node is avoided after it was lost: by then the cluster knows whether it lives."""
MAX_FAILED_STARTS = 5
"""Starts that fail on a node, in a row, before it is refused."""


# --- Who lives, and who is avoided. ---


class Liveness:
    """Tells which nodes are lost: those that have been silent for longer than `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._silent_since: dict[str, float] = {}

    def note(self, node: str, now: float, is_heard: bool) -> None:
        if is_heard:
            self._silent_since.pop(node, None)
        else:
            self._silent_since.setdefault(node, now)

    def is_lost(self, node: str, now: float) -> bool:
        return now - self._silent_since.get(node, now) > self._limit_s


class NodeHistory:
    """Remembers the nodes on which a replacement must not be sought."""

    def __init__(self) -> None:
        self._lost_at: dict[str, float] = {}
        self._num_failed_starts: dict[str, int] = {}
        self._refused: set[str] = set()

    def note_lost(self, node: str, now: float) -> None:
        self._lost_at[node] = now

    def note_failed_start(self, node: str) -> bool:
        """Returns whether the node is to be refused."""
        self._num_failed_starts[node] = self._num_failed_starts.get(node, 0) + 1
        return self._num_failed_starts[node] > MAX_FAILED_STARTS

    def note_started(self, node: str) -> None:
        self._num_failed_starts.pop(node, None)
        self._lost_at.pop(node, None)

    def refuse(self, node: str) -> None:
        self._refused.add(node)

    def to_avoid(self, now: float) -> set[str]:
        return self._refused | {node for node, lost_at in self._lost_at.items() if now < lost_at + DOUBT_S}


def may_leave(is_elastic: bool, serves_store: bool) -> bool:
    """Says what SIGTERM to one node means: the node leaves and the job goes on, or the job stops."""
    return is_elastic and not serves_store


# --- Workers that have ended. ---


@dataclass(frozen=True)
class WorkerEnd:
    """Says how a rank ended. `exit_code` is None if nobody can say: the rank was lost with its node."""

    rank: int
    node_rank: int
    exit_code: int | None
    outcome: Outcome | None = None

    @property
    def is_early(self) -> bool:
        """Says if the others of its attempt now wait for it in vain."""
        if self.outcome is not None:
            return not self.outcome.is_common
        return self.exit_code != EXIT_RESTART

    @property
    def is_killed(self) -> bool:
        return self.exit_code is None or self.exit_code < 0

    @property
    def how(self) -> str:
        if self.exit_code is None:
            return "was lost with its node"
        if self.exit_code < 0:
            return f"died ({signal.Signals(-self.exit_code).name})"
        return f"died (exit code {self.exit_code})"


def patience_s(end: WorkerEnd) -> float:
    """Returns how long the other workers of an attempt may take to end after this one."""
    if end.outcome is None:
        return SAVE_S if end.exit_code == EXIT_RESTART else GRACE_S
    if end.outcome.is_common:
        return LAST_S
    return REFUSAL_S if end.outcome.has_begun else GRACE_S


@dataclass(frozen=True)
class Verdict:
    """Says what an attempt came to. `outcome` is the job's; None: the job goes on with another attempt."""

    outcome: Outcome | None = None
    counts: bool = False
    """It is one of `launch.max_restarts`."""
    leaving: frozenset[int] = frozenset()
    """Ranks of the nodes that have left."""


def judge(ends: Sequence[WorkerEnd], is_stopping: bool) -> Verdict:
    """Judges an attempt in which all workers have ended.

    Args:
        ends: of all ranks, the first to end first.
        is_stopping: the job was asked to stop before that.
    """
    refusals = [end.outcome for end in ends if end.outcome is not None and end.is_early]
    if refusals:
        return Verdict(min(refusals, key=lambda outcome: outcome.rank))
    # Ranks leave the job together: what one has completed, all have, even if its node was lost right after.
    if any(end.outcome is not None and end.outcome.exit_code == EXIT_DONE for end in ends):
        return Verdict(Outcome(EXIT_DONE))
    stopped = frozenset(end.node_rank for end in ends if end.outcome is not None)
    if any(end.outcome is None and end.exit_code == EXIT_RESTART for end in ends):
        return Verdict(Outcome(EXIT_STOPPED)) if is_stopping else Verdict(leaving=stopped)
    if is_stopping or all(end.outcome is not None for end in ends):
        return Verdict(Outcome(EXIT_STOPPED))
    return Verdict(counts=True, leaving=stopped)


# --- Which nodes an attempt has. ---


class Action(StrEnum):
    wait = "wait"
    start = "start"
    give_up = "give_up"
    """Too few nodes have come."""


@dataclass(frozen=True)
class Decision:
    action: Action
    nodes: tuple[str, ...] = ()
    """To start workers on, in the order of node ranks."""
    left_s: float | None = None
    """How much longer to wait, at most; None: until there are enough."""


@dataclass(frozen=True)
class Limits:
    """Says how many nodes a job has, and how long it waits for them.

    Args:
        min_nodes: the fewest that the job goes on with.
        max_nodes: those it wants.
        wait_s: how long it waits for the nodes between the two: after the loss of one, and at its beginning from when
            the fewest are there.
        first_s: the least that it waits for them at its beginning.
        first_give_up_s: how long it waits for the fewest nodes at its beginning.
        give_up_s: the same after the loss of a node.
    """

    min_nodes: int
    max_nodes: int
    wait_s: float
    first_s: float = 0.0
    first_give_up_s: float = inf
    give_up_s: float = inf

    def wants_another(self, num_expected: int) -> bool:
        """Says whether to ask for a node beside those that the job has, or is about to have."""
        return num_expected < self.max_nodes


def assign_node_ranks(
    before: Sequence[str], ready: Sequence[str], num_nodes: int, fixed: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Chooses the nodes of an attempt, in the order of their ranks.

    A node that stays keeps its rank, so that its ranks find their own snapshots in its memory; a node that comes takes
    the rank of one that is gone, and ranks that stay empty are closed up.

    Args:
        before: the nodes of the last attempt, by rank.
        ready: those that workers can be started on, in the order in which newcomers are taken.
        fixed: the ranks that nodes were given by the user.
    """
    newcomers = [node for node in ready if node not in before]
    placed: list[str] = []
    for node in before:
        if node in ready:
            placed.append(node)
        elif newcomers:
            placed.append(newcomers.pop(0))
    chosen = (placed + newcomers)[:num_nodes]
    return tuple(sorted(chosen, key=fixed.__getitem__) if fixed else chosen)


# --- One job. ---


class OrderKind(StrEnum):
    stop = "stop"
    """The workers save, and the job ends."""
    leave = "leave"
    """The workers save; those of these nodes end as stopped, the others to start again."""
    save = "save"
    """The workers save and end, to start again."""
    kill = "kill"
    """The workers end at once."""


@dataclass(frozen=True)
class Order:
    kind: OrderKind
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """Holds what is observed of a job's nodes.

    Args:
        ready: on which workers can be started, or which could join; none that is leaving.
        num_coming: nodes that are the job's, and where something still starts or is installed.
        leaving: nodes that were told to go by whoever owns them.
        is_stopping: the job was asked to stop.
        is_interrupted: it was asked to end without waiting for anything.
        fixed: the ranks that nodes were given by the user.
    """

    ready: Sequence[str]
    num_coming: int = 0
    leaving: Collection[str] = ()
    is_stopping: bool = False
    is_interrupted: bool = False
    fixed: Mapping[str, int] | None = None


class Policy:
    """Decides for one job, from its beginning to its end.

    Args:
        now: the time of all calls is of one clock, in seconds.
    """

    def __init__(self, limits: Limits, num_local_ranks: int, max_restarts: int, now: float) -> None:
        self.limits, self.max_restarts, self._num_local_ranks = limits, max_restarts, num_local_ranks
        self.attempt = -1
        """The number of the newest; -1 before the first."""
        self.nodes: tuple[str, ...] = ()
        """Those of that attempt, in the order of their ranks."""
        self.ends: list[WorkerEnd] = []
        """Those of its ranks, the first to be heard of first."""
        self.num_counted = 0
        """Attempts that were some of `launch.max_restarts`."""
        self._short_since = self._gathers_since = now
        self._enough_since: float | None = None
        self._ready_since: dict[str, float] = {}
        self._given: set[OrderKind] = set()
        self._kill_at = inf
        self._first_end: WorkerEnd | None = None

    # --- Between attempts. ---

    def decide(self, now: float, seen: Seen) -> Decision:
        """Says whether to start workers, and on which nodes; to wait; or to give up."""
        limits, num_ready = self.limits, len(seen.ready)
        has_begun = self.attempt >= 0
        if num_ready >= limits.max_nodes:
            return self._start(seen, limits.max_nodes)
        if num_ready >= limits.min_nodes:
            self._enough_since = now if self._enough_since is None else self._enough_since
            until = self._short_since + limits.wait_s
            if not has_begun:
                until = max(self._short_since + limits.first_s, self._enough_since + limits.wait_s)
            return Decision(Action.wait, left_s=until - now) if until > now else self._start(seen, num_ready)
        self._enough_since = None
        patience_s = limits.give_up_s if has_begun else limits.first_give_up_s
        left_s = max(self._short_since, self._gathers_since) + patience_s - now
        if num_ready + seen.num_coming >= limits.min_nodes or left_s == inf:
            return Decision(Action.wait)
        return Decision(Action.wait, left_s=left_s) if left_s > 0 else Decision(Action.give_up)

    def _start(self, seen: Seen, num_nodes: int) -> Decision:
        return Decision(Action.start, assign_node_ranks(self.nodes, seen.ready, num_nodes, seen.fixed))

    def begin(self, nodes: Sequence[str]) -> int:
        """Begins an attempt on these nodes, by rank; returns its number."""
        self.attempt += 1
        self.nodes, self.ends = tuple(nodes), []
        self._given, self._kill_at, self._first_end, self._enough_since = set(), inf, None, None
        return self.attempt

    # --- During an attempt. ---

    def note(self, now: float, ends: Iterable[WorkerEnd], lost: Collection[str] = ()) -> None:
        """Takes notice of workers that have ended, and of nodes that were lost with theirs."""
        known = {end.rank for end in self.ends}
        fresh = {end.rank: end for end in ends if end.rank not in known}
        for node_rank, node in enumerate(self.nodes):
            if node in lost:
                first = node_rank * self._num_local_ranks
                for rank in set(range(first, first + self._num_local_ranks)) - known - fresh.keys():
                    fresh[rank] = WorkerEnd(rank, node_rank, None)
        if self.is_short_of(lost):
            self._short_since = now
        for _, end in sorted(fresh.items()):
            self.ends.append(end)
            self._kill_at = min(self._kill_at, now + patience_s(end))

    def is_short_of(self, lost: Collection[str]) -> bool:
        """Says if the loss of these nodes leaves the job with fewer: not that of a spare while workers run."""
        return any(node in self.nodes for node in lost) or (bool(lost) and self.is_over)

    @property
    def is_over(self) -> bool:
        """All workers of the attempt have ended, or it has none yet."""
        return len(self.ends) == len(self.nodes) * self._num_local_ranks

    def orders(self, now: float, seen: Seen) -> list[Order]:
        """Says what is to be asked of the workers now. Each order is given once in an attempt."""
        found: list[Order] = []
        if seen.is_interrupted or now >= self._kill_at:
            found += self._order(OrderKind.kill)
        if seen.is_stopping:
            found += self._order(OrderKind.stop)
        newcomers = self._newcomers(now, seen.ready)
        if self._given or any(end.is_early for end in self.ends):
            return found
        leaving = tuple(node for node in self.nodes if node in seen.leaving)
        if leaving:
            return self._order(OrderKind.leave, leaving)
        if self._should_grow(now, newcomers):
            self._kill_at = min(self._kill_at, now + SAVE_S)
            return self._order(OrderKind.save)
        return []

    def _order(self, kind: OrderKind, nodes: tuple[str, ...] | None = None) -> list[Order]:
        if kind in self._given:
            return []
        if kind == OrderKind.kill:
            self._first_end = self._first_end or _first_early(self.ends)
        self._given.add(kind)
        return [Order(kind, self.nodes if nodes is None else nodes)]

    def _newcomers(self, now: float, ready: Sequence[str]) -> dict[str, float]:
        """Returns the nodes that could join, and since when."""
        newcomers = [node for node in ready if node not in self.nodes]
        self._ready_since = {node: self._ready_since.get(node, now) for node in newcomers}
        return self._ready_since

    def _should_grow(self, now: float, newcomers: Mapping[str, float]) -> bool:
        num_running, max_nodes = len(self.nodes), self.limits.max_nodes
        num_after = min(num_running + len(newcomers), max_nodes)
        if num_after <= num_running:
            return False
        return num_after == max_nodes or now - max(newcomers.values()) >= SETTLE_S

    # --- After an attempt. ---

    def conclude(self, now: float, seen: Seen, run_dir: str) -> Verdict:
        """Judges the attempt, all of whose workers have ended, by those before it, too."""
        if seen.is_interrupted and any(end.outcome is None for end in self.ends):
            return Verdict(Outcome(EXIT_FAILURE, "interrupted", LAUNCHER))
        verdict = judge(self.ends, seen.is_stopping)
        self._gathers_since = now
        if verdict.leaving:
            self._short_since = now
        if not verdict.counts:
            return verdict
        if self.num_counted < self.max_restarts:
            self.num_counted += 1
            return verdict
        first = self.first_end
        assert first is not None, "an attempt that counts has a worker that died"
        message = f"rank {first.rank} {first.how} and launch.max_restarts={self.max_restarts} is used up"
        return Verdict(Outcome(EXIT_FAILURE, f"{message}; see {run_dir}/logs/", LAUNCHER), counts=True)

    @property
    def first_end(self) -> WorkerEnd | None:
        """The worker whose early end ended the attempt: one that was killed, but not by an order, says more."""
        return self._first_end or _first_early(self.ends)


def _first_early(ends: Sequence[WorkerEnd]) -> WorkerEnd | None:
    early = [end for end in ends if end.is_early]
    return next((end for end in early if end.is_killed), early[0] if early else None)
