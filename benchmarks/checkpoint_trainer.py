"""The loop in which `checkpoint.py` times the ways to save: windlass's model and cut, and random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_variants import Variant
from common import Usage, llama_config
from loop_variants import Tokens, synthetic_batches

from windlass.conf.schema import Config
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.mesh import Mesh
from windlass.train.build import build_parts
from windlass.train.objectives.cross_entropy import cross_entropy_sum

SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_layers": 10, "num_heads": 8}


@dataclass(frozen=True)
class Settings:
    num_ranks: int
    names: tuple[str, ...]
    """Of the ways to save; `none` is the first."""
    every: int
    """Steps from one checkpoint to the next."""
    block_checkpoints: int
    rounds: int
    batch_size: int
    seq_len: int
    directory: Path

    def config(self) -> Config:
        return llama_config(SHAPE, self.batch_size, self.seq_len, self.directory)


@dataclass
class Block:
    """What one rank saw of one way's turn."""

    wall_s: float = 0.0
    blocking_s: float = 0.0
    """That training waited for checkpoints."""
    step_s: list[float] = field(default_factory=list)
    """Of each step, without what it waited for checkpoints."""
    busy: list[bool] = field(default_factory=list)
    """Whether a checkpoint was under way as the step began."""
    num_skipped: int = 0
    used: Usage | None = None
    """Of all processes together; measured by rank 0."""


class Trainer:
    """One rank's model, and its loop with the two lines that save."""

    def __init__(self, settings: Settings, mesh: Mesh) -> None:
        config = settings.config()
        self.mesh, self.every, self.max_norm = mesh, settings.every, config.train.max_norm
        self.parts = build_parts(config, mesh, None)
        self.model, self.optimizer = self.parts.model, self.parts.optimizer
        self.batches: Iterator[Tokens] = synthetic_batches(config, mesh.rank)
        self.num_tokens = settings.num_ranks * settings.batch_size * settings.seq_len
        self.num_steps = 0
        for _ in range(self.every):  # makes the optimizer's state, and checkpoints fall on multiples of `every`
            self.train_step(lambda: None)

    def train_step(self, wait_staged: Callable[[], None]) -> float:
        """One step; returns the seconds that it stood in `wait_staged`."""
        input_ids, labels = next(self.batches)
        self.parts.engine.begin_micro_step(is_last=True)
        loss_sum = self.model(input_ids, None, lambda hidden, head: cross_entropy_sum(hidden, head, labels))
        (loss_sum / self.num_tokens).backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm, self.mesh)
        waited_s = _seconds(wait_staged)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return waited_s

    def run(self, variant: Variant, num_checkpoints: int) -> Block:
        """A turn: a checkpoint, `every` steps, and so on; the last one is waited for."""
        block = Block()
        skipped_before = variant.num_skipped
        self.mesh.barrier()
        usage_before = Usage.now() if self.mesh.rank == 0 else None
        self.mesh.barrier()
        begin = time.perf_counter()
        for _ in range(num_checkpoints):
            block.blocking_s += _seconds(lambda: variant.save(self.num_steps))
            for _ in range(self.every):
                block.busy.append(variant.busy)
                step_begin = time.perf_counter()
                waited_s = self.train_step(variant.wait_staged)
                block.step_s.append(time.perf_counter() - step_begin - waited_s)
                block.blocking_s += waited_s
        finish_s = _seconds(variant.finish)
        if variant.waits_for_previous:
            block.blocking_s += finish_s
        self.mesh.barrier()
        block.wall_s = time.perf_counter() - begin
        block.used = Usage.now().since(usage_before) if usage_before is not None else None
        block.num_skipped = variant.num_skipped - skipped_before
        return block


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
