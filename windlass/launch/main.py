"""`windlass train`: composes the configuration and starts the workers that it asks for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from windlass.checkpoint.config import CheckpointKind
from windlass.conf.compose import run_hydra
from windlass.conf.schema import Config
from windlass.launch.config import LaunchKind

WORKERS_END_S = 5.0
"""How long workers that were killed may still be seen by their agents."""


def train(arguments: Sequence[str]) -> int:
    """Runs `windlass train ARGUMENTS` and returns its exit code.

    Raises:
        WindlassError: what the user asked for cannot be done.
    """
    return run_hydra(_launch, "windlass train", arguments)


def _launch(config: Config) -> int:
    try:
        return _start(config)
    finally:
        if config.checkpoint.name in (CheckpointKind.lazy, CheckpointKind.erasure):
            _end_agents(config)


def _end_agents(config: Config) -> None:
    """After a run that ended well there are none. Else they make durable what only they have, and leave."""
    from windlass.checkpoint.agent.listing import end_agents, users_of
    from windlass.checkpoint.durable.storage import resolved
    from windlass.train.state import checkpoint_dir

    shm_dir = None if config.checkpoint.shm_dir is None else Path(config.checkpoint.shm_dir)
    if shm_dir is not None and not shm_dir.is_dir():
        return  # as the workers have said
    location = resolved(checkpoint_dir(config))
    deadline = time.monotonic() + WORKERS_END_S
    while users_of(location, shm_dir):
        if time.monotonic() > deadline:
            return  # they are another run's, which has this folder, and this one was refused
        time.sleep(0.05)
    for folder in end_agents(location, shm_dir):
        sys.stderr.write(f"windlass: warning: the snapshot agent in {folder} is still at work\n")


def _start(config: Config) -> int:
    # Each launcher imports torch; `windlass train --help` and a typo must not wait for that.
    if config.launch.name == LaunchKind.torchrun:
        from windlass.launch.torchrun import launch

        return launch(config)
    from windlass.launch.worker import run_worker

    return run_worker(config)
