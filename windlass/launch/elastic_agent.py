"""torch's elastic agent as `launch=torchrun` has it: one of a job's launchers, with the workers of its node.

`torch.distributed.elastic` has the parts: the rendezvous in which nodes become the members of a life, with heartbeats
and spare nodes, and the loop that watches workers. What it lacks is here. Restarts are counted over the job, and not by
each node for itself; lives have numbers that all nodes share; a node that comes waits until the others have saved,
however long that takes; and a job that has ended, ends on every node at once. torch would have the others wait in a
rendezvous or in the barrier at the exit of its agents.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from typing import Any, NoReturn

from torch.distributed import DistStoreError, PrefixStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, ConfigError
from windlass.launch.config import LaunchConfig
from windlass.launch.fork_server import fork_context, forked_worker, send_signal
from windlass.launch.meeting import JobEnded, Meeting
from windlass.launch.meeting_place import SAY_AFTER_S
from windlass.launch.rendezvous_state import JsonBackend
from windlass.outcome import LAUNCHER, Outcome, reported_outcome

HEARTBEAT_S, MISSED_HEARTBEATS = 1, 3
"""A node that is silent for so long is lost."""
SAVE_S = 600.0
"""How long workers that are asked to end may take to save."""
DYING_S = 5.0
"""How long workers may take to end after one of them died or refused: nothing is saved then."""
LAST_S = 30.0
"""How long workers may take to end by themselves when others have ended the job."""
FIRST_WORD_S = 1.0
"""A rank that lost its peer must not speak before the peer's launcher does."""
MONITOR_S = 0.1
UNLIMITED = 1 << 30

_POLL_S = 0.02


