"""Claim: a checkpoint of optimizer state on the SSD pins the state's files, and blocks 5% of what copying them would.

    python benchmarks/checkpoint_offload.py [--folder PATH] [--rounds 5] [--matrices 24] [--width 2048] [--tokens 256]

One process trains a stack of matrices with fused AdamW, whose state is on the disk and whose weights are in memory, and
saves them in several ways, which take turns:

- `copied`: all that a checkpoint holds is read, hashed and written while training waits, as without a tier to pin.
- `durable`: weights are written while training waits, state is pinned.
- `lazy`: state is pinned, and weights are written during the next forward and backward pass.

A block is a snapshot and the two steps after it. Blocking is what the loop waits in `snapshot` and `wait_staged`; the
slowdown of a block is to one without a checkpoint in the same round, and has in it what still runs beside the training.
Between blocks, off the clock, the checkpoint is committed. Then the state alone, without the weights: what it takes to
pin its files, and to copy them. Ratios are taken within a round; what steps have written is on the disk before each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Spread, describe_machine, filesystem_of, print_json, print_table
from torch import nn

from windlass.checkpoint import Checkpointer
from windlass.checkpoint.pieces import PieceGroup, put_groups
from windlass.checkpoint.pinned_saver import pinned
from windlass.offload import OffloadedOptimizer, offload_optimizer

NONE, COPIED, DURABLE, LAZY = "none", "copied", "durable", "lazy"
WAYS = (NONE, COPIED, DURABLE, LAZY)
BAR = 0.05
NUM_STEPS = 2


@dataclass
class Block:
    blocking_s: float = 0.0
    seconds: float = 0.0
    committed_s: float = 0.0
    """From the snapshot on."""


@dataclass
class Trainer:
    """The model, its offloaded optimizer, and a checkpointer a way."""

    folder: Path
    num_matrices: int
    width: int
    num_tokens: int
    step: int = 0
    checkpointers: dict[str, Checkpointer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(self.width, self.width, bias=False) for _ in range(self.num_matrices))
        self.model = nn.Sequential(*layers)
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.optimizer: OffloadedOptimizer = offload_optimizer(inner, dir=self.folder / "tier")
        objects = {"model": self.model, "optimizer": self.optimizer}
        for way in WAYS[1:]:
            kind = LAZY if way == LAZY else DURABLE
            self.checkpointers[way] = Checkpointer(objects, self.folder / way, kind=kind, keep=1)
        copied = self.checkpointers[COPIED]
        assert copied.pinned_saver is not None
        copied.pinned_saver.close()
        copied.pinned_saver = None  # state is then copied, as where it cannot be pinned

    def train(self, checkpointer: Checkpointer | None) -> float:
        """One step; what it waited for the snapshot."""
        self.model(torch.randn(self.num_tokens, self.width)).square().mean().backward()
        begin = time.perf_counter()
        if checkpointer is not None:
            checkpointer.wait_staged()
        waited = time.perf_counter() - begin
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return waited

    def rest(self) -> None:
        """Until what was written last is on the disk."""
        self.optimizer.state_at_rest()
        for parameter in self.model.parameters():
            with self.optimizer.state_loaded(parameter):
                pass
        os.sync()

    def block(self, way: str) -> Block:
        self.rest()
        checkpointer = self.checkpointers.get(way)
        block = Block()
        begin = time.perf_counter()
        if checkpointer is not None:
            checkpointer.snapshot(self.step)
            block.blocking_s = time.perf_counter() - begin
        saved = self.step
        for _ in range(NUM_STEPS):
            block.blocking_s += self.train(checkpointer)
        block.seconds = time.perf_counter() - begin
        if checkpointer is not None:
            if checkpointer.pinned_saver is not None:
                checkpointer.pinned_saver.finish()
            block.committed_s = block.blocking_s if checkpointer.pinned_saver is None else time.perf_counter() - begin
            assert checkpointer.store.latest_step() == saved
        return block

    def state_alone(self, way: str) -> float:
        """Seconds to pin the state's files, or to copy them into chunks."""
        self.rest()
        checkpointer = self.checkpointers[way]
        if way == COPIED:
            begin = time.perf_counter()
            put_groups(checkpointer.store, state_groups(checkpointer))
            seconds = time.perf_counter() - begin
            checkpointer.store.remove_leftovers()
            return seconds
        begin = time.perf_counter()
        pins = [pinned(group) for group in state_groups(checkpointer)]
        seconds = time.perf_counter() - begin
        for found in pins:
            assert found is not None
            found[0].release()
        return seconds


