"""Claim: windlass's whole loop is as fast as what one would write by hand, and as DeepSpeed.

`python benchmarks/loop.py` trains one Llama in several ways, in blocks of a few steps that take turns in the same rank
processes, so that whatever else the machine does hits all of them alike:

- `windlass`: `windlass.train.loop.train` itself on a real run: prepared text, prefetch, schedule, the vote on finite
  gradients, exact token counts, metrics written to a run folder; `parallel=zero3`, or `none` on one rank.
- `fsdp2` (bars: windlass >= 0.97x): `fully_shard` on each block and the root as in PyTorch's tutorial, random tokens
  that are in memory already, and nothing else. On one rank `plain`: PyTorch without FSDP.
- `deepspeed` (bar: windlass >= 1.0x): DeepSpeed's engine, ZeRO-3 with its defaults, on the same tokens as `fsdp2`. By
  default it keeps small models whole from forward to backward; `deepspeed-strict` frees weights after each use as the
  other two do. Its gradients in bfloat16 travel in bfloat16, those of the others in float32.

All have the same model class, shapes, dtype, fused AdamW and clipping at norm 1. Before any timing, all train the same
real tokens from the same weights in float32 for three steps, and their losses must agree to 1e-4.

Only ratios of one run count, and on a machine with other programs only those over many rounds. CPU seconds, which
waiting does not add to, are compared beside wall time: they say how much work a variant is. Timings are printed and
never asserted: the exit code is 0 unless something fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Spread, describe_machine, num_cores, print_json, print_table, run_ranks
from loop_variants import (
    MAX_NORM,
    Variant,
    Windlass,
    flops_per_token,
    peer,
    real_batches,
    synthetic_batches,
    whole_model,
)

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.data.prepare import prepared_folder
from windlass.machine.peak_flops import peak_device_flops
from windlass.models.spec import count_parameters
from windlass.parallel.mesh import Mesh

LOSS_TOLERANCE = 1e-4
CHECK_STEPS = 3
BARS = {"plain": 0.97, "fsdp2": 0.97, "deepspeed": 1.0}
"""windlass's tokens/s over that of the peer, at least."""
PEER_NAMES = {"plain": "bare PyTorch loop", "fsdp2": "bare FSDP2 loop", "deepspeed": "DeepSpeed ZeRO-3"}

SHAPES = {
    # hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads
    "small": (256, 688, 6, 8, 4),
    "medium": (384, 1024, 6, 12, 4),
    "30m": (512, 1376, 10, 8, 8),
}
SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class Settings:
    """What one comparison is of; the same for each variant."""

    num_ranks: int
    overrides: tuple[str, ...]
    """Of windlass's configuration; the peers take their shapes, dtype and optimizer from it too."""
    also: tuple[str, ...]
    """Further overrides, each of which makes one more windlass variant."""
    peers: tuple[str, ...]
    block_steps: int
    rounds: int
    work_dir: Path

    def config(self, name: str, *overrides: str) -> Config:
        run_dir = f"run_dir={self.work_dir / name}"
        return compose([*self.overrides, *overrides, run_dir])


def check_losses(settings: Settings, mesh: Mesh, tokens: Path) -> dict[str, list[float]]:
    """The first losses of every way to train, on the same real tokens, in float32, over all ranks.

    Raises:
        RuntimeError: two of them differ by more than `LOSS_TOLERANCE`.
    """
    overrides = ("train.dtype=float32", "data.borders=none", "train.log_every=1")
    losses: dict[str, list[float]] = {}
    for number, name in enumerate(("windlass", *settings.peers)):
        config = settings.config(f"check-{number}", *overrides)
        batches = real_batches(config, mesh, tokens)
        variant = Windlass(config, mesh, tokens) if name == "windlass" else peer(name, config, mesh, batches)
        found = torch.tensor(variant.run(CHECK_STEPS), dtype=torch.float64)
        if name != "windlass" and mesh.world is not None:  # each rank has the mean of its own tokens
            dist.all_reduce(found)
            found /= mesh.world_size
        losses[name] = found.tolist()
        variant.close()
    for name, values in losses.items():
        apart = max(abs(a - b) for a, b in zip(values, losses["windlass"], strict=True))
        if apart > LOSS_TOLERANCE:
            raise RuntimeError(f"{name} computes something else: losses {values}, windlass {losses['windlass']}")
    return losses