class JobRendezvous(RendezvousHandler):
    """Makes the nodes that are there the members of a life.

    Args:
        job: its name on the store.
        waiting: entered while there are no workers, in which a request to stop is for the launcher itself.
    """

    def __init__(
        self, meeting: Meeting, job: str, launch: LaunchConfig, waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.meeting, self.launch, self._waiting = meeting, launch, waiting
        self.life = -1
        # A connection of its own: a heartbeat must not wait behind another question.
        self._store = meeting.place.connect()
        store = PrefixStore(f"windlass/{job}", self._store)
        self._inner = DynamicRendezvousHandler.from_backend(
            job,
            store,
            JsonBackend(store),
            launch.min_nodes,
            launch.max_nodes,
            meeting.place.local_address,
            RendezvousTimeout(
                join=timedelta(seconds=launch.join_timeout_s),
                last_call=timedelta(seconds=max(0.001, launch.wait_for_nodes_s)),
            ),
            keep_alive_interval=HEARTBEAT_S,
            keep_alive_max_attempt=MISSED_HEARTBEATS,
        )

    def get_backend(self) -> str:
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        return True  # of which each life has its own part: see `windlass.parallel.mesh`

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns once a life has its members.

        Raises:
            JobEnded: it has, on another node.
            ConfigError: too few nodes came, or two have the same `launch.node_rank`.
        """
        place = self.meeting.place
        with self._waiting(), self._saying_that_it_waits():
            while True:
                info = self._meet()
                life = self.meeting.begin_life(info.store, info.rank, info.world_size, self.launch.min_nodes)
                if life is not None:
                    break
        self.life = life
        rank = info.rank if self.launch.node_rank is None else self.launch.node_rank
        if info.store.add(f"windlass/node/{rank}", 1) > 1:
            raise ConfigError("launch.node_rank", rank, "two nodes have it", "number the nodes from 0")
        if self.launch.max_nodes > 1:
            met = f"{info.world_size} nodes have met; this is number {rank} of them"
            sys.stderr.write(f"windlass: {met if info.world_size > 1 else 'this node goes on without others'}\n")
        return RendezvousInfo(info.store, rank, info.world_size, RendezvousStoreInfo(place.host, place.port))

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

    def _meet(self) -> RendezvousInfo:
        launch = self.launch
        while True:
            self.raise_if_ended()
            try:
                return self._inner.next_rendezvous()
            except (RendezvousClosedError, RendezvousGracefulExitError):
                self.raise_if_ended()
                raise
            except DistStoreError:
                continue  # the first of the nodes was lost in this moment
            except RendezvousTimeoutError as error:
                raise ConfigError(
                    "launch.nnodes",
                    launch.nnodes,
                    f"{launch.min_nodes} nodes are needed, and fewer have come in {launch.join_timeout_s:g} s",
                    "start the same command on every node with the same launch.address and run_dir, "
                    "or set a larger launch.join_timeout_s",
                ) from error

    def raise_if_ended(self) -> None:
        outcome = self.meeting.ended()
        if outcome is not None:
            raise JobEnded(outcome, is_own=False)

    def num_nodes_waiting(self) -> int:
        """Nodes that want to come in, or that have left this life for the next."""
        return max(self._inner.num_nodes_waiting(), int(self.meeting.is_over(self.life)))

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Lets nobody in any more, spare nodes neither. Not for a node that leaves a job that goes on."""
        return self._inner.shutdown()


class NodeAgent(SimpleElasticAgent):
    """Starts a life's workers on this node, and raises `JobEnded` when there is to be no other.

    Args:
        config_file: the run's resolved configuration.
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
            max_restarts=UNLIMITED,  # they are counted in `_count_death`
            monitor_interval=MONITOR_S,
        )
        super().__init__(spec)
        self._rendezvous_of_job, self._meeting = rendezvous, rendezvous.meeting
        self._config_file, self._environment = config_file, environment
        self._processes: list[ForkServerProcess] = []
        self._others_ended_at: float | None = None
        self._first_end_at: float | None = None
        self._last_s = LAST_S

    # --- What torch's agent calls. ---

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        context, self._processes = fork_context(), []
        for worker in worker_group.workers:
            own = {
                "RANK": worker.global_rank,
                "LOCAL_RANK": worker.local_rank,
                "WORLD_SIZE": worker.world_size,
                "LOCAL_WORLD_SIZE": worker_group.spec.local_world_size,
                "GROUP_RANK": worker_group.group_rank,
                "GROUP_WORLD_SIZE": worker_group.group_world_size,
                "MASTER_ADDR": worker_group.master_addr,
                "MASTER_PORT": worker_group.master_port,
                "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_RESTART_COUNT": self._rendezvous_of_job.life,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            environment = {**self._environment, **{key: str(value) for key, value in own.items()}}
            process = context.Process(target=forked_worker, args=(self._config_file, environment))
            process.start()
            self._processes.append(process)
        return {rank: process.pid for rank, process in enumerate(self._processes)}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = [process.exitcode for process in self._processes]
        if all(code == EXIT_DONE for code in codes):
            self._end(reported_outcome() or Outcome(EXIT_DONE), is_own=True)
        failed = self._failed()
        if failed:
            self._raise_if_reported()
            if set(failed.values()) == {EXIT_RESTART}:
                self._meeting.end_life(self._rendezvous_of_job.life)
            else:
                self._count_death(failed)
            return RunResult(WorkerState.FAILED)
        self._raise_if_others_ended()
        outcome = reported_outcome()
        if outcome is not None and not outcome.is_common:
            # The rest may wait for it where ranks meet. Those that are about to refuse, too, have time to say so.
            self._first_end_at = self._first_end_at or time.monotonic()
            if not outcome.has_begun or time.monotonic() > self._first_end_at + DYING_S:
                self._end(outcome, is_own=True)
        return RunResult(WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Ends what is left of a life: after what it saves, unless one of its workers died."""
        begin = time.monotonic()
        self._send(signal.SIGTERM)
        while True:
            is_running = any(process.exitcode is None for process in self._processes)
            has_death = self._meeting.has_death(self._rendezvous_of_job.life)
            died = {rank: code for rank, code in self._failed().items() if code != EXIT_RESTART}
            if died and not has_death:
                # Every launcher may be here before one sees a death, as when a node comes while another is lost.
                self._raise_if_reported()
                self._count_death(died)
            if not is_running:
                break
            if time.monotonic() > begin + (DYING_S if has_death else SAVE_S):
                self._send(signal.SIGKILL)
            time.sleep(_POLL_S)
        self._raise_if_reported()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = LAST_S) -> None:
        """Whatever ended the agent, its workers end too."""
        self._send(death_sig)
        deadline = time.monotonic() + min(timeout, self._last_s)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.join()

    # --- How a life ends. ---

    def _raise_if_reported(self) -> None:
        outcome = reported_outcome()
        if outcome is not None:
            self._end(outcome, is_own=True)

    def _raise_if_others_ended(self) -> None:
        """At once, unless the workers are about to end likewise."""
        outcome = self._meeting.ended()
        if outcome is None:
            return
        if self._others_ended_at is None:
            self._others_ended_at = time.monotonic()
        patience = LAST_S if outcome.is_common else 0.0
        if time.monotonic() >= self._others_ended_at + patience:
            self._end(outcome, is_own=False)

    def _end(self, outcome: Outcome, is_own: bool) -> NoReturn:
        if not outcome.is_common:
            self._last_s = DYING_S
        raise JobEnded(outcome, is_own)

    def _count_death(self, failed: dict[int, int]) -> None:
        """Raises JobEnded if workers have died too often."""
        launch, group = self._rendezvous_of_job.launch, self._worker_group
        num_deaths = self._meeting.count_death(self._rendezvous_of_job.life)
        if num_deaths <= launch.max_restarts:
            return
        local_rank, code = min(failed.items(), key=lambda item: (item[1] > 0, item[0]))  # a signal says more
        if code > 0 and launch.max_nodes > 1:
            time.sleep(FIRST_WORD_S)
        message = (
            f"rank {group.workers[local_rank].global_rank} died ({_how(code)}) and launch.max_restarts="
            f"{launch.max_restarts} is used up"
        )
        self._end(self._meeting.publish(Outcome(EXIT_FAILURE, message, LAUNCHER)), is_own=True)

    def _failed(self) -> dict[int, int]:
        """The exit codes of this node's workers that have ended otherwise than well."""
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code not in (None, EXIT_DONE)}

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.exitcode is None:
                send_signal(process, number)


def _how(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
