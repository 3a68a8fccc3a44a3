"""Snapshots of what lies on a GPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from windlass.checkpoint.manager import Checkpointer
from windlass.parallel.config import ParallelConfig, Sharding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer, step: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(step)
    model(torch.randn(16, 2048, device="cuda", generator=generator)).square().mean().backward()
    checkpointer.wait_staged()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def build(directory: Path, shm_dir: Path) -> tuple[nn.Module, torch.optim.Optimizer, Checkpointer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    mesh = ParallelConfig(name=Sharding.none).build(torch.device("cuda"))
    objects = {"model": model, "optimizer": optimizer}
    return model, optimizer, Checkpointer(objects, directory, mesh, kind="erasure", shm_dir=shm_dir)


def test_what_is_copied_behind_the_training_is_the_state_of_its_step(tmp_path: Path) -> None:
    """400 MB, more than the ring holds many times over; the weights move right after each copy has ended."""
    (tmp_path / "shm").mkdir()
    model, optimizer, checkpointer = build(tmp_path / "checkpoints", tmp_path / "shm")
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        train_step(model, optimizer, checkpointer, step)
        if checkpointer.snapshot(step):
            expected = {name: value.clone() for name, value in model.state_dict().items()}
            newest = step
    train_step(model, optimizer, checkpointer, 9)  # nothing of it may be in the snapshot
    events: list[dict] = []
    while not any(event["kind"] == "snapshot_committed" and event["step"] == newest for event in events):
        events += checkpointer.poll()

    again, _, other = build(tmp_path / "checkpoints", tmp_path / "shm")
    restored = other.restore_latest()
    assert restored is not None and (restored.step, restored.source) == (newest, "local_ram")
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name
    other.close()
