"""Training with state on a disk has the bits of training with state in memory, whatever the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.out_of_core import OPTIMIZERS, Training, assert_same_bits

from windlass.parallel.fragment import Tier

NUM_STEPS = 50
SOME = ("adamw", "apollo", "cosmos", "lion")
MICRO_BATCHES = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in SOME else pytest.param(kind, marks=pytest.mark.full) for kind in OPTIMIZERS]
)
def test_fifty_steps_are_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    calm = Training(None, kind)
    losses = calm.run(NUM_STEPS, MICRO_BATCHES)
    run = Training(tmp_path, kind)
    assert run.run(NUM_STEPS, MICRO_BATCHES) == losses and losses[-1] < losses[0]
    assert_same_bits(run, calm)

    on_disk, buckets = run.offloaded.state_bytes()[Tier.ssd], run.offloaded.bucket_parameters()
    assert len(buckets) == 5 and all(buckets), "each layer's comes and goes by itself"
    figures = run.figures
    assert figures.read_bytes >= (NUM_STEPS - 1) * on_disk > 0 and figures.write_bytes >= NUM_STEPS * on_disk
    run.close()
    assert list(tmp_path.iterdir()) == []
