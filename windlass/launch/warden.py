"""The process that tidies a node up after the job, also when whoever keeps the node's workers is killed.

It is forked from the workers' fork server, in a session of its own, and holds nothing but one end of a connection.
"""

from __future__ import annotations

import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

from windlass.checkpoint.config import CheckpointKind
from windlass.conf.store import load_config
from windlass.launch.agents import end_agents_of

TAKE_OVER_S = 20.0
"""How long the memory of a node whose keeper was killed is left for workers that another may start there."""


def keep_watch(keeper: Connection, config_file: Path) -> None:
    """Waits for the keeper's word, `end_agents` or `leave_agents`, or its death. Removes the job's scratch folder."""
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
