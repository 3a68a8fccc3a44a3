"""The same model in RAM, with windlass's state on an SSD, and with DeepSpeed ZeRO-3's on NVMe, in one run.

    python benchmarks/offload.py --dir /data/swap

Every round trains each way in turn, each in a process of its own, on the same tokens from the same weights; windlass's
ways are `windlass train` as a user types it. Every other round takes windlass's in the opposite order, and ratios are
taken within a round, as a machine that others share changes its speed from minute to minute. Bars (the default shape is
that of `offload_peer.py`, 162M parameters):

- a step with the optimizer's state on the SSD takes at most 1.15x one in RAM, at 1.5 times the break-even tokens or
  more: as many as make computing last as long as the SSD's share does (C * kappa / 6; both are measured in this run);
- and at most 0.6x one of DeepSpeed's NVMe offload, at its best settings;
- the peak resident memory is at most 0.5x DeepSpeed's;
- bytes read and written a step are at most 1.02x 8 bytes a parameter each (AdamW's two moments);
- a resumed run has the losses of one that went on, to the bit.

`--streamed` adds windlass with weights on the SSD too. DeepSpeed is measured where it is installed, or in another
environment's Python: `--deepspeed-python /elsewhere/bin/python` (see `offload_peer.py` for what it needs).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Spread, describe_machine, num_cores, print_json, print_table
from offload_peer import build_config, parse_arguments

from windlass.machine.peak_flops import measured_matmul_flops
from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine
from windlass.offload.tier_file import TierFolder

WARMUP_STEPS = 2
BLOCK = 512
"""Bytes of a block in `ru_inblock` and `ru_oublock`."""
BARS = {"over_ram": 1.15, "over_deepspeed": 0.6, "rss_over_deepspeed": 0.5, "traffic": 1.02, "break_even": 1.5}
DEEPSPEED_SETTINGS = ("overlap", "lean")


@dataclass
class Way:
    """What was seen of one way to train, over the rounds."""

    step_s: list[float] = field(default_factory=list)
    """The median of each round."""
    peak_rss_bytes: int = 0
    read_bytes: float = 0.0
    """A step."""
    write_bytes: float = 0.0
    stall_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    resume_difference: float | None = None

    def over(self, other: Way) -> Spread:
        """Of steps, round by round."""
        return Spread.of([own / theirs for own, theirs in zip(self.step_s, other.step_s, strict=True)])


def median(values: Sequence[float]) -> float:
    return Spread.of(values).median


def windlass(options: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Runs `windlass train`; its metrics, a dict a step, and its peak RSS."""
    command = [sys.executable, "-m", "windlass.cli", "train", *train_overrides(options, folder), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("train/loss") is not None], usage.ru_maxrss * 1024


def train_overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    """The run that `offload_peer.build_config` describes, as overrides."""
    return [
        *(
            f"model.{key}={getattr(options, key)}"
            for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
        ),
        f"model.num_kv_heads={options.num_heads}",
        f"model.tie_embeddings={str(options.tied).lower()}",
        *("parallel=none", "data=stdlib", "data.borders=none", "optim=adamw", "optim.schedule=constant"),
        *("optim.warmup_steps=0", "optim.lr=1e-3", "optim.weight_decay=0.0"),
        *(f"train.batch_size={options.batch_size}", f"train.seq_len={options.seq_len}"),
        f"train.grad_accum_steps={options.grad_accum_steps}",
        *("train.max_norm=1.0", f"train.dtype={options.dtype}", "train.device=cpu", "train.log_every=1"),
        *("train.eval_every=0", "train.eval_samples=1", "metrics.peak_flops=1e12", f"run_dir={folder}"),
    ]


def measure_windlass(options: argparse.Namespace, way: Way, overrides: Sequence[str], folder: Path) -> None:
    lines, peak = windlass(options, folder / "run", [*overrides, "checkpoint=none", f"train.steps={options.steps}"])
    steps = lines[WARMUP_STEPS:]
    way.step_s.append(median([line["throughput/step_s"] for line in steps]))
    way.peak_rss_bytes = max(way.peak_rss_bytes, peak)
    way.losses = [line["train/loss"] for line in lines]
    way.read_bytes = median([line.get("offload/read_bytes") or 0 for line in steps])
    way.write_bytes = median([line.get("offload/write_bytes") or 0 for line in steps])
    way.stall_s = median([line.get("offload/stall_s") or 0.0 for line in steps])


