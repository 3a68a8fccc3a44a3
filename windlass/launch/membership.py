"""Who is in a job, and what becomes of it when that changes: pure decisions, from states and times.

A launcher that sees its nodes itself (`launch=ray`) asks here after every look; torch's elastic agents decide among
themselves. Nothing here waits, sends or starts anything, so every case can be tried.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED
from windlass.outcome import Outcome


class Action(StrEnum):
    wait = "wait"
    start = "start"
    fail = "fail"
    """The job has not begun, and there are too few nodes for it."""


@dataclass(frozen=True)
class Decision:
    action: Action
    num_nodes: int = 0
    """To start with."""
    left_s: float | None = None
    """How much longer to wait, at most; None: until there are enough."""


@dataclass(frozen=True)
class Policy:
    """Args:
    min_nodes: the fewest that the job goes on with.
    max_nodes: those it wants.
    wait_s: how long it waits for the ones between, and for the first ones at its beginning.
    first_s: the least that it waits at its beginning, when processes on all nodes start.
    settle_s: nodes come in groups; one that has come is used when none followed it for so long.
    """

    min_nodes: int
    max_nodes: int
    wait_s: float
    first_s: float = 10.0
    settle_s: float = 2.0

    def decide(self, num_ready: int, num_coming: int, short_s: float, has_begun: bool) -> Decision:
        """What to do while no workers run.

        Args:
            num_ready: nodes that workers can be started on.
            num_coming: nodes that are the job's, and where something still starts or is installed.
            short_s: for how long the job has had too few of them.
            has_begun: whether workers have run before: then there is something to wait for, and it never fails.
        """
        if num_ready >= self.max_nodes:
            return Decision(Action.start, self.max_nodes)
        left_s = (self.wait_s if has_begun else max(self.wait_s, self.first_s)) - short_s
        if num_ready >= self.min_nodes:
            return Decision(Action.wait, left_s=left_s) if left_s > 0 else Decision(Action.start, num_ready)
        if has_begun or num_ready + num_coming >= self.min_nodes:
            return Decision(Action.wait)
        return Decision(Action.wait, left_s=left_s) if left_s > 0 else Decision(Action.fail)

    def should_grow(self, num_running: int, num_ready: int, quiet_s: float) -> bool:
        """Whether to stop the workers at a snapshot and start more.

        Args:
            num_running: nodes with workers.
            num_ready: those and the ones that could join them.
            quiet_s: since the last of these became ready.
        """
        num_after = min(num_ready, self.max_nodes)
        return num_after > num_running and (num_after == self.max_nodes or quiet_s >= self.settle_s)


def seats(before: Sequence[str], ready: Collection[str], num_nodes: int) -> list[str]:
    """The nodes of the next life, in the order of their ranks.

    Who stays keeps its place, so that its ranks find their own snapshots in its memory; who comes takes the place of
    one that is gone, and places that stay empty are closed up.
    """
    newcomers = [node for node in ready if node not in before]
    placed: list[str] = []
    for node in before:
        if node in ready:
            placed.append(node)
        elif newcomers:
            placed.append(newcomers.pop(0))
    return (placed + newcomers)[:num_nodes]


@dataclass(frozen=True)
class WorkerEnd:
    """How a rank ended. `exit_code` is None if nobody can say: it was lost with its node."""

    rank: int
    seat: int
    exit_code: int | None
    outcome: Outcome | None = None

    @property
    def is_early(self) -> bool:
        """Whether the others of its life now wait for it in vain."""
        if self.outcome is not None:
            return not self.outcome.is_common
        return self.exit_code != EXIT_RESTART

    @property
    def how(self) -> str:
        if self.exit_code is None:
            return "was lost with its node"
        if self.exit_code < 0:
            return f"died ({signal.Signals(-self.exit_code).name})"
        return f"died (exit code {self.exit_code})"


@dataclass(frozen=True)
class Verdict:
    """What a life came to. `exit_code` is the job's; None: it goes on with another life."""

    exit_code: int | None = None
    message: str | None = None
    """For the user: what rank 0 may not have said itself."""
    counts: bool = False
    """Whether it is one of `launch.max_restarts`."""
    leaving: frozenset[int] = field(default_factory=frozenset)
    """Seats of nodes that have left."""


def judge(ends: Sequence[WorkerEnd], is_stopping: bool) -> Verdict:
    """What to make of a life in which all workers have ended.

    Args:
        ends: of all ranks, the first to end first.
        is_stopping: the job was asked to stop before that.
    """
    refusals = [end.outcome for end in ends if end.outcome is not None and end.is_early]
    if refusals:
        refusal = min(refusals, key=lambda outcome: outcome.rank)
        message = None if refusal.rank == 0 or refusal.message is None else f"rank {refusal.rank}: {refusal.message}"
        return Verdict(refusal.exit_code, message)
    # Ranks leave the job together: what one has completed, all have, even if its node was lost right after.
    if any(end.outcome is not None and end.outcome.exit_code == EXIT_DONE for end in ends):
        return Verdict(EXIT_DONE)
    stopped = {end.seat for end in ends if end.outcome is not None}
    if any(end.outcome is None and end.exit_code == EXIT_RESTART for end in ends):
        return Verdict(EXIT_STOPPED) if is_stopping else Verdict(leaving=frozenset(stopped))
    if is_stopping or all(end.outcome is not None for end in ends):
        return Verdict(EXIT_STOPPED)
    return Verdict(counts=True, leaving=frozenset(stopped))


def exhausted(ends: Sequence[WorkerEnd], max_restarts: int, run_dir: str) -> Verdict:
    """The end of a job whose workers die again and again."""
    first = next(end for end in ends if end.is_early)
    return Verdict(
        EXIT_FAILURE,
        f"rank {first.rank} {first.how} and launch.max_restarts={max_restarts} is used up; see {run_dir}/logs/",
    )
