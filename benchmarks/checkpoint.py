"""Claim: windlass's checkpoints in memory cost training less than those of the peers.

`python benchmarks/checkpoint.py` trains one Llama of 64M parameters (windlass's, ZeRO-3, fused AdamW, float32) on two
gloo ranks of one thread each, without checkpoints and with one every second step, saved in several ways:

- `torch.save`: each rank its part of all tensors. Nothing waits for the disk, so it may still be in the page cache.
- `dcp`, `dcp-thread`, `dcp-process`: `torch.distributed.checkpoint.save` and `async_save`. They sync their files.
  An asynchronous save waits for the one before, as its users do; that wait counts as blocking.
- `durable`: windlass's `checkpoint=durable`. Synced, and checksummed.
- `lazy`: copied behind the next forward and backward pass into the memory of a snapshot agent, which writes it.
- `erasure`: the same copy, kept in memory with one parity shard; each rank is a node of its own, and any may be lost.
  The only way here whose checkpoints are not on the disk. Neither waits for the checkpoint before: where that is not
  done they skip one, and count it. What still runs at the end of a block counts in their total time.

All ways share one model and one optimizer and take turns in blocks of a few steps, so that whatever else the machine
does hits all alike; each round begins with another one. A block begins with a checkpoint and ends when its last one is
done, two steps later. Between blocks, off the clock, the disk is synced and the peers' files are deleted.

All ratios are taken within a round, to the block without checkpoints. Only figures of one run may be compared.
CPU seconds and bytes written to the disk are those of all processes that this program started, above those of training;
bytes sent are counted for the whole machine. The limit is what a copy of the state in memory takes, in the same round.
Timings are printed and never asserted: the exit code is 0 unless something fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from checkpoint_trainer import SHAPE, Block, Settings, Trainer
from checkpoint_variants import CopyLimit, Variant, build_variant, local_tensors
from common import Spread, describe_machine, filesystem_of, print_json, print_table, run_ranks

from windlass.checkpoint.config import CheckpointKind
from windlass.models.spec import count_parameters
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh

NONE = "none"
ASYNCHRONOUS = ("dcp-thread", "dcp-process")
PEERS = ("torch.save", "dcp", *ASYNCHRONOUS)
WINDLASS = tuple(kind.value for kind in CheckpointKind if kind != CheckpointKind.none)
TOTAL_BAR, TOTAL_AIM, BLOCKING_BAR = 1.15, 1.08, 1.0
"""Of `erasure`: over no checkpoint, and over the asynchronous save of DCP that blocks less."""
WARM_UP_CHECKPOINTS = 2
COPIES_A_ROUND = 3
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


def measure_rank(settings: Settings) -> dict[str, Any]:
    """What each rank runs: its blocks, by way and round, and the seconds of each round's copy."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    mesh = settings.config().parallel.build(torch.device("cpu"))
    trainer = Trainer(settings, mesh)
    limit = CopyLimit(local_tensors(trainer.model, trainer.optimizer))
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if mesh.rank == 0 else (lambda text: None)
    variants: dict[str, Variant] = {}
    shm_bytes: dict[str, int] = {}
    for name in settings.names:
        say(f"warming up: {name}")
        shm_before = _shm_used()
        variants[name] = build_variant(
            name, trainer.model, trainer.optimizer, settings.directory / name, mesh, settings.every
        )
        trainer.run(variants[name], WARM_UP_CHECKPOINTS)
        settle(variants[name], mesh)
        shm_bytes[name] = _shm_used() - shm_before
    blocks: dict[str, list[Block]] = {name: [] for name in variants}
    copies: list[float] = []
    for round_number in range(settings.rounds):
        first = round_number % len(variants)
        for name in settings.names[first:] + settings.names[:first]:
            blocks[name].append(trainer.run(variants[name], settings.block_checkpoints))
            settle(variants[name], mesh)
        copies.append(statistics.median(limit.measure() for _ in range(COPIES_A_ROUND)))
        latest = "  ".join(f"{name} {blocks[name][-1].wall_s:.1f} s" for name in settings.names)
        say(f"round {round_number + 1}/{settings.rounds}: {latest}  copy {copies[-1]:.3f} s")
    state_bytes = sum(all_gather_object(limit.num_bytes, mesh.world))
    for variant in variants.values():
        variant.close()
    num_parameters = count_parameters(trainer.model)
    mesh.stop()
    return {
        "blocks": blocks,
        "copies": copies,
        "shm_bytes": shm_bytes,
        "on_disk": {name: variant.on_disk for name, variant in variants.items()},
        "state_bytes": state_bytes,
        "num_parameters": num_parameters,
    }


