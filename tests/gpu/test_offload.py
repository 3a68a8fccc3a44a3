"""State, weights and activations of a model on a GPU, in host memory and on a disk: the bits stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiered import tiered_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SMALL_BUFFERS = "offload.buffer_bytes=1048576"
TIERS = {
    "cpu": ("offload=cpu",),
    "ssd": ("offload=ssd", SMALL_BUFFERS),
    "three": ("offload=ssd", SMALL_BUFFERS, "offload.max_device_bytes=800000", "offload.max_host_bytes=800000"),
    "streamed_cpu": ("offload=cpu", "offload.weights=streamed"),
    "streamed_ssd": ("offload=ssd", "offload.weights=streamed", SMALL_BUFFERS),
}
RUNS = {
    "exact": ("model.tie_embeddings=false", "train.grad_accum_steps=3"),
    "eager": ("model.tie_embeddings=false", "optim.in_backward=previous_norm", "train.grad_accum_steps=3"),
    "recompute": ("model.tie_embeddings=true", "train.activation_checkpoint=full"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_run_on_a_gpu_has_the_bits_of_one_without_tiers(tier: str, run: str, dtype: str, tmp_path: Path) -> None:
    common = [*RUNS[run], "optim=adamw", f"train.dtype={dtype}"]
    torch.use_deterministic_algorithms(True)
    try:
        expected = tiered_run(tmp_path, [*common, "offload=none"], is_fused=False, device="cuda")
        found = tiered_run(tmp_path, [*common, *TIERS[tier]], device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.losses == expected.losses
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        assert torch.equal(mine, theirs)


def test_the_state_leaves_the_device(tmp_path: Path) -> None:
    torch.cuda.synchronize()
    peaks = {}
    for tier in ("none", "ssd"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tiered_run(
            tmp_path,
            [f"offload={tier}", "model.hidden_size=1024", "model.intermediate_size=2816", "model.num_layers=8"],
            device="cuda",
        )
        peaks[tier] = torch.cuda.max_memory_allocated() - before
    num_layer_parameters = 8 * (3 * 1024 * 2816 + 2 * 1024 * 1024)
    assert peaks["none"] - peaks["ssd"] > 6 * num_layer_parameters  # of AdamW's 8 bytes each