def state_groups(checkpointer: Checkpointer) -> list[PieceGroup]:
    return [group for group in checkpointer.objects.groups() if group.in_file is not None]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    trainer = Trainer(folder, arguments.matrices, arguments.width, arguments.tokens)
    for way in WAYS:
        trainer.train(None)
        trainer.block(way)  # makes files, folders and buffers
    blocks: dict[str, list[Block]] = {way: [] for way in WAYS}
    alone: dict[str, list[float]] = {COPIED: [], DURABLE: []}
    for number in range(arguments.rounds):
        for way in [*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]]:
            blocks[way].append(trainer.block(way))
        for way in (COPIED, DURABLE) if number % 2 else (DURABLE, COPIED):
            trainer.train(None)
            alone[way].append(trainer.state_alone(way))
    state_bytes = sum(trainer.optimizer.state_bytes().values())
    weight_bytes = sum(parameter.nbytes for parameter in trainer.model.parameters())
    for checkpointer in trainer.checkpointers.values():
        checkpointer.close()
    trainer.optimizer.close()
    rows = {
        way: {
            "blocking_s": Spread.of([block.blocking_s for block in found]).to_dict(),
            "to_copied": Spread.of(ratios(found, blocks[COPIED], "blocking_s")).to_dict(),
            "block_to_none": Spread.of(ratios(found, blocks[NONE], "seconds")).to_dict(),
            "committed_s": Spread.of([block.committed_s for block in found]).to_dict(),
        }
        for way, found in blocks.items()
    }
    pinned_to_copied = [mine / other for mine, other in zip(alone[DURABLE], alone[COPIED], strict=True)]
    return {
        "machine": describe_machine(),
        "filesystem": filesystem_of(folder),
        "state_bytes": state_bytes,
        "weight_bytes": weight_bytes,
        "step_s": statistics.median(block.seconds for block in blocks[NONE]) / NUM_STEPS,
        "ways": rows,
        "state_alone": {
            "pinned_s": Spread.of(alone[DURABLE]).to_dict(),
            "copied_s": Spread.of(alone[COPIED]).to_dict(),
            "pinned_to_copied": Spread.of(pinned_to_copied).to_dict(),
        },
    }


def ratios(mine: list[Block], others: list[Block], what: str) -> list[float]:
    return [getattr(one, what) / getattr(other, what) for one, other in zip(mine, others, strict=True)]


def spread(values: dict[str, float], spec: str) -> str:
    return Spread(**values).text(spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="windlass-checkpoint-offload-", dir=arguments.folder) as folder:
        result = measure(arguments, Path(folder))
    if arguments.json:
        print_json(result)
        return
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, {result['filesystem']}")
    print(
        f"state {result['state_bytes'] / 1e6:,.0f} MB on the disk, weights {result['weight_bytes'] / 1e6:,.0f} MB in "
        f"memory, a step of {result['step_s']:.2f} s without a checkpoint\n"
    )
    header = ["checkpoint", "blocking s", "to copied", f"snapshot and {NUM_STEPS} steps to none", "committed after s"]
    print_table(
        header,
        [
            [
                way,
                spread(row["blocking_s"], ".3f"),
                spread(row["to_copied"], ".3f"),
                spread(row["block_to_none"], ".2f"),
                spread(row["committed_s"], ".2f"),
            ]
            for way, row in result["ways"].items()
        ],
    )
    alone = result["state_alone"]
    ratio = alone["pinned_to_copied"]["median"]
    print(
        f"\nThe state alone: pinned in {spread(alone['pinned_s'], '.4f')} s, copied in "
        f"{spread(alone['copied_s'], '.3f')} s: {spread(alone['pinned_to_copied'], '.4f')} of it "
        f"(bar {BAR}: {'met' if ratio <= BAR else 'MISSED'})"
    )


if __name__ == "__main__":
    main()