def settle(variant: Variant, mesh: Mesh) -> None:
    """Lets no block pay for what another has left to the kernel."""
    mesh.barrier()
    variant.delete()
    if mesh.rank == 0:
        os.sync()
    mesh.barrier()


def _shm_used() -> int:
    return psutil.disk_usage("/dev/shm").used


def summarize(settings: Settings, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of each way, with their ranges over the rounds.

    Raises:
        RuntimeError: a way wrote less than the state, so it is not what it claims to be.
    """
    plain = outcomes[0]["blocks"][NONE]
    copy_s = [max(of_ranks) for of_ranks in zip(*(outcome["copies"] for outcome in outcomes), strict=True)]
    plain_step_s = [statistics.median(block.step_s) for block in plain]
    limits = [1 + copy / (settings.every * step) for copy, step in zip(copy_s, plain_step_s, strict=True)]
    state_bytes = outcomes[0]["state_bytes"]
    rows = {
        name: _row([outcome["blocks"][name] for outcome in outcomes], plain, plain_step_s, settings.block_checkpoints)
        for name in settings.names
    }
    for name, row in rows.items():
        row["shm_bytes"] = outcomes[0]["shm_bytes"][name]
        taken = 1 - row["num_skipped"] / row["num_checkpoints"]
        if outcomes[0]["on_disk"][name] and row["mean_disk_bytes"] < taken * state_bytes:
            raise RuntimeError(
                f"{name} wrote {row['mean_disk_bytes']:.0f} bytes a checkpoint of a state of {state_bytes}"
            )
    blocking = {
        name: blocking_s([outcome["blocks"][name] for outcome in outcomes], settings.block_checkpoints)
        for name in settings.names
    }
    asynchronous = [blocking[name] for name in ASYNCHRONOUS if name in blocking]
    for name, row in rows.items():
        if name == NONE:
            continue
        pairs = zip(blocking[name], *asynchronous, strict=True)
        row["blocking_over_async"] = (
            Spread.of([mine / min(theirs) for mine, *theirs in pairs]).to_dict() if asynchronous else None
        )
    return {
        "machine": describe_machine(),
        "num_ranks": settings.num_ranks,
        "shape": SHAPE | {"batch_size": settings.batch_size, "seq_len": settings.seq_len},
        "num_parameters": outcomes[0]["num_parameters"],
        "state_bytes": state_bytes,
        "every": settings.every,
        "block_checkpoints": settings.block_checkpoints,
        "rounds": settings.rounds,
        "filesystem": filesystem_of(settings.directory),
        "step_s": Spread.of(plain_step_s).to_dict(),
        "step_cpu_s": Spread.of([block.used.cpu_s / len(block.step_s) for block in plain if block.used]).to_dict(),
        "copy_s": Spread.of(copy_s).to_dict(),
        "limit_ratio": Spread.of(limits).to_dict(),
        "ways": rows,
    }


def _row(of_ranks: Sequence[Sequence[Block]], plain: Sequence[Block], plain_step_s: Sequence[float], count: int) -> Any:
    """One way's figures; `of_ranks[rank][round]`."""
    mine = of_ranks[0]  # all ranks begin and end a block together
    slowed = [
        statistics.median(while_busy) / step_s
        for block, step_s in zip(mine, plain_step_s, strict=True)
        if (while_busy := [s for s, is_busy in zip(block.step_s, block.busy, strict=True) if is_busy])
    ]
    used = [
        mine_block.used.since(plain_block.used)
        for mine_block, plain_block in zip(mine, plain, strict=True)
        if mine_block.used is not None and plain_block.used is not None
    ]
    return {
        "total_ratio": Spread.of([a.wall_s / b.wall_s for a, b in zip(mine, plain, strict=True)]).to_dict(),
        "blocking_s": Spread.of(blocking_s(of_ranks, count)).to_dict(),
        "busy_step_ratio": Spread.of(slowed).to_dict() if slowed else None,
        "busy_steps": sum(sum(block.busy) for block in mine) / sum(len(block.busy) for block in mine),
        "cpu_s": Spread.of([use.cpu_s / count for use in used]).to_dict(),
        "disk_bytes": Spread.of([use.disk_bytes / count for use in used]).to_dict(),
        "mean_disk_bytes": statistics.mean(use.disk_bytes / count for use in used),
        "sent_bytes": Spread.of([use.sent_bytes / count for use in used]).to_dict(),
        "num_skipped": sum(block.num_skipped for block in mine),
        "num_checkpoints": count * len(mine),
    }


def blocking_s(of_ranks: Sequence[Sequence[Block]], count: int) -> list[float]:
    """Seconds a checkpoint that the slowest rank waited, by round; `of_ranks[rank][round]`."""
    return [max(block.blocking_s for block in turn) / count for turn in zip(*of_ranks, strict=True)]


def print_summary(result: dict[str, Any]) -> None:
    machine, shape = result["machine"], result["shape"]
    print(
        f"\n{result['num_parameters'] / 1e6:.1f}M parameters, state {result['state_bytes'] / 1e6:.0f} MB in all, "
        f"{result['num_ranks']} gloo ranks of 1 thread; a checkpoint every {result['every']} steps, "
        f"{result['rounds']} rounds of {result['block_checkpoints']} checkpoints each, taking turns"
    )
    print(", ".join(f"{key} {value}" for key, value in shape.items()))
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}")
    print(
        f"checkpoints on {result['filesystem']}; a step {Spread(**result['step_s']).text('.3f')} s, "
        f"{Spread(**result['step_cpu_s']).text('.3f')} CPU s of all ranks"
    )
    print(
        f"limit: a copy of the state in memory, {Spread(**result['copy_s']).text('.3f')} s a checkpoint, would make "
        f"total time {Spread(**result['limit_ratio']).text('.3f')}\n"
    )
    header = ["way", "total time", "blocking s", "step while it saves", "such steps", "CPU s"]
    header += ["disk MB", "sent MB", "shm held MB", "skipped"]
    rows = []
    for name, row in result["ways"].items():
        if name == NONE:
            continue
        slowed = Spread(**row["busy_step_ratio"]).text(".2f") + "x" if row["busy_step_ratio"] else ""
        rows.append(
            [
                name,
                Spread(**row["total_ratio"]).text(".3f") + "x",
                Spread(**row["blocking_s"]).text(".3f"),
                slowed,
                f"{100 * row['busy_steps']:.0f} %",
                Spread(**row["cpu_s"]).text(".2f"),
                *(f"{row[key]['median'] / 1e6:,.0f}" for key in ("disk_bytes", "sent_bytes")),
                f"{row['shm_bytes'] / 1e6:,.0f}",
                f"{row['num_skipped']}/{row['num_checkpoints']}",
            ]
        )
    print_table(header, rows)
    print(
        "\nmedian (lowest..highest) over rounds; seconds and MB are a checkpoint's. Total time and steps are over those"
        "\nwithout checkpoints; CPU, disk and sent are what is above theirs. Blocking is of the slowest rank. Sent is"
        "\nwhat went through the loopback interface, and shm held by how much fuller /dev/shm is once the way has"
        "\nsaved: other programs of the machine count in both."
    )
    print_bars(result["ways"].get("erasure"))


