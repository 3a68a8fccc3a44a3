"""Starts and ends the workers of a node for `launch=torchrun`, in the loop of torch's elastic agent.

It decides nothing: it reports how its workers end, and does what the launcher that serves the job store, which runs the
job by its policy, has all nodes do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from windlass.checkpoint.net.handshake import TransportError
from windlass.errors import EXIT_STOPPED
from windlass.launch.attempt import Attempt
from windlass.launch.config import LaunchConfig
from windlass.launch.fork_server import fork_context, send_signal
from windlass.launch.forked_worker import forked_worker
from windlass.launch.job_messages import JobEnded, JobMessages, NodeReport, Phase
from windlass.launch.policy import LAST_S, REFUSAL_S, WorkerEnd
from windlass.launch.stop_requests import Requests
from windlass.launch.store_endpoint import SAY_AFTER_S, StoreEndpoint
from windlass.launch.store_nodes import HEARTBEAT_S
from windlass.launch.torch_store import JobStore
from windlass.outcome import LAUNCHER, OUTCOME_FILE, Outcome

MONITOR_S = 0.05
POLL_S = 0.02
UNLIMITED = 1 << 30


class JobRendezvous(RendezvousHandler):
    """Takes this node's part in the job: reports of it, and waits for the attempts that it is to have a part in.

    Args:
        messages: over a connection of the main thread.
        node: this node's ID.
        num_local_ranks: how many workers a node has.
    """

    def __init__(
        self,
        messages: JobMessages,
        node: str,
        endpoint: StoreEndpoint,
        launch: LaunchConfig,
        num_local_ranks: int,
        requests: Requests,
    ) -> None:
        self.messages, self.node, self.launch, self.requests = messages, node, launch, requests
        self._endpoint, self._num_local_ranks = endpoint, num_local_ranks
        self._report = NodeReport(endpoint.local_address, os.getpid(), launch.node_rank)
        self.attempt: Attempt | None = None
        self._beats = threading.Event()
        # A connection of its own: a sign of life must not wait behind another question.
        beating = JobMessages(endpoint.connect(), messages.job)
        self._store = JobStore(endpoint.connect(), timedelta(seconds=1))  # torch wants to be given one
        threading.Thread(target=self._beat, args=(beating,), name="heartbeat", daemon=True).start()

    def _beat(self, messages: JobMessages) -> None:
        try:
            while not self._beats.wait(HEARTBEAT_S):
                messages.beat(self.node)
        except TransportError:
            return  # the main thread sees that, too

    def report(self, **changes: Any) -> None:
        """Reports what has changed, if anything has."""
        requests = self.requests
        own = {"is_leaving": requests.is_leaving, "is_stopping": requests.is_stopping}
        report = replace(self._report, **own, **changes)
        if report != self._report:
            self.messages.report(self.node, report)
            self._report = report

    def raise_if_ended(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            has_said_it = outcome.rank == 0 and self.attempt is not None and self.attempt.node_rank == 0
            raise JobEnded(outcome, is_own=has_said_it)

    def phase(self) -> tuple[Outcome | None, Phase]:
        """Returns the job's outcome, and what this node's newest attempt has come to."""
        outcome, command = self.messages.told()
        attempt = self.attempt
        if command is None or attempt is None:
            return outcome, Phase.run
        has_part = command.attempt == attempt.number and self.node in command.nodes
        return outcome, command.phase if has_part else Phase.over

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns once there is an attempt that this node has a part in.

        Raises:
            JobEnded: there will be none.
        """
        number = -1 if self.attempt is None else self.attempt.number
        with self.requests.may_interrupt(), self._saying_that_it_waits():
            self.report(is_ready=True)
            while True:
                outcome, command = self.messages.told()
                self.raise_if_ended(outcome)
                if command is not None and command.attempt > number and self.node in command.nodes:
                    break
                time.sleep(POLL_S)
        endpoint, num_nodes = self._endpoint, len(command.nodes)
        node_rank = command.nodes.index(self.node)
        self.attempt = Attempt(
            command.attempt,
            node_rank,
            num_nodes,
            self._num_local_ranks,
            endpoint.host,
            endpoint.port,
            endpoint.secret,
            self.messages.job,
        )
        self.report(attempt=command.attempt, ends=(), is_ready=False)
        if self.launch.max_nodes > 1:
            met = f"{num_nodes} nodes have met; this is number {node_rank} of them"
            sys.stderr.write(f"windlass: {met if num_nodes > 1 else 'this node goes on without others'}\n")
        return RendezvousInfo(self._store, node_rank, num_nodes, RendezvousStoreInfo(endpoint.host, endpoint.port))

    @contextmanager
    def _saying_that_it_waits(self) -> Iterator[None]:
        text = f"windlass: waiting for the job's nodes to meet (launch.nnodes={self.launch.nnodes})\n"
        timer = threading.Timer(SAY_AFTER_S, sys.stderr.write, (text,))
        timer.daemon = True
        if self.launch.max_nodes > 1:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # --- What torch's agent asks beside that. ---

    def get_backend(self) -> str:
        return "windlass"

    @property
    def use_agent_store(self) -> bool:
        return True  # each attempt has its own part of it: see `windlass.parallel.mesh`

    def num_nodes_waiting(self) -> int:
        return 0  # `NodeAgent` asks for the phase

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Does nothing: an outcome on the store ends the job."""

    def get_run_id(self) -> str:
        return self.messages.job

    def shutdown(self) -> bool:
        """Reports for the last time, that a node that leaves is not taken for lost, and gives no more signs of life."""
        self.report(is_ready=False)
        self._beats.set()
        return True


class NodeAgent(SimpleElasticAgent):
    """Starts an attempt's workers on this node, and raises `JobEnded` when there is to be no other.

    Args:
        config_file: the run's resolved configuration, in a folder for outcomes.
        environment: what workers are to have in theirs beside what torchrun sets.
    """

    def __init__(
        self, rendezvous: JobRendezvous, num_local_ranks: int, config_file: str, environment: Mapping[str, str]
    ) -> None:
        spec = WorkerSpec(
            role="windlass",
            local_world_size=num_local_ranks,
            rdzv_handler=rendezvous,
            entrypoint=forked_worker,
            max_restarts=UNLIMITED,  # the policy counts them
            monitor_interval=MONITOR_S,
        )
        super().__init__(spec)
        self._job = rendezvous
        self._config_file, self._environment = config_file, environment
        self._processes: list[ForkServerProcess] = []
        self._others_ended_at: float | None = None
        self._last_s = LAST_S

    # --- What torch's agent calls. ---

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        context, self._processes = fork_context(), []
        attempt = self._job.attempt
        assert attempt is not None
        for local_rank in range(attempt.num_local_ranks):
            own = {OUTCOME_FILE: str(self._outcome_file(local_rank))}
            environment = {**self._environment, **attempt.variables(local_rank), **own}
            process = context.Process(target=forked_worker, args=(self._config_file, environment))
            process.start()
            self._processes.append(process)
        return {rank: process.pid for rank, process in enumerate(self._processes)}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Has torch's agent end the workers, and wait for the next attempt, once this one is to end."""
        is_running = self._look() == Phase.run
        return RunResult(WorkerState.HEALTHY if is_running else WorkerState.FAILED)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Ends what is left of an attempt."""
        sent: signal.Signals | None = None
        while True:
            phase = self._look()
            if phase == Phase.over and not self._is_running:
                return
            number = signal.SIGTERM if phase == Phase.save else signal.SIGKILL
            if number != sent:
                self._send(number)
                sent = number
            time.sleep(POLL_S)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = LAST_S) -> None:
        """Ends the workers, whatever ended the agent."""
        self._send(death_sig)
        deadline = time.monotonic() + min(timeout, self._last_s)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.join()

    # --- How workers end. ---

    @property
    def _is_running(self) -> bool:
        return any(process.exitcode is None for process in self._processes)

    def _look(self) -> Phase:
        """Reports what has become of this node's workers; returns what the attempt has come to."""
        self._report_ends()
        outcome, phase = self._job.phase()
        self._raise_if_ended(outcome)
        if phase == Phase.over and self._job.requests.is_leaving and not self._is_running:
            raise JobEnded(Outcome(EXIT_STOPPED, None, LAUNCHER), is_own=True)
        return phase

    def _report_ends(self) -> None:
        attempt = self._job.attempt
        ends = []
        for local_rank, process in enumerate(self._processes):
            if attempt is not None and process.exitcode is not None:
                rank = attempt.first_rank + local_rank
                outcome = _read_outcome(self._outcome_file(local_rank))
                ends.append(WorkerEnd(rank, attempt.node_rank, process.exitcode, outcome))
        self._job.report(ends=tuple(ends))

    def _outcome_file(self, local_rank: int) -> Path:
        assert self._job.attempt is not None
        return Path(self._config_file).with_name(f"outcome-{self._job.attempt.number}-{local_rank}")

    def _raise_if_ended(self, outcome: Outcome | None) -> None:
        """Raises JobEnded at once, unless the workers are about to end likewise."""
        if outcome is None:
            return
        if self._others_ended_at is None:
            self._others_ended_at = time.monotonic()
        if outcome.is_common and self._is_running and time.monotonic() < self._others_ended_at + LAST_S:
            return
        if not outcome.is_common:
            self._last_s = REFUSAL_S
        self._job.raise_if_ended(outcome)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.exitcode is None:
                send_signal(process, number)


def _read_outcome(path: Path) -> Outcome | None:
    try:
        return Outcome.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
