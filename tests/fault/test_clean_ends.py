"""Ranks that have ended their training end with 0, also where a machine is busy: no thread of torch aborts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import runs
from support.launched import command_line

NUM_RUNS = int(os.environ.get("WINDLASS_NUM_ENDS", "200"))
NUM_RANKS = 2


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def short_run(tmp_path: Path, number: int) -> tuple[int, bool]:
    """The exit code of torchrun, and whether a rank said that it was terminated."""
    config = runs.run_config(tmp_path, f"run-{number}", "train.steps=2", "checkpoint=none")
    config.metrics.report = number % 4 == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    result = subprocess.run(
        [*torchrun, "-m", "windlass.train", *command_line(config)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, "terminate called" in result.stderr


@pytest.mark.soak
@pytest.mark.serial
def test_short_runs_under_plain_torchrun_all_end_with_0(tmp_path: Path) -> None:
    """Half of them beside others that want the cores."""
    found: Counter[tuple[int, bool]] = Counter()
    for half, num_others in enumerate((0, 2 * (os.cpu_count() or 1))):
        with busy(num_others):
            found.update(short_run(tmp_path, number) for number in range(half, NUM_RUNS, 2))
    assert found == {(0, False): NUM_RUNS}
