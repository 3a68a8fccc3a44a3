"""What a step reads and writes is what the design says, a parameter, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiered import STREAMED, TieredRun, await_transfers, bytes_a_step, large_numel

from windlass.parallel.fragment import Tier

TOLERANCE = 1.02
WHOLE_PAGES = ("model.vocab_size=128",)
"""The embedding has whole pages too: what is rounded up in a real model is next to nothing."""
EXACT = ("offload=ssd", "offload.buffer_bytes=2097152", *WHOLE_PAGES)
IN_HALVES = (*EXACT, "offload.weights=streamed", "train.dtype=bfloat16")
ADAMW, APOLLO = ("optim=adamw",), ("optim=apollo", "optim.rank=12")
"""Small matrices stay in memory, and the low-rank state of these, so it is counted by itself."""


def check(run: TieredRun, read: float, write: float) -> None:
    """Compares with so many bytes a parameter that is moved.

    The last unit's weights stay between forward and backward, and so are read once: of so few units that is a tenth.
    """
    numel = large_numel(run)
    moved = bytes_a_step(run)
    print(f"{moved.read_bytes / numel:.3f} read, {moved.write_bytes / numel:.3f} written, expected {read} and {write}")
    assert 0.85 * read * numel <= moved.read_bytes <= TOLERANCE * read * numel
    assert 0.99 * write * numel <= moved.write_bytes <= TOLERANCE * write * numel
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_adamw_with_weights_in_memory(micro_batches: int, tmp_path: Path) -> None:
    check(TieredRun(tmp_path, [*EXACT, *ADAMW, f"train.grad_accum_steps={micro_batches}"]), 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("model", ["tied", "untied", "recompute"])
def test_adamw_with_streamed_halves(micro_batches: int, model: str, tmp_path: Path) -> None:
    """Forward and backward read 2, the update 2 more of the weight and 8 of state; it writes all 12."""
    overrides = [*IN_HALVES, *ADAMW, f"train.grad_accum_steps={micro_batches}"]
    overrides.append(f"model.tie_embeddings={str(model == 'tied').lower()}")
    overrides.append(f"train.activation_checkpoint={'full' if model == 'recompute' else 'none'}")
    check(TieredRun(tmp_path, overrides), 14, 12)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_adamw_with_streamed_float32(micro_batches: int, tmp_path: Path) -> None:
    """Forward and backward read 4, the update 8 of state; it writes both."""
    overrides = [*EXACT, "offload.weights=streamed", *ADAMW, f"train.grad_accum_steps={micro_batches}"]
    check(TieredRun(tmp_path, overrides), 16, 12)


@pytest.mark.slow
def test_adamw_in_the_backward_pass(tmp_path: Path) -> None:
    """The update finds the weight's upper half there, so it is as much."""
    check(TieredRun(tmp_path, [*IN_HALVES, *ADAMW, "optim.in_backward=previous_norm"]), 14, 12)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_apollo_with_streamed_halves(micro_batches: int, tmp_path: Path) -> None:
    """6 read and 4 written, and the state: low-rank of the layers, AdamW's of the embedding."""
    overrides = [*IN_HALVES, *APOLLO, f"train.grad_accum_steps={micro_batches}"]
    run = TieredRun(tmp_path, [*overrides, "model.hidden_size=128", "model.intermediate_size=256"])
    run.step()
    assert run.tiers is not None and run.tiers.optimizer is not None
    state = run.tiers.optimizer.state_bytes()[Tier.ssd] / large_numel(run)
    check(run, 6 + state, 4 + state)


@pytest.mark.slow
def test_micro_batches_one_by_one_read_weights_for_each(tmp_path: Path) -> None:
    """Measures what fusing micro-batches saves."""
    run = TieredRun(tmp_path, [*IN_HALVES, *ADAMW, "train.grad_accum_steps=4"], is_fused=False)
    numel = large_numel(run)
    assert bytes_a_step(run).read_bytes > (14 + 3 * 3) * numel
    run.close()


@pytest.mark.parametrize("overrides", [EXACT, (*EXACT, *STREAMED)])
def test_an_evaluation_reads_weights_once_and_writes_nothing(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = TieredRun(tmp_path, [*overrides, *ADAMW])
    numel = large_numel(run)
    run.step()
    run.settle()
    run.optimizer.state_dict()  # all is written
    assert run.tiers is not None
    run.tiers.engine.figures.read_bytes = run.tiers.engine.figures.write_bytes = 0
    run.evaluate()
    await_transfers(run.tiers)
    weights = 4 * numel if run.tiers.weights is not None else 0
    assert run.tiers.figures.write_bytes == 0
    # State that the next updates need is read ahead, too.
    assert weights <= run.tiers.figures.read_bytes <= weights + run.config.offload.buffer_bytes
    run.close()
