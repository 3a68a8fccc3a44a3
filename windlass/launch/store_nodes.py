"""Sees and reaches the nodes of a `launch=torchrun` job through the job store, in the launcher that serves it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from windlass.errors import ConfigError
from windlass.launch.config import LaunchConfig
from windlass.launch.job_messages import Command, JobEnded, JobMessages, NodeReport, Phase
from windlass.launch.policy import Limits, Liveness, Order, OrderKind, Seen, WorkerEnd

HEARTBEAT_S, MISSED_HEARTBEATS = 1.0, 3
"""A node that is silent for so long is lost."""
LOOK_S = 0.05


def limits_of(launch: LaunchConfig) -> Limits:
    """Returns the limits of a job whose nodes come by themselves."""
    limit_s = launch.join_timeout_s
    return Limits(
        launch.min_nodes, launch.max_nodes, launch.wait_for_nodes_s, first_give_up_s=limit_s, give_up_s=limit_s
    )


class StoreNodes:
    """Sees and reaches the nodes, as `windlass.launch.driver.Nodes`; IDs number them in the order in which they came.

    Args:
        messages: over a connection that is the caller's alone.
    """

    def __init__(self, messages: JobMessages, launch: LaunchConfig, num_local_ranks: int) -> None:
        self._messages, self._launch, self._num_local_ranks = messages, launch, num_local_ranks
        self._reports: dict[str, NodeReport] = {}
        self._beats: dict[str, bytes | None] = {}
        self._liveness = Liveness(HEARTBEAT_S * MISSED_HEARTBEATS)
        self._gone: set[str] = set()
        self._fresh_losses: list[str] = []
        self._command: Command | None = None

    # --- What the driver sees. ---

    def look(self, timeout_s: float) -> None:
        """Raises JobEnded once a node has ended the job by itself."""
        time.sleep(min(timeout_s, LOOK_S))
        outcome = self._messages.ended()
        if outcome is not None:
            raise JobEnded(outcome, is_own=False)
        now = time.monotonic()
        for node, (report, beat) in self._messages.reports().items():
            self._liveness.note(node, now, is_heard=node not in self._reports or beat != self._beats[node])
            self._reports[node], self._beats[node] = report, beat
            if not self._liveness.is_lost(node, now):
                self._gone.discard(node)  # it was silent, and its workers are no more those of an attempt
            elif node not in self._gone:
                self._gone.add(node)
                self._fresh_losses += [] if report.is_leaving else [node]

    def seen(self, has_workers: bool) -> Seen:
        reports = {node: report for node, report in self._reports.items() if node not in self._gone}
        ready = [node for node, report in reports.items() if self._can_start(report) and not report.is_leaving]
        ready.sort(key=lambda node: (reports[node].address, reports[node].pid))
        fixed = {node: report.node_rank for node, report in self._reports.items() if report.node_rank is not None}
        return Seen(
            ready, is_stopping=any(report.is_stopping for report in self._reports.values()), fixed=fixed or None
        )

    def _can_start(self, report: NodeReport) -> bool:
        return report.is_ready or len(report.ends) == self._num_local_ranks

    def take_lost(self) -> list[str]:
        lost, self._fresh_losses = self._fresh_losses, []
        return lost

    def take_ends(self) -> list[WorkerEnd]:
        command = self._command
        if command is None:
            return []
        reports = [self._reports[node] for node in command.nodes]
        return [end for report in reports if report.attempt == command.attempt for end in report.ends]

    def name(self, node: str) -> str:
        return self._reports[node].address

    def too_few(self, num_ready: int) -> ConfigError:
        return ConfigError(
            "launch.nnodes",
            self._launch.nnodes,
            f"{self._launch.min_nodes} nodes are needed, and fewer have come in {self._launch.join_timeout_s:g} s",
            "start the same command on every node with the same launch.address and run_dir, "
            "or set a larger launch.join_timeout_s",
        )

    # --- What it has them do. ---

    def start(self, attempt: int, nodes: Sequence[str]) -> bool:
        """Raises ConfigError if two nodes have the same `launch.node_rank`."""
        ranks = [self._reports[node].node_rank for node in nodes]
        for rank in ranks:
            if rank is not None and ranks.count(rank) > 1:
                raise ConfigError("launch.node_rank", rank, "two nodes have it", "number the nodes from 0")
        self._give(Command(attempt, tuple(nodes)))
        return True

    def tell(self, order: Order) -> None:
        """Tells of no stop and no node that leaves: the launcher that was asked has told its workers, and they all."""
        if order.kind in (OrderKind.save, OrderKind.kill) and self._command is not None:
            phase = Phase.kill if order.kind == OrderKind.kill else Phase.save
            self._give(Command(self._command.attempt, self._command.nodes, phase))

    def conclude(self, leaving: Collection[str]) -> None:
        """Nodes that leave do so by themselves."""
        assert self._command is not None
        self._give(Command(self._command.attempt, self._command.nodes, Phase.over))

    def _give(self, command: Command) -> None:
        self._command = command
        self._messages.give(command)

    def show_last_words(self, end: WorkerEnd) -> None:
        """Shows nothing: what workers say is in their logs."""
