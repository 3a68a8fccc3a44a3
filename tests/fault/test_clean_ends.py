"""Ranks that have ended their training end with 0, also where a machine is busy: no thread of torch aborts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import runs
from support.launched import command_line
from support.ranks import free_port

NUM_RUNS = int(os.environ.get("WINDLASS_NUM_ENDS", "200"))

RUNS = """
import os, shutil, sys, time
from windlass import process
from windlass.launch.fork_server import MODULES
from windlass.train.__main__ import main
for module in MODULES:
    __import__(module)

num_runs, port, run_dir, *overrides = sys.argv[1:]
for number in range(int(num_runs)):
    shutil.rmtree(run_dir, ignore_errors=True)
    ranks = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            own["MASTER_PORT"] = int(port) + number % 50
            os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1")
            sys.argv = ["windlass.train", *overrides]
            break
        ranks.append(child)
    if not child:
        break
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    print(*codes, file=sys.stderr, flush=True)
else:
    os._exit(0)
if os.environ.get("AS_THE_INTERPRETER_ENDS"):  # what it was like
    import windlass.launch.worker
    windlass.launch.worker.end_groups = lambda: None
    sys.exit(main())
process.run(main)
"""


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.soak
@pytest.mark.serial
@pytest.mark.parametrize("num_others", [0, 2 * (os.cpu_count() or 1)])
def test_ranks_that_are_done_end_with_0(num_others: int, tmp_path: Path) -> None:
    """As under `torchrun -m windlass.train`, but for the imports, which are most of a short run's cost."""
    config = runs.run_config(tmp_path, "run", "train.steps=2", "checkpoint=none", "train.mock_step=false")
    arguments = [str(NUM_RUNS // 2), str(free_port()), config.run_dir, *command_line(config)]
    with busy(num_others):
        result = subprocess.run(
            [sys.executable, "-c", RUNS, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.stderr == "0 0\n" * (NUM_RUNS // 2)
