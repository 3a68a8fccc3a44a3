"""Processes that are forked from a server which waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.ranks import CONTEXT

from windlass.launch.fork_server import send_signal

NUM_PROCESSES = 100


@pytest.mark.slow
def test_a_process_that_ends_just_now_may_be_sent_a_signal() -> None:
    """Its server may have waited for it already, and not yet said so: then nobody has its ID any more."""
    for _ in range(NUM_PROCESSES):
        process = CONTEXT.Process(target=time.sleep, args=(60,))
        process.start()
        send_signal(process, signal.SIGKILL)
        while process.exitcode is None:
            send_signal(process, signal.SIGTERM)
        assert process.exitcode == -signal.SIGKILL


FORKS_ONE = """
import sys
from windlass.launch.fork_server import fork_context

if __name__ == "__main__":
    process = fork_context().Process(target=sys.exit, args=(7,))
    process.start()
    process.join()
    print(process.exitcode)
"""


@pytest.mark.slow
def test_temporary_files_may_have_long_paths(tmp_path: Path) -> None:
    """As on clusters, whose jobs have folders of their own. A socket's path has at most 107 bytes."""
    folder = tmp_path / ("job" * 40)
    folder.mkdir()
    script = tmp_path / "forks_one.py"
    script.write_text(FORKS_ONE)
    # No place to look for modules: what stands there is the user's text, or a stranger's.
    working_directory = tmp_path / "text"
    working_directory.mkdir()
    for module in ("random", "selectors", "torch", "windlass"):
        (working_directory / f"{module}.py").write_text("raise SystemExit('a module of the working directory')")
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, script], cwd=working_directory, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr
