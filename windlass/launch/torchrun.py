"""`launch=torchrun`: torch's elastic agent in this process, one a node, and a worker process a rank."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.distributed import DistError, PrefixStore, Store
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from windlass.checkpoint.net.handshake import TransportError
from windlass.conf.schema import Config
from windlass.conf.store import save_config
from windlass.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError
from windlass.launch.elastic_agent import JobRendezvous, NodeAgent
from windlass.launch.fork_server import fork_context, shared_cores
from windlass.launch.job_store import store_variables
from windlass.launch.meeting import JobEnded, Meeting, card_of, job_name
from windlass.launch.meeting_place import Place, open_place
from windlass.launch.secret import job_secret
from windlass.outcome import LAUNCHER, OUTCOME_FILE, STOP_FILE, Outcome, reported_outcome, write_request
from windlass.text import printable
from windlass.train.signals import STOP_SIGNALS, handle, say, stop_heard


def launch(config: Config) -> int:
    """Starts this node's workers, starts them again when one of the job dies, and returns the run's exit code.

    Raises:
        ConfigError: the layout cannot be, or the nodes cannot meet, or do not fit together.
    """
    num_ranks = config.launch.nproc_per_node or max(1, torch.cuda.device_count())
    for num_nodes in range(config.launch.min_nodes, config.launch.max_nodes + 1):
        config.parallel.mesh_axes(num_nodes * num_ranks, num_ranks)  # raises before anything is started
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    secret = job_secret(config.launch)
    scratch = Path(tempfile.mkdtemp(prefix="windlass-"))
    try:
        save_config(config, scratch / "config.yaml")
        with _environment(scratch), shared_cores(num_ranks), Requests(scratch / "stop") as requests:
            fork_context()  # imports while this node waits for the others
            try:
                with requests.may_interrupt():
                    store, place = open_place(config.launch.address, config.launch.join_timeout_s, secret)
            except Interrupted:
                say(f"stopped while waiting for launch.address={config.launch.address}; nothing was trained")
                return EXIT_STOPPED
            try:
                ending = _take_part(config, num_ranks, scratch / "config.yaml", requests, store, place)
            finally:
                place.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(ending, config.run_dir, place)
    return ending.outcome.exit_code


def _take_part(
    config: Config, num_ranks: int, config_file: Path, requests: Requests, store: Store, place: Place
) -> JobEnded:
    """All that this node does in the job, until its end here or everywhere."""
    requests.may_leave = config.launch.is_elastic and not place.is_host
    meeting = Meeting(PrefixStore(f"windlass/{job_name(config)}", store), place)
    ending: JobEnded | None = None
    try:
        try:
            rendezvous = JobRendezvous(meeting, job_name(config), config.launch, requests.may_interrupt)
            _join(meeting, rendezvous, card_of(config, num_ranks))
            agent = NodeAgent(rendezvous, num_ranks, str(config_file), _worker_environment(config, place))
            ending = _run(agent)
            if requests.is_leaving and ending.is_own:
                meeting.end_life(rendezvous.life)  # the others may be waiting for this node's ranks
            else:
                meeting.publish(ending.outcome)
                rendezvous.shutdown()
        finally:
            meeting.sign_off()
    except (DistError, TransportError, RendezvousConnectionError):
        if ending is None:
            ending = JobEnded(reported_outcome() or _without_host(place), is_own=True)
    return ending


def _join(meeting: Meeting, rendezvous: JobRendezvous, card: dict[str, str]) -> None:
    """Raises ConfigError if this node differs from the others, which may be waiting for it."""
    try:
        meeting.join(card)
    except ConfigError:
        if meeting.ended() is not None:
            rendezvous.shutdown()
        raise


def _run(agent: NodeAgent) -> JobEnded:
    """All lives of this node's workers."""
    try:
        agent.run()
    except JobEnded as ending:
        return ending
    except Interrupted:
        say("stopped while waiting for the job's nodes to meet; the same command goes on")
        return JobEnded(Outcome(EXIT_STOPPED, None, LAUNCHER), is_own=True)
    except ConfigError as error:
        return JobEnded(Outcome(EXIT_USER_ERROR, str(error), LAUNCHER), is_own=True)
    raise AssertionError("torch's agent returned, which this one does not")