def print_bars(erasure: dict[str, Any] | None) -> None:
    if erasure is None:
        return
    total, blocking = erasure["total_ratio"]["median"], erasure["blocking_over_async"]
    held = "met" if total <= TOTAL_BAR else "MISSED"
    print(f"erasure: total {total:.3f}x, bar <= {TOTAL_BAR:.2f}x {held} (aim {TOTAL_AIM:.2f}x)")
    if blocking is not None:
        held = "met" if blocking["median"] <= BLOCKING_BAR else "MISSED"
        spread = Spread(**blocking).text(".2f")
        print(f"erasure: blocks {spread} times as long as DCP's asynchronous save, bar <= {BLOCKING_BAR:.0f}x {held}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks (2)")
    parser.add_argument("--every", type=int, default=2, help="steps from one checkpoint to the next (2)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a rank (1)")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--block-checkpoints", type=int, default=4, help="of one way before the next (4)")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each way that count (9)")
    parser.add_argument("--only", nargs="+", choices=(*PEERS, *WINDLASS), default=(*PEERS, *WINDLASS), metavar="WAY")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where the checkpoints go, on a disk (runs)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 checkpoints: to see that all works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    if options.ranks < 2:
        parser.error("--ranks must be at least 2: a checkpoint of one rank has no peer")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    if filesystem_of(options.dir) in MEMORY_FILESYSTEMS:
        print(f"{options.dir.resolve()} is in memory: name a folder on a disk with --dir", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="windlass-benchmark-", dir=options.dir)).resolve()
    settings = Settings(
        num_ranks=options.ranks,
        names=(NONE, *options.only),
        every=options.every,
        block_checkpoints=2 if options.quick else options.block_checkpoints,
        rounds=2 if options.quick else options.rounds,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        directory=directory,
    )
    try:
        outcomes = run_ranks(measure_rank, options.ranks, settings)
        result = summarize(settings, outcomes)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        print_json(result)
    else:
        print_summary(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
