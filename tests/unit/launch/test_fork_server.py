"""Processes that are forked from a server which waits for them."""

from __future__ import annotations

import signal
import time

from support.ranks import CONTEXT

from windlass.launch.fork_server import send_signal

NUM_PROCESSES = 100


def test_a_process_that_ends_just_now_may_be_sent_a_signal() -> None:
    """Its server may have waited for it already, and not yet said so: then nobody has its ID any more."""
    for _ in range(NUM_PROCESSES):
        process = CONTEXT.Process(target=time.sleep, args=(60,))
        process.start()
        send_signal(process, signal.SIGKILL)
        while process.exitcode is None:
            send_signal(process, signal.SIGTERM)
        assert process.exitcode == -signal.SIGKILL
