"""State and weights in tiers, cut over two ranks: the bits are those of training in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.tiered import STREAMED, Outcome, TieredRun, bytes_a_step, large_numel, tiered_run

from windlass.parallel.config import ParallelConfig, Sharding

SSD = ("offload=ssd", "offload.buffer_bytes=1048576")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "zero3": ("parallel=zero3", "model.tie_embeddings=false", "train.dtype=bfloat16"),
    "zero3_tied": ("parallel=zero3", "model.tie_embeddings=true", "train.activation_checkpoint=full", "optim=muon"),
    "zero1": ("parallel=zero1", "model.tie_embeddings=false", "optim=galore", "optim.rank=12"),
    "in_backward": ("parallel=zero3", "train.dtype=bfloat16", "optim.in_backward=previous_norm"),
}
MICRO_BATCHES = ("train.grad_accum_steps=2",)
"""Looped over, also where weights are streamed: else slices would be summed before ranks, with other bits."""


@dataclass
class Found:
    differences: dict[str, list[str]]
    """From training in memory, by layout and by what is offloaded."""
    read: float
    """Bytes a parameter and step, all on the disk."""
    written: float


def train_in_tiers(run_dir: Path, names: list[str]) -> Found:
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))  # the others' has the same shape

    def train(*overrides: str) -> Outcome:
        return tiered_run(run_dir, [*overrides, *MICRO_BATCHES], num_steps=3, is_fused=False, mesh=mesh)

    differences: dict[str, list[str]] = {}
    for name in names:
        layout = LAYOUTS[name]
        calm = train(*layout)
        for what, offload in (("state", SSD), ("weights", STREAMED)):
            run = train(*layout, *offload)
            pairs = zip(run.weights, calm.weights, strict=True)
            differs = {"losses": run.losses != calm.losses, "weights": not all(torch.equal(*pair) for pair in pairs)}
            differences[f"{name} {what}"] = [key for key, value in differs.items() if value]
    # Twice as wide: the halves of its matrices are moved, too, and have whole pages.
    wide = ("model.hidden_size=192", "model.intermediate_size=256", "model.vocab_size=128", *MICRO_BATCHES)
    run = TieredRun(run_dir, [*LAYOUTS["zero3"], *STREAMED, *wide], mesh=mesh)
    numel, moved = large_numel(run), bytes_a_step(run)
    run.close()
    mesh.stop()
    return Found(differences, moved.read_bytes / numel, moved.write_bytes / numel)


@pytest.mark.parametrize(
    "names", [["zero3"], pytest.param(["zero3_tied", "zero1", "in_backward"], marks=pytest.mark.full)], ids="-".join
)
def test_the_bits_are_those_of_training_in_memory_and_the_bytes_those_of_one_rank(
    tmp_path: Path, names: list[str]
) -> None:
    for found in run_ranks(train_in_tiers, 2, tmp_path, names):
        assert len(found.differences) == 2 * len(names) and not any(found.differences.values()), found.differences
        assert 0.85 * 14 <= found.read <= 1.02 * 14, "of its part, as zero3 gathers"
        assert 0.99 * 12 <= found.written <= 1.02 * 12
    assert list((tmp_path / "offload").iterdir()) == []