def _without_host(place: Place) -> Outcome:
    return Outcome(
        EXIT_FAILURE,
        f"the launcher at launch.address={place.host}:{place.port} is lost or out of reach, where the nodes meet; "
        "the same command on every node goes on from the newest checkpoint",
        LAUNCHER,
    )


def _say(ending: JobEnded, run_dir: str, place: Place) -> None:
    """What no worker of this node has said."""
    num_refused = 0 if place.server is None else place.server.num_refused
    if num_refused:
        sys.stderr.write(
            f"windlass: warning: {num_refused} connections with the job's store at {place.host}:{place.port} were "
            "refused: they did not know its secret, or broke off\n"
        )
    outcome = ending.outcome
    if outcome.message is None or (ending.is_own and outcome.rank == 0):
        return
    by = "" if outcome.rank == LAUNCHER else f"rank {outcome.rank}: "
    more = f"; see {run_dir}/logs/" if outcome.exit_code == EXIT_FAILURE else ""
    sys.stderr.write(f"windlass: error: {printable(f'{by}{outcome.message}{more}')}\n")


@contextmanager
def _environment(scratch: Path) -> Iterator[None]:
    """What torch's rendezvous and agent are to do, and the files of `windlass.outcome`."""
    added = {
        OUTCOME_FILE: str(scratch / "outcome"),
        STOP_FILE: str(scratch / "stop"),
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",  # as many ranks on each node: `card_of`
        # torch would tell only the nodes of the first life where workers meet, and a later one waits for that in vain.
        # Nobody uses what it tells then: see `JobRendezvous`.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _worker_environment(config: Config, place: Place) -> dict[str, str]:
    """What a worker has beside what the fork server inherited, which may be older than this job."""
    environment = {key: os.environ[key] for key in (OUTCOME_FILE, STOP_FILE)}
    environment |= store_variables((place.host, place.port), place.secret)
    if "GLOO_SOCKET_IFNAME" not in os.environ and place.interface is not None:
        # Else gloo takes the address that this machine's name has, which may be of another network, or loopback; and of
        # a job that is alone, which no other machine is to reach, one that others do.
        environment["GLOO_SOCKET_IFNAME"] = place.interface
    return environment


class Interrupted(Exception):
    """The launcher was asked to stop or to leave while it had no workers to ask."""


class Requests:
    """Passes what asks this process to stop on to the workers, which save and end by themselves.

    SIGTERM is how schedulers take back a machine: this node leaves the job where that may go on without it.
    """

    def __init__(self, stop_file: Path) -> None:
        self.may_leave = False
        self.is_leaving = False
        self.signal_name: str | None = None
        """Of the first signal that asked the job to stop."""
        self._stop_file = stop_file
        self._is_stopping = self._may_interrupt = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        self._previous = handle(dict.fromkeys(STOP_SIGNALS, self._hear))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """While there are no workers: raises Interrupted when asked, or if it was before."""
        self._may_interrupt = True
        try:
            if self.is_leaving or self._is_stopping:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM and (self.is_leaving or self._is_stopping):
            return  # repeated, it means no more, but SIGINT would
        stop_heard()
        # A worker would take SIGTERM for its launcher's, who is about to start it again.
        passed_on = signal.SIGUSR1 if number == signal.SIGTERM else signal.Signals(number)
        if number == signal.SIGTERM and self.may_leave:
            self.is_leaving = True
        else:
            self.is_leaving, self._is_stopping = False, True
            self.signal_name = self.signal_name or signal.Signals(number).name
        write_request(self._stop_file, self.signal_name)
        if self._may_interrupt:
            raise Interrupted
        for worker in _workers():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(passed_on)


def _workers() -> Iterator[psutil.Process]:
    """The children of the fork server; not theirs, as snapshot agents outlive them."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            yield from child.children()
