"""Ends the snapshot agents of a job on this node, when no workers of it come any more."""

from __future__ import annotations

import time
from pathlib import Path

from windlass.checkpoint.agent.listing import end_agents, users_of
from windlass.checkpoint.durable.storage import resolved
from windlass.conf.schema import Config
from windlass.errors import ConfigError
from windlass.train.build import checkpoint_dir

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