def check_windlass_resume(options: argparse.Namespace, way: Way, overrides: Sequence[str], folder: Path) -> None:
    """Trains half of the steps, and then the other half in a new process."""
    middle = options.steps // 2
    saving = [*overrides, "checkpoint=durable", "checkpoint.persist_every=1000000", "resume=auto"]
    windlass(options, folder / "resumed", [*saving, f"train.steps={middle}"])
    lines, _ = windlass(options, folder / "resumed", [*saving, f"train.steps={options.steps}"])
    resumed = [line["train/loss"] for line in lines][middle:]
    way.resume_difference = max(abs(a - b) for a, b in zip(way.losses[middle:], resumed, strict=True))


def measure_deepspeed(options: argparse.Namespace, way: Way, settings: str, folder: Path, resume: bool) -> bool:
    """False where DeepSpeed is not installed."""
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size", "seq_len", "batch_size")
    more = ("grad_accum_steps", "steps", "threads", "dtype")
    command = [str(options.deepspeed_python), str(Path(__file__).with_name("offload_peer.py")), "--data", "text"]
    command += [part for key in (*shape, *more) for part in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
    command += ["--dir", str(folder), "--settings", settings, *(["--tied"] if options.tied else [])]
    done = subprocess.run(
        [*command, *(["--resume-check"] if resume else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout)
    if "not_installed" in result:
        return False
    way.step_s.append(median(result["step_s"][WARMUP_STEPS:]))
    way.peak_rss_bytes = max(way.peak_rss_bytes, result["peak_rss_bytes"])
    way.losses = result["losses"]
    way.read_bytes, way.write_bytes = median(result["read_bytes"]), median(result["write_bytes"])
    if resume:
        way.resume_difference = result["resume"]["largest_difference"]
    return True


def ssd_seconds_per_byte(folder: Path) -> tuple[float, float]:
    """(read, write) of this disk now, past the page cache, as tiers do it."""
    size = 256 << 20
    engine = Engine()
    tier, arena = TierFolder(folder, engine, "speed"), Arena(size)
    buffer = arena.allocate(size)
    buffer.data.random_(0, 255)
    file = tier.create(size)
    found: dict[str, list[float]] = {"read": [], "write": []}
    for _ in range(5):
        for name, move in (("write", file.write), ("read", file.read)):
            begin = time.perf_counter()
            move(buffer.data).wait()
            found[name].append((time.perf_counter() - begin) / size)
    tier.close()
    engine.close()
    return median(found["read"]), median(found["write"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streamed", action="store_true", help="also windlass with its weights on the SSD")
    parser.add_argument("--no-resume", action="store_true", help="leave the check of resumed runs out")
    parser.add_argument("--deepspeed-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--json", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    options = parse_arguments(rest)
    for key, value in vars(own).items():
        setattr(options, key, value)
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    options.dir.mkdir(parents=True, exist_ok=True)
    ssd = ["offload=ssd", f"offload.dir={options.dir}"]
    ours = {"windlass, RAM": [], "windlass, SSD": ssd}
    if options.streamed:
        ours["windlass, all on SSD"] = [*ssd, "offload.weights=streamed"]
    peers = {f"DeepSpeed NVMe, {name}": name for name in DEEPSPEED_SETTINGS}
    ways = {name: Way() for name in (*ours, *peers)}
    flops, read_s, write_s = [], [], []
    for number in range(options.rounds):
        flops.append(measured_matmul_flops(torch.device("cpu"), getattr(torch, options.dtype)))
        of_read, of_write = ssd_seconds_per_byte(options.dir)
        read_s.append(of_read)
        write_s.append(of_write)
        is_first = number == 0 and not options.no_resume
        turn = 1 if number % 2 == 0 else -1
        for name, overrides in list(ours.items())[::turn]:
            with tempfile.TemporaryDirectory(prefix="windlass-benchmark-", dir=options.dir) as folder:
                measure_windlass(options, ways[name], overrides, Path(folder))
                if is_first and name != "windlass, RAM":
                    check_windlass_resume(options, ways[name], overrides, Path(folder))
        for name, settings in list(peers.items()):
            with tempfile.TemporaryDirectory(prefix="windlass-benchmark-", dir=options.dir) as folder:
                if not measure_deepspeed(options, ways[name], settings, Path(folder), is_first):
                    print("DeepSpeed is not installed: see --help", file=sys.stderr)
                    for other in peers:
                        del ways[other]
                    peers = {}
                    break
    report(options, ways, median(flops), median(read_s), median(write_s))
    return 0


def report(options: argparse.Namespace, ways: dict[str, Way], flops: float, read_s: float, write_s: float) -> None:
    config = build_config(options, Path("unused"))
    num_parameters = sum(parameter.numel() for parameter in config.model.build().parameters())
    tokens = options.batch_size * options.seq_len * options.grad_accum_steps
    kappa = 8 * (read_s + write_s)
    break_even = flops * kappa / 6
    ram = ways["windlass, RAM"]
    deepspeed = [way for name, way in ways.items() if name.startswith("DeepSpeed")]
    fastest = min(deepspeed, key=lambda way: median(way.step_s), default=None)
    leanest = min((way.peak_rss_bytes for way in deepspeed), default=None)
    rows, results = [], {}
    for name, way in ways.items():
        step = Spread.of(way.step_s)
        traffic = max(way.read_bytes, way.write_bytes) / (8 * num_parameters)
        results[name] = {
            "step_s": step.to_dict(),
            "over_ram": way.over(ram).to_dict(),
            "over_deepspeed": None if fastest is None else way.over(fastest).to_dict(),
            "peak_rss_bytes": way.peak_rss_bytes,
            "rss_over_deepspeed": None if leanest is None else way.peak_rss_bytes / leanest,
            "read_bytes": way.read_bytes,
            "write_bytes": way.write_bytes,
            "traffic_over_8_bytes": traffic,
            "stall_s": way.stall_s,
            "resume_difference": way.resume_difference,
            "last_loss": way.losses[-1],
        }
        rows.append(
            [
                name,
                step.text(".2f"),
                way.over(ram).text(".2f"),
                "" if fastest is None else way.over(fastest).text(".2f"),
                f"{way.peak_rss_bytes / 2**30:.2f}",
                f"{way.read_bytes / num_parameters:.2f}",
                f"{way.write_bytes / num_parameters:.2f}",
                f"{way.stall_s:.2f}",
                "" if way.resume_difference is None else f"{way.resume_difference:.1e}",
            ]
        )
    if options.json:
        print_json({"machine": describe_machine(), "tokens": tokens, "break_even": break_even, "ways": results})
        return
    machine = describe_machine()
    print(f"{machine['cpu']}, {num_cores()} cores, load {machine['load_1min']}, torch {machine['torch']}")
    print(f"{num_parameters:,} parameters, {options.dtype}, {tokens} tokens a step, {options.rounds} rounds\n")
    header = ("way", "step s", "/ RAM", "/ DeepSpeed", "peak GiB", "read B/param", "written", "stall s", "resume diff")
    print_table(header, rows)
    print(
        f"\nbreak-even {break_even:.0f} tokens a step ({flops / 1e9:.0f} GFLOP/s, {kappa * 1e9:.1f} ns of SSD a "
        f"parameter: {1e-9 / read_s:.2f} GB/s read, {1e-9 / write_s:.2f} written); this run has "
        f"{tokens / break_even:.1f}x (bar: at least {BARS['break_even']}x)"
    )
    ours = results["windlass, SSD"]
    print(f"step over RAM {ours['over_ram']['median']:.3f} (bar {BARS['over_ram']})")
    if ours["over_deepspeed"] is not None:
        print(f"step over DeepSpeed's fastest {ours['over_deepspeed']['median']:.3f} (bar {BARS['over_deepspeed']})")
        print(f"peak RSS over DeepSpeed's leanest {ours['rss_over_deepspeed']:.3f} (bar {BARS['rss_over_deepspeed']})")
    print(f"bytes over 8 a parameter {ours['traffic_over_8_bytes']:.3f} (bar {BARS['traffic']})")
    identical = ways["windlass, SSD"].losses == ways["windlass, RAM"].losses
    print(f"losses of windlass on SSD and in RAM are {'equal to the bit' if identical else 'NOT EQUAL'}")


if __name__ == "__main__":
    sys.exit(main())
