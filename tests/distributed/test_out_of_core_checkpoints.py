"""Checkpoints of state that several ranks keep on a disk, into and out of other numbers of ranks and of none there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.offloaded import is_pinned
from support.ranks import run_ranks
from support.stored import are_sound
from support.toy import Layout, build, digest, train_steps, whole_weights

from windlass.checkpoint.manager import Checkpointer
from windlass.errors import OffloadError
from windlass.offload.direct_io import Engine
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tier_file import HEADER_BYTES, TierFolder
from windlass.parallel.mesh import Mesh


def toy(sharding: str, optimizer: str = "adamw", num_replicas: int | None = None) -> Layout:
    """Large enough for its matrices to move."""
    return Layout(sharding, hidden_size=128, vocab_size=256, optimizer=optimizer, num_replicas=num_replicas)


class Attempt:
    """One start of a toy run on this rank."""

    def __init__(self, layout: Layout, root: Path, is_offloaded: bool, kind: str = "durable", seed: int = 0) -> None:
        self.layout = layout
        self.mesh: Mesh = layout.parallel_config().build(torch.device("cpu"))
        self.model, self.sharder, self.optimizer = build(layout, self.mesh, seed)
        self.offloaded: OffloadedOptimizer | None = None
        if is_offloaded:
            folder = TierFolder(root / "tier", Engine(), f"rank{self.mesh.rank}")
            units = [list(block.parameters()) for block in self.model.layers]
            self.optimizer = self.offloaded = OffloadedOptimizer(self.optimizer, folder, max_host_bytes=0, order=units)
            self.offloaded.owns_folder = True
        objects = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(objects, root / "checkpoints", self.mesh, kind=kind)

    def train(self, *steps: int) -> list[float]:
        return train_steps(self.layout, self.mesh, self.model, self.sharder, self.optimizer, range(*steps))

    def digests(self) -> tuple[str, str]:
        """Of all weights and of all state, whatever their cut and place. Collective."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            with self.loaded(parameter) as values:
                tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
                for key, value in tensors.items():
                    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                    state[f"{name}.{key}"] = whole.detach().clone()
        return digest(whole_weights(self.model)), digest(state)

    def loaded(self, parameter: torch.Tensor) -> Any:
        if self.offloaded is None:
            return contextlib.nullcontext(self.optimizer.state[parameter])
        return self.offloaded.state_loaded(parameter)

    def end(self) -> None:
        self.checkpointer.close()
        self.mesh.barrier()
        if self.offloaded is not None:
            self.offloaded.close()
        self.mesh.stop()


def save(layout: Layout, root: Path, is_offloaded: bool, kind: str = "durable") -> tuple[str, str]:
    attempt = Attempt(layout, root, is_offloaded, kind)
    attempt.train(0, 1)
    attempt.checkpointer.snapshot(1)
    attempt.checkpointer.wait_staged()
    attempt.train(1, 2)
    attempt.checkpointer.save(2)
    digests = attempt.digests()
    attempt.end()
    return digests


def load(layout: Layout, root: Path, is_offloaded: bool) -> tuple[tuple[str, str], list[float]]:
    """What is restored, and the losses after it."""
    attempt = Attempt(layout, root, is_offloaded, seed=99)
    restored = attempt.checkpointer.restore_latest()
    assert restored is not None and restored.step == 2
    digests = attempt.digests()
    losses = attempt.train(2, 4)
    attempt.end()
    return digests, losses


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [pytest.param("adamw", "durable", marks=pytest.mark.full), ("apollo", "durable"), ("galore", "lazy")],
)
def test_two_ranks_save_from_a_disk_what_any_ranks_restore(tmp_path: Path, optimizer: str, kind: str) -> None:
    layout = toy("zero3", optimizer)
    saved = run_ranks(save, 2, layout, tmp_path, True, kind)[0]
    assert are_sound(tmp_path / "checkpoints")
    (on_disk, losses), _ = run_ranks(load, 2, layout, tmp_path, True)
    (in_memory, losses_in_memory), _ = run_ranks(load, 2, layout, tmp_path, False)
    assert on_disk == in_memory == saved
    assert losses == losses_in_memory
    ((on_one, _),) = run_ranks(load, 1, layout, tmp_path, True)
    assert on_one == saved


@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_ranks_take_to_a_disk_what_was_saved_from_memory(tmp_path: Path, optimizer: str) -> None:
    layout = toy("zero3", optimizer)
    saved = run_ranks(save, 1, layout, tmp_path, False)[0]
    for digests, _ in run_ranks(load, 2, layout, tmp_path, True):
        assert digests == saved


@pytest.mark.parametrize(("layout", "num_ranks"), [(toy("ddp"), 2), (toy("ddp", "apollo"), 2)])
def test_replicas_share_what_there_is_to_save(tmp_path: Path, layout: Layout, num_ranks: int) -> None:
    saved = run_ranks(save, num_ranks, layout, tmp_path, True)[0]
    for digests, _ in run_ranks(load, num_ranks, layout, tmp_path, True):
        assert digests == saved
    linked = [path for path in (tmp_path / "checkpoints" / "chunks").iterdir() if is_pinned(path)]
    assert len(linked) >= 4, "files are pinned, of all ranks, and none is said twice"
    names = [path.stat().st_ino for path in linked]
    assert len(names) == len(set(names))


def fail_on_one_rank(layout: Layout, root: Path) -> tuple[str, list[int]]:
    attempt = Attempt(layout, root, True)
    attempt.train(0, 1)
    attempt.checkpointer.save(1)
    attempt.train(1, 2)
    attempt.digests()  # all is written
    if attempt.mesh.rank == 1:
        assert attempt.offloaded is not None and attempt.offloaded.folder is not None
        path = next(iter(attempt.offloaded.folder.path.glob("*.tier")))
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES + 8192)
            byte = file.read(1)[0]
            file.seek(HEADER_BYTES + 8192)
            file.write(bytes([byte ^ 1]))
    attempt.checkpointer.snapshot(2)
    with pytest.raises(OffloadError) as raised:
        attempt.checkpointer.save(2)
    steps = attempt.checkpointer.store.steps()
    attempt.end()
    return str(raised.value), steps


def test_a_rank_that_cannot_read_its_tier_fails_the_checkpoint_of_all(tmp_path: Path) -> None:
    (first, steps), (second, _) = run_ranks(fail_on_one_rank, 2, toy("zero3"), tmp_path)
    assert first == second and "are not those that were written" in first
    assert steps == [1] and are_sound(tmp_path / "checkpoints")
