"""Runs a job by its policy: looks at the nodes, and has them do what `windlass.launch.policy` decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from windlass.errors import EXIT_STOPPED, ConfigError
from windlass.launch.policy import Action, Order, OrderKind, Policy, Seen, WorkerEnd
from windlass.outcome import LAUNCHER, Outcome

TICK_S = 0.2
"""How long one look at the nodes may wait for something to see."""
PROGRESS_S = 10.0
"""How often a user is told what is waited for."""


class Nodes(Protocol):
    """Observes a job's nodes, and starts and ends the workers on them. Nodes have IDs, which messages never show."""

    def look(self, timeout_s: float) -> None:
        """Hears what there is to hear, and waits for it at most so long."""

    def seen(self, has_workers: bool) -> Seen:
        """Returns what is known; `has_workers`: an attempt runs, which a node could join."""
        ...

    def take_lost(self) -> list[str]:
        """Returns the nodes that were lost since the last call."""
        ...

    def take_ends(self) -> list[WorkerEnd]:
        """Returns the workers of the newest attempt that have ended: at least those that no call has returned."""
        ...

    def start(self, attempt: int, nodes: Sequence[str]) -> bool:
        """Starts the workers of an attempt. Returns False if their nodes must be chosen anew."""
        ...

    def tell(self, order: Order) -> None:
        """Has workers do as they are ordered; nodes that are lost are passed over."""

    def conclude(self, leaving: Collection[str]) -> None:
        """Tells of an attempt that is over, of a job that goes on without these nodes, whose workers have left it."""

    def show_last_words(self, end: WorkerEnd) -> None:
        """Shows what a rank has said last."""

    def name(self, node: str) -> str:
        """Returns what messages call a node, also one that is lost."""
        ...

    def too_few(self, num_ready: int) -> ConfigError:
        """Returns the error of a job that waits no longer for its nodes."""
        ...


class Driver:
    """Args:
    say: tells the user what becomes of the nodes.
    """

    def __init__(self, nodes: Nodes, policy: Policy, run_dir: str, say: Callable[[str], None]) -> None:
        self._nodes, self._policy, self._run_dir, self._say = nodes, policy, run_dir, say

    def run(self) -> Outcome:
        """Runs the job to its end.

        Raises:
            ConfigError: too few nodes came.
        """
        while self._gather():
            outcome = self._attempt()
            if outcome is not None:
                return outcome
        return Outcome(EXIT_STOPPED, None, LAUNCHER)

    def _gather(self) -> bool:
        """Waits until there are nodes, and starts workers on them. Returns False if the user does not want them."""
        policy, nodes = self._policy, self._nodes
        # A loss has just been said, and what is waited for.
        said, said_at = (len(nodes.seen(has_workers=False).ready), time.monotonic()) if policy.nodes else (-1, 0.0)
        while True:
            nodes.look(TICK_S)
            self._note()
            seen = nodes.seen(has_workers=False)
            if seen.is_stopping:
                return False
            decision = policy.decide(time.monotonic(), seen)
            if decision.action == Action.give_up:
                raise nodes.too_few(len(seen.ready))
            if decision.action == Action.start:
                self._say_who_starts(policy.nodes, decision.nodes)
                if nodes.start(policy.begin(decision.nodes), decision.nodes):
                    return True
                said = -1
            num_ready = len(seen.ready)
            if num_ready != said or time.monotonic() > said_at + PROGRESS_S:
                said, said_at = num_ready, time.monotonic()
                self._say(f"waiting for {policy.limits.max_nodes - said} of {policy.limits.max_nodes} nodes")

    def _say_who_starts(self, before: Sequence[str], chosen: Sequence[str]) -> None:
        newcomers = ", ".join(self._nodes.name(node) for node in chosen if node not in before)
        if not before:
            self._say(f"nodes   {len(chosen)}: {newcomers}")
        elif len(chosen) != len(before):
            self._say(f"going on with {len(chosen)} nodes")
        elif newcomers:
            self._say(f"going on with node {newcomers} in its place")

    def _attempt(self) -> Outcome | None:
        """Watches workers until all have ended, or were ended. Returns the job's outcome if it has one."""
        policy, nodes = self._policy, self._nodes
        while not policy.is_over:
            nodes.look(TICK_S)
            self._note()
            for order in policy.orders(time.monotonic(), nodes.seen(has_workers=True)):
                self._say_order(order)
                nodes.tell(order)
        verdict = policy.conclude(time.monotonic(), nodes.seen(has_workers=False), self._run_dir)
        if verdict.outcome is None:
            nodes.conclude([policy.nodes[node_rank] for node_rank in sorted(verdict.leaving)])
        elif verdict.counts and policy.first_end is not None:
            nodes.show_last_words(policy.first_end)
        return verdict.outcome

    def _note(self) -> None:
        policy, nodes = self._policy, self._nodes
        ends, lost, now = nodes.take_ends(), nodes.take_lost(), time.monotonic()
        is_short = {node: policy.is_short_of([node]) for node in lost}
        policy.note(now, ends, lost)
        for node in (node for node in lost if is_short[node]):
            decision = policy.decide(now, nodes.seen(has_workers=False))
            then = ""
            if decision.action == Action.wait:
                then = "; waiting" + ("" if decision.left_s is None else f" up to {decision.left_s:.0f} s")
                then += " for another"
            self._say(f"node {nodes.name(node)} is lost{then}")

    def _say_order(self, order: Order) -> None:
        names = [self._nodes.name(node) for node in order.nodes]
        if order.kind == OrderKind.leave:
            for name in names:
                self._say(f"node {name} is about to go")
        elif order.kind == OrderKind.save:
            newcomers = [node for node in self._nodes.seen(has_workers=True).ready if node not in order.nodes]
            joining = ", ".join(f"node {self._nodes.name(node)}" for node in newcomers)
            self._say(f"{joining} can join: the workers start again")