def measure_rank(settings: Settings) -> dict[str, Any]:
    """What each rank runs. Returns wall and CPU seconds a block, by variant and round, among others."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13 has one for each collective of DeepSpeed
    config = settings.config("windlass")
    tokens = prepared_folder(config.data, progress=False)
    mesh = config.parallel.build(torch.device("cpu"))
    if any(name.startswith("deepspeed") for name in settings.peers):
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if mesh.rank == 0 else (lambda text: None)
    say(f"checking that all compute the same, {CHECK_STEPS} steps in float32 ...")
    losses = check_losses(settings, mesh, tokens)
    mesh.barrier()
    peak_flops = peak_device_flops(mesh.device, getattr(torch, config.train.dtype.value)) * mesh.world_size

    variants: dict[str, Variant] = {"windlass": Windlass(config, mesh, tokens)}
    for number, override in enumerate(settings.also):
        other = settings.config(f"also-{number}", *override.split())
        variants[f"windlass {override}"] = Windlass(other, mesh, tokens)
    for name in settings.peers:
        variants[name] = peer(name, config, mesh, synthetic_batches(config, mesh.rank))
    seconds, cpu_seconds = time_blocks(variants, settings, mesh.barrier, say)
    num_parameters = count_parameters(whole_model(config))
    for variant in variants.values():
        variant.close()
    mesh.stop()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "losses": losses,
        "peak_flops": peak_flops,
        "num_parameters": num_parameters,
    }


def time_blocks(
    variants: Mapping[str, Variant], settings: Settings, barrier: Callable[[], None], say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each block. Variants take turns, and each round begins with another one.

    The first round warms up and does not count.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(settings.rounds + 1):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            barrier()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            variants[name].run(settings.block_steps)
            barrier()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - begin)
                cpu_seconds[name].append(time.process_time() - cpu_begin)
        if round_number > 0:
            latest = "  ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names)
            say(f"round {round_number}/{settings.rounds}: {latest}")
    return seconds, cpu_seconds


def summarize(settings: Settings, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s, MFU and windlass's ratio to each variant, with their ranges over the rounds.

    CPU seconds say how much work a variant is, where other programs make wall time move.
    """
    measured = outcomes[0]  # of rank 0; all ranks begin and end a block together
    cpu_seconds = {
        name: [sum(of_ranks) for of_ranks in zip(*(outcome["cpu_seconds"][name] for outcome in outcomes), strict=True)]
        for name in measured["cpu_seconds"]
    }
    config = settings.config("windlass")
    train_config = config.train
    step_tokens = settings.num_ranks * train_config.batch_size * train_config.seq_len * train_config.grad_accum_steps
    block_tokens = settings.block_steps * step_tokens
    rows = {}
    for name, seconds in measured["seconds"].items():
        rates = [block_tokens / value for value in seconds]
        rows[name] = {
            "tokens_per_s": Spread.of(rates).to_dict(),
            "step_s": Spread.of([value / settings.block_steps for value in seconds]).to_dict(),
            "mfu": Spread.of(rates).median * flops_per_token(config) / measured["peak_flops"],
            "cpu_s_a_step": Spread.of([value / settings.block_steps for value in cpu_seconds[name]]).to_dict(),
            "windlass_cpu_ratio": _ratio(cpu_seconds[name], cpu_seconds["windlass"]),
            "windlass_ratio": _ratio(seconds, measured["seconds"]["windlass"]),
            "bar": BARS.get(name),
        }
    return {
        "machine": describe_machine(),
        "num_ranks": settings.num_ranks,
        "threads_a_rank": max(1, num_cores() // settings.num_ranks),
        "shape": _shape(config),
        "overrides": list(settings.overrides),
        "num_parameters": measured["num_parameters"],
        "tokens_a_step": step_tokens,
        "block_steps": settings.block_steps,
        "rounds": settings.rounds,
        "peak_flops": measured["peak_flops"],
        "flops_per_token": flops_per_token(config),
        "first_losses": measured["losses"],
        "variants": rows,
    }


def _shape(config: Config) -> dict[str, Any]:
    """What decides how much work a step is."""
    model, of_train = config.model, config.train
    return {
        **{key: getattr(model, key) for key in (*SHAPE_KEYS, "vocab_size", "tie_embeddings")},
        **{key: getattr(of_train, key) for key in ("batch_size", "seq_len", "grad_accum_steps")},
        "dtype": of_train.dtype.value,
    }


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast we are, by round."""
    return Spread.of([their / our for their, our in zip(theirs, ours, strict=True)]).to_dict()


def print_summary(result: dict[str, Any], missing: Sequence[str]) -> None:
    machine = result["machine"]
    print(
        f"\n{result['num_parameters'] / 1e6:.1f}M parameters, {result['tokens_a_step']} tokens a step, "
        f"{result['num_ranks']} gloo ranks of {result['threads_a_rank']} threads; "
        f"{result['rounds']} rounds of {result['block_steps']} steps each, taking turns"
    )
    print(", ".join(f"{key} {value}" for key, value in result["shape"].items()))
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}")
    limit = result["peak_flops"] / result["flops_per_token"]
    print(
        f"limit: matrix products of this machine, {result['peak_flops'] / 1e9:,.0f} GFLOP/s = {limit:,.0f} tokens/s at "
        f"{result['flops_per_token'] / 1e6:.1f} MFLOP a token\n"
    )
    rows = []
    for name, row in result["variants"].items():
        ratio = "1" if name == "windlass" else Spread(**row["windlass_ratio"]).text(".3f")
        bar = _bar_text(name)
        rate, step = Spread(**row["tokens_per_s"]).text(",.0f"), f"{row['step_s']['median'] * 1e3:,.0f}"
        cpu = f"{row['cpu_s_a_step']['median'] * 1e3:,.0f}"
        cpu_ratio = "1" if name == "windlass" else f"{row['windlass_cpu_ratio']['median']:.3f}"
        rows.append([name, rate, step, f"{100 * row['mfu']:.1f} %", cpu, cpu_ratio, ratio, bar])
    for name in missing:
        rows.append([name, "not installed (pip install deepspeed)", *[""] * 5, _bar_text(name)])
    header = ["variant", "tokens/s", "ms/step", "MFU", "CPU ms/step", "by CPU", "windlass over it", "bar"]
    print_table(header, rows)
    print("\nmedian (lowest..highest) over rounds; ratios are taken within a round. CPU is that of all ranks together.")
    print(f"First {CHECK_STEPS} losses in float32:")
    for name, losses in result["first_losses"].items():
        print(f"  {name:16} {'  '.join(f'{loss:.6f}' for loss in losses)}")


def _bar_text(name: str) -> str:
    return f">= {BARS[name]:.2f}x {PEER_NAMES[name]}" if name in BARS else ""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks (2)")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="about 4M, 10M or 32M parameters (small)")
    parser.add_argument("--untied", action="store_true", help="an output matrix of its own, not the embedding's")
    parser.add_argument("--vocab-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a rank and micro-step (4)")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--block-steps", type=int, default=2, help="steps of one variant before the next (2)")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each variant that count (30)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration of all variants")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="KEY=VALUE", help="a further windlass row each, e.g. parallel.cut=dim0"
    )
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--strict-deepspeed", action="store_true", help="a further row, see above")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    peers, missing = ["fsdp2" if options.ranks > 1 else "plain"], []
    if not options.no_deepspeed:
        wanted = ["deepspeed"] + ["deepspeed-strict"] * options.strict_deepspeed
        (peers if importlib.util.find_spec("deepspeed") else missing).extend(wanted)
    work_dir = Path(tempfile.mkdtemp(prefix="windlass-benchmark-"))
    settings = Settings(
        num_ranks=options.ranks,
        overrides=(
            *(f"model.{key}={value}" for key, value in zip(SHAPE_KEYS, SHAPES[options.shape], strict=True)),
            f"model.vocab_size={options.vocab_size}",
            f"model.tie_embeddings={str(not options.untied).lower()}",
            f"parallel={'zero3' if options.ranks > 1 else 'none'}",
            "data=stdlib",
            "checkpoint=none",
            "optim=adamw",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "optim.lr=1e-3",
            "optim.weight_decay=0.0",  # the peers' loops have one group of parameters
            "train.steps=1000000000",
            f"train.batch_size={options.batch_size}",
            f"train.seq_len={options.seq_len}",
            f"train.grad_accum_steps={options.grad_accum_steps}",
            f"train.max_norm={MAX_NORM}",
            f"train.dtype={options.dtype}",
            "train.eval_every=0",
            "train.device=cpu",
            "metrics.console=plain",
            "metrics.peak_flops=1e12",
            *options.set,
        ),
        also=tuple(options.also),
        peers=tuple(peers),
        block_steps=options.block_steps,
        rounds=options.rounds,
        work_dir=work_dir,
    )
    try:
        prepared_folder(settings.config("windlass").data, progress=True)
        outcomes = run_ranks(measure_rank, options.ranks, settings)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    result = summarize(settings, outcomes)
    result["not_installed"] = missing
    if options.json:
        print_json(result)
    else:
        print_summary(result, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
