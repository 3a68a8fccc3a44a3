"""Tidies a node up after the job: its snapshot agents, when no workers of it come any more, and its scratch folder."""

from __future__ import annotations

import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

from windlass.checkpoint.agent.listing import end_agents, users_of
from windlass.checkpoint.config import CheckpointKind
from windlass.checkpoint.durable.storage import resolved
from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.errors import ConfigError
from windlass.train.build import checkpoint_dir

TAKE_OVER_S = 20.0
"""How long the memory of a node whose keeper was killed is left for workers that another may start there."""
WORKERS_END_S = 5.0
"""How long workers that were killed may still be seen by their agents."""


def end_agents_of(config: Config) -> list[Path]:
    """Has the agents make durable what only they have, and leave; after a run that ended well there are none.

    Returns:
        The folders of those that are still at work.
    """
    shm_dir = None if config.checkpoint.shm_dir is None else Path(config.checkpoint.shm_dir)
    location = resolved(checkpoint_dir(config))
    try:
        deadline = time.monotonic() + WORKERS_END_S
        while users_of(location, shm_dir):
            if time.monotonic() > deadline:
                return []  # they are another run's, which has this folder, and this one was refused
            time.sleep(0.05)
        return end_agents(location, shm_dir)
    except ConfigError:
        return []  # there is no such folder, as the workers have said


def clean_up_after(keeper: Connection, config_file: Path) -> None:
    """Waits for the word of whoever keeps the node's workers, `end_agents` or `leave_agents`, or for its death. Removes
    the job's scratch folder.

    It runs in a process of its own, forked from the workers' fork server, and holds nothing but a connection.
    """
    os.setsid()  # so that no signal to the keeper's group comes here
    config = load_config(config_file)
    has_agents = config.checkpoint.name in (CheckpointKind.lazy, CheckpointKind.erasure)
    try:
        word = keeper.recv_bytes()
        left = end_agents_of(config) if has_agents and word == b"end_agents" else []
        keeper.send_bytes("\n".join(map(str, left)).encode())
    except (EOFError, OSError):
        shutil.rmtree(config_file.parent, ignore_errors=True)
        if has_agents:
            time.sleep(TAKE_OVER_S)
            end_agents_of(config)  # unless others use them
    shutil.rmtree(config_file.parent, ignore_errors=True)
