"""Runs whose state is on a disk are killed with SIGKILL, in the middle of its writes too; they go on to the bit."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from support import runs
from support.offloaded import is_pinned
from support.stored import are_sound

from windlass.conf.schema import Config
from windlass.errors import EXIT_DONE

SIZES = ("model.hidden_size=128", "model.intermediate_size=160", "model.num_layers=2")
"""Large enough for matrices to move, also where two ranks share them."""
PARTIAL = "offload.max_host_bytes=30000"
STREAMED = "offload.weights=streamed"
SHORT = [
    (1, ("checkpoint=durable", "train.max_norm=1.0")),
    (2, ("checkpoint=lazy", "parallel=zero3", "optim=apollo", "optim.rank=8", PARTIAL)),
]
FULL = [
    (1, ("checkpoint=durable", STREAMED)),
    (1, ("checkpoint=lazy", STREAMED, "train.dtype=bfloat16")),
    (2, ("checkpoint=durable", "parallel=zero3", STREAMED)),
    (2, ("checkpoint=durable", "parallel=ddp", "optim=muon")),
    (2, ("checkpoint=lazy", "parallel=zero2", "optim=galore", "optim.rank=8", PARTIAL)),
]


def survive(tmp_path: Path, num_ranks: int, overrides: tuple[str, ...], num_kills: int, seed: int) -> list[str]:
    """Runs undisturbed in memory, then on the disk with kills, and compares. Returns when each kill struck.

    Streamed weights run a layer's micro-batches together, which draws other dropout: the calm run streams them, too.
    """
    settings = (*SIZES, "model.dropout=0.1", "train.steps=24", "checkpoint.persist_every=2", "train.grad_accum_steps=2")
    calm_overrides = [item for item in overrides if not item.startswith(("offload.", "checkpoint="))]
    calm_overrides += ["offload=ssd", STREAMED] if STREAMED in overrides else []
    calm = runs.undisturbed(num_ranks, *settings, *calm_overrides)
    stormy = runs.run_config(tmp_path, "stormy", *settings, "offload=ssd", *overrides)
    randomness = random.Random(seed)
    struck = []
    for number in range(num_kills):
        before = len(runs.losses(stormy)) if (Path(stormy.run_dir) / "metrics.jsonl").exists() else 0
        attempt = runs.start(stormy, num_ranks)
        wait_for_steps(attempt, stormy, before + randomness.randrange(1, 4))
        moment = "random"
        if number % 2:
            moment = wait_for_write(attempt, Path(stormy.run_dir))
        else:
            time.sleep(randomness.uniform(0, 0.3))
        attempt.kill()
        attempt.join()
        struck.append(moment)
    assert runs.run(stormy, num_ranks) == [EXIT_DONE] * num_ranks, runs.output(stormy)
    runs.assert_same_training(stormy, calm, f"kills {struck}")
    assert are_sound(runs.checkpoints(stormy))
    assert any(is_pinned(chunk) for chunk in (runs.checkpoints(stormy) / "chunks").iterdir())
    left = [path.name for path in (Path(stormy.run_dir) / "offload").iterdir()]
    assert left == [], "the next attempt removes what a killed one has left"
    return struck


def wait_for_steps(attempt: runs.Attempt, config: Config, num_steps: int) -> None:
    """Returns once so many different steps were made, in this attempt and others."""
    path = Path(config.run_dir) / "metrics.jsonl"
    while attempt.is_alive() and not (path.exists() and len(runs.losses(config)) >= num_steps):
        time.sleep(0.005)


def wait_for_write(attempt: runs.Attempt, run_dir: Path) -> str:
    """Returns when a file of the tier, or a chunk, has just changed: most often more of it is being written."""
    before = modified(run_dir)
    while attempt.is_alive():
        changed = [name for name, time_ns in modified(run_dir).items() if before.get(name) != time_ns]
        if changed:
            return "writing a chunk" if any("chunks" in name for name in changed) else "writing to the tier"
    return "after the end"


def modified(run_dir: Path) -> dict[str, int]:
    found = {}
    for path in itertools.chain(run_dir.glob("offload/*/*.tier"), run_dir.glob("checkpoints/chunks/*")):
        try:
            found[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.full)], ids=["one", "two"])
def test_killed_runs_end_with_the_bits_of_a_calm_run(tmp_path: Path, number: int) -> None:
    survive(tmp_path, *SHORT[number], num_kills=2, seed=number)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(FULL)), ids=map(str, range(len(FULL))))
def test_killed_runs_end_with_the_bits_of_a_calm_run_everywhere(tmp_path: Path, number: int) -> None:
    """20 kills in all."""
    print(dict(Counter(survive(tmp_path, *FULL[number], num_kills=4, seed=10 + number))))
