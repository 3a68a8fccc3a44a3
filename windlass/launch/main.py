"""`windlass train`: composes the configuration and starts the workers that it asks for."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from windlass.checkpoint.config import CheckpointKind
from windlass.conf.compose import run_hydra
from windlass.conf.schema import Config
from windlass.errors import ConfigError, require
from windlass.launch.config import LaunchKind
from windlass.os_errors import limits_named, require_open_files
from windlass.parallel.environment import WHAT_TO_DO, RankEnvironment, forget
from windlass.streams import goes_on_in
from windlass.text import printable
from windlass.train.signals import late_requests_pass

LAUNCHER_FILES, RANK_FILES = 24, 4
"""Files that a launcher has open at least, and for each of its ranks."""


def train(arguments: Sequence[str]) -> int:
    """Runs `windlass train ARGUMENTS` and returns its exit code.

    Raises:
        WindlassError: what the user asked for cannot be done.
    """
    with limits_named():
        return run_hydra(_launch, "windlass train", arguments)


def _launch(config: Config) -> int:
    with late_requests_pass(), goes_on_in(Path(config.run_dir) / "logs" / "launcher.log"):
        return _launch_and_tidy(config)


def _launch_and_tidy(config: Config) -> int:
    try:
        return _start(config)
    finally:
        has_agents = config.checkpoint.name in (CheckpointKind.lazy, CheckpointKind.erasure)
        if has_agents and config.launch.name != LaunchKind.ray:  # there each node ends its own
            _end_agents(config)


def _end_agents(config: Config) -> None:
    """After a run that ended well there are none. Else they make durable what only they have, and leave."""
    with _uninterrupted():
        from windlass.launch.cleanup import end_agents_of

    for folder in end_agents_of(config):
        sys.stderr.write(f"windlass: warning: the snapshot agent in {printable(str(folder))} is still at work\n")


def _start(config: Config) -> int:
    # Each launcher imports torch; `windlass train --help` and a typo must not wait for that.
    if config.launch.name == LaunchKind.torchrun:
        require_open_files(LAUNCHER_FILES + RANK_FILES * (config.launch.nproc_per_node or 1))
        if config.launch.nproc_per_node is not None:
            # The server that workers are forked from imports torch while this process does.
            from windlass.launch.fork_server import fork_context, shared_cores

            with shared_cores(config.launch.nproc_per_node):
                fork_context()
        with _uninterrupted():
            from windlass.launch.torchrun import launch

        return launch(config)
    if config.launch.name == LaunchKind.ray:
        return _start_on_ray(config)
    _be_alone()
    with _uninterrupted():
        from windlass.launch.worker import run_worker

    return run_worker(config)


def _be_alone() -> None:
    """Raises ConfigError where the environment has this process be one of several ranks."""
    world_size = RankEnvironment.read().world_size
    require(
        world_size == 1,
        "WORLD_SIZE",
        world_size,
        "launch=local trains on one rank, and would train the same in each of them",
        f"choose launch=torchrun, {WHAT_TO_DO}",
    )
    forget()  # what is left of others


def _start_on_ray(config: Config) -> int:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "launch", "ray", "needs Ray, which is not installed", "run `pip install 'windlass[ray]'` on every node"
        )
    if config.launch.address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # Ray reads it when it is imported, and would leave a token in the user's home, which changes later clusters.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _uninterrupted():
        from windlass.launch.ray import launch

    return launch(config)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Has Ctrl-C wait for imports: torch crashes the process if it is imported again after it was half imported."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
