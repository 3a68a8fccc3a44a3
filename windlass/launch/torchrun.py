"""`launch=torchrun`: torch's elastic agent in this process, one a node, and a worker process a rank.

The launcher that serves the job store runs the job by its policy (`windlass.launch.driver`), in a thread beside its own
node's agent. The loss of that launcher ends the job with or without it, as it takes the store with it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from windlass.checkpoint.net.handshake import TransportError
from windlass.conf.schema import Config
from windlass.conf.store import save_config
from windlass.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError
from windlass.launch.driver import Driver
from windlass.launch.elastic_agent import JobRendezvous, NodeAgent
from windlass.launch.fingerprint import fingerprint, job_name
from windlass.launch.fork_server import fork_context, shared_cores
from windlass.launch.job_messages import JobEnded, JobMessages
from windlass.launch.job_store import StoreClient
from windlass.launch.policy import Policy, may_leave
from windlass.launch.secret import job_secret
from windlass.launch.stop_requests import Interrupted, Requests
from windlass.launch.store_endpoint import StoreEndpoint, open_endpoint
from windlass.launch.store_nodes import StoreNodes, limits_of
from windlass.outcome import LAUNCHER, STOP_FILE, Outcome
from windlass.text import printable
from windlass.train.signals import say


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
        with _environment(), shared_cores(num_ranks), Requests(scratch / "stop") as requests:
            fork_context()  # imports while this node waits for the others
            try:
                with requests.may_interrupt():
                    client, endpoint = open_endpoint(config.launch.address, config.launch.join_timeout_s, secret)
            except Interrupted:
                say(f"stopped while waiting for launch.address={config.launch.address}; nothing was trained")
                return EXIT_STOPPED
            try:
                ending = _take_part(config, num_ranks, scratch / "config.yaml", requests, client, endpoint)
            finally:
                endpoint.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(ending, endpoint)
    return ending.outcome.exit_code


def _take_part(
    config: Config,
    num_ranks: int,
    config_file: Path,
    requests: Requests,
    client: StoreClient,
    endpoint: StoreEndpoint,
) -> JobEnded:
    """Takes this node's part in the job, until its end here or everywhere."""
    requests.may_leave = may_leave(config.launch.is_elastic, endpoint.is_host)
    messages = JobMessages(client, job_name(config))
    ending: JobEnded | None = None
    try:
        try:
            node = messages.join(fingerprint(config, num_ranks))
            if endpoint.is_host:
                own = JobMessages(endpoint.connect(), messages.job)
                threading.Thread(target=_drive, args=(config, num_ranks, own), name="driver", daemon=True).start()
            rendezvous = JobRendezvous(messages, node, endpoint, config.launch, num_ranks, requests)
            environment = _worker_environment(requests, endpoint)
            ending = _run(NodeAgent(rendezvous, num_ranks, str(config_file), environment))
            if not (requests.is_leaving and ending.is_own):
                messages.publish(ending.outcome)
            rendezvous.shutdown()
        finally:
            messages.sign_off(endpoint.is_host)
    except TransportError:
        ending = ending or JobEnded(_without_host(endpoint, config.run_dir), is_own=True)
    return ending


def _drive(config: Config, num_ranks: int, messages: JobMessages) -> None:
    """Runs the job, and publishes its outcome."""
    launch = config.launch
    policy = Policy(limits_of(launch), num_ranks, launch.max_restarts, time.monotonic())
    try:
        try:
            outcome = Driver(StoreNodes(messages, launch, num_ranks), policy, config.run_dir, lambda _: None).run()
        except ConfigError as error:
            outcome = Outcome(EXIT_USER_ERROR, str(error), LAUNCHER)
        except (JobEnded, TransportError):
            return  # a node has ended the job, or this one ends
        except Exception:
            messages.publish(Outcome(EXIT_FAILURE, "the launcher that runs the job has failed", LAUNCHER))
            raise
        messages.publish(outcome)
    except TransportError:
        return


def _run(agent: NodeAgent) -> JobEnded:
    """Runs all attempts of this node's workers."""
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


def _without_host(endpoint: StoreEndpoint, run_dir: str) -> Outcome:
    return Outcome(
        EXIT_FAILURE,
        f"the launcher at launch.address={endpoint.host}:{endpoint.port} is lost or out of reach, where the nodes "
        f"meet; the same command on every node goes on from the newest checkpoint; see {run_dir}/logs/",
        LAUNCHER,
    )


def _say(ending: JobEnded, endpoint: StoreEndpoint) -> None:
    """Says what no worker of this node has said."""
    num_refused = 0 if endpoint.server is None else endpoint.server.num_refused
    if num_refused:
        sys.stderr.write(
            f"windlass: warning: {num_refused} connections with the job's store at {endpoint.host}:{endpoint.port} "
            "were refused: they did not know its secret, or broke off\n"
        )
    outcome = ending.outcome
    if outcome.message is None or (ending.is_own and outcome.rank == 0):
        return
    by = "" if outcome.rank == LAUNCHER else f"rank {outcome.rank}: "
    sys.stderr.write(f"windlass: error: {printable(f'{by}{outcome.message}')}\n")


@contextmanager
def _environment() -> Iterator[None]:
    """Has torch's agent ask no other node how many ranks it has: `windlass.launch.fingerprint` sees to that."""
    key = "TORCH_ELASTIC_WORKER_IDENTICAL"
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key, None)


def _worker_environment(requests: Requests, endpoint: StoreEndpoint) -> dict[str, str]:
    """Returns what a worker has beside what the fork server inherited, which may be older than this job."""
    environment = {STOP_FILE: str(requests.stop_file)}
    if "GLOO_SOCKET_IFNAME" not in os.environ and endpoint.interface is not None:
        # Else gloo takes the address that this machine's name has, which may be of another network, or loopback; and of
        # a job that is alone, which no other machine is to reach, one that others do.
        environment["GLOO_SOCKET_IFNAME"] = endpoint.interface
    return environment
