"""All ranks are killed with SIGKILL, at random moments or in the middle of a checkpoint; the run goes on to the bit."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from support import runs

from windlass.errors import EXIT_DONE

NUM_RANKS = 2
LOW_RANK = ("optim.rank=4", "optim.update_interval=7")
APOLLO = ("optim=apollo", *LOW_RANK)
IN_BACKWARD = (*APOLLO, "optim.in_backward=previous_norm")
SHORT = [("zero3", 1, "float32", APOLLO), ("zero1", 4, "bfloat16", ()), ("zero2", 1, "float32", IN_BACKWARD)]
FULL = [
    *itertools.product(("zero1", "zero2", "zero3"), (1, 4), ("float32", "bfloat16"), ((),)),
    *(("zero3", 1, "float32", (f"optim={name}", *LOW_RANK)) for name in ("apollo", "galore", "natural_galore")),
    *(("zero3", 1, "float32", (f"optim={name}",)) for name in ("apollo_mini", "muon", "cosmos", "sgd_sai")),
    ("zero1", 4, "bfloat16", IN_BACKWARD),
]


def survive(
    tmp_path: Path, sharding: str, accumulation: int, dtype: str, optim: tuple[str, ...], num_kills: int, seed: int
) -> list[str]:
    """Runs undisturbed, then with `num_kills` kills, and compares. Returns when each kill struck, for the log."""
    overrides = (f"parallel={sharding}", f"train.grad_accum_steps={accumulation}", f"train.dtype={dtype}")
    overrides += ("model.dropout=0.1", "train.steps=30", "checkpoint.persist_every=2", *optim)
    calm = runs.undisturbed(NUM_RANKS, *overrides)
    life_s = runs.life_s(calm)
    stormy = runs.run_config(tmp_path, "stormy", *overrides)
    randomness = random.Random(seed)
    struck = []
    for number in range(num_kills):
        attempt = runs.start(stormy, NUM_RANKS)
        if number % 2:
            moment = wait_for_writing(attempt, runs.checkpoints(stormy), skip=randomness.randrange(4))
        else:
            moment = "random"
            time.sleep(randomness.uniform(0.2, 0.9) * life_s)
        attempt.kill()
        attempt.join()
        struck.append(moment)
    assert runs.run(stormy, NUM_RANKS) == [EXIT_DONE] * NUM_RANKS, runs.output(stormy)
    runs.assert_same_training(stormy, calm, f"kills {struck}")
    return struck


def wait_for_writing(attempt: runs.Attempt, checkpoints: Path, skip: int) -> str:
    """Returns as soon as a checkpoint is being written, `skip` such moments later than the first.

    That is when there are new chunks, whole or half written, and no newer manifest.
    """
    committed, settled = names(checkpoints, "step-*/manifest.json"), names(checkpoints, "chunks/*")
    num_seen, is_counted = 0, False
    while attempt.is_alive():
        manifests, chunks = names(checkpoints, "step-*/manifest.json"), names(checkpoints, "chunks/*")
        if manifests != committed:
            committed, settled, is_counted = manifests, chunks, False
        elif chunks - settled and not is_counted:
            num_seen, is_counted = num_seen + 1, True
            if num_seen > skip:
                return f"while writing after {max(committed, default='nothing')}"
        time.sleep(0.001)
    return "after the end"


def names(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob(pattern)}


@pytest.mark.parametrize(
    ("sharding", "accumulation", "dtype", "optim"),
    [SHORT[0], *(pytest.param(*layout, marks=pytest.mark.full) for layout in SHORT[1:])],
)
def test_killed_runs_end_with_the_same_bits(
    tmp_path: Path, sharding: str, accumulation: int, dtype: str, optim: tuple[str, ...]
) -> None:
    survive(tmp_path, sharding, accumulation, dtype, optim, num_kills=2, seed=accumulation)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(FULL)), ids=["-".join(map(str, layout)) for layout in FULL])
def test_killed_runs_end_with_the_same_bits_everywhere(tmp_path: Path, number: int) -> None:
    sharding, accumulation, dtype, optim = FULL[number]
    struck = survive(tmp_path, sharding, accumulation, dtype, optim, num_kills=4, seed=number)
    print(f"{sharding} x{accumulation} {dtype} {' '.join(optim)}: {struck}")
