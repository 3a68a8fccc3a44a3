"""A model that does not fit: 1.3 billion parameters, all of AdamW, within 4 GB of memory.

    python benchmarks/big_model.py --dir /data/swap

It is `windlass train` on the standard library's text, every weight and all state of AdamW in float32, on the SSD:
weights come for a layer's passes, the optimizer runs in the backward pass. Printed: the peak of resident memory (bar:
4 GB), tokens/s, bytes read and written a step (bar: at most 1.02x the 14 and 12 a parameter that the layout needs),
and beside them what `windlass plan` forecasts. Last, the largest model of this shape that the disk has room for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Spread, describe_machine, num_cores, print_json, print_table

from windlass.conf.compose import compose
from windlass.offload.buckets import RESIDENT_NUMEL

GB = 10**9
BAR_RSS_BYTES = 4 * GB
BAR_TRAFFIC = 1.02
READ, WRITTEN = 14, 12
"""Bytes a parameter and step: the pass's half of the weights twice, the other half and two moments once, read; all of
it once, written."""
AT_REST = 12
"""Bytes a parameter on the disk."""
WARMUP_STEPS = 1


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        f"model={options.model}",
        *("parallel=none", "optim=adamw", "optim.in_backward=previous_norm", "checkpoint=none"),
        *("offload=ssd", "offload.weights=streamed", f"offload.dir={folder / 'offload'}"),
        *("train.dtype=bfloat16", "train.activation_checkpoint=full", "train.device=cpu", "train.log_every=1"),
        *(f"train.batch_size={options.batch_size}", f"train.seq_len={options.seq_len}"),
        *(f"train.grad_accum_steps={options.grad_accum_steps}", f"train.steps={options.steps}"),
        *("train.eval_every=0", "train.eval_samples=1", f"run_dir={folder / 'run'}"),
    ]


def train(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], int, float]:
    """Metrics, a dict a step; the peak RSS in bytes; seconds in all."""
    command = [sys.executable, "-m", "windlass.cli", "train", *overrides(options, folder)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("train/loss") is not None]
    return steps, usage.ru_maxrss * 1024, time.perf_counter() - begin


def forecast(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `windlass plan` says of the same run."""
    command = [sys.executable, "-m", "windlass.cli", "plan", "--json", *overrides(options, folder)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a micro-step (1)")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on a disk that takes O_DIRECT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.dir.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(options.dir).free
    with tempfile.TemporaryDirectory(prefix="windlass-benchmark-", dir=options.dir) as name:
        plan = forecast(options, Path(name))
        lines, peak, wall_s = train(options, Path(name))
        model = compose(overrides(options, Path(name))).model.build()
    sizes = [parameter.numel() for parameter in model.parameters()]
    moved = sum(size for size in sizes if size > RESIDENT_NUMEL)
    used = lines[WARMUP_STEPS:]
    tokens = options.batch_size * options.seq_len * options.grad_accum_steps
    step = Spread.of([line["throughput/step_s"] for line in used])
    read, written, stall = (
        Spread.of([line[f"offload/{key}"] for line in used]).median for key in ("read_bytes", "write_bytes", "stall_s")
    )
    result = {
        "machine": describe_machine(),
        "num_parameters": sum(sizes),
        "tokens_a_step": tokens,
        "peak_rss_bytes": peak,
        "step_s": step.to_dict(),
        "tokens_per_s": tokens / step.median,
        "stall_s": stall,
        "read_bytes": read,
        "write_bytes": written,
        "losses": [line["train/loss"] for line in lines],
        "wall_s": wall_s,
        "forecast": plan,
        "largest_num_parameters": free_bytes // AT_REST,
    }
    if options.json:
        print_json(result)
        return 0
    report(result, moved, step)
    return 0


def report(result: dict[str, Any], moved: int, step: Spread) -> None:
    machine, plan = result["machine"], result["forecast"]
    expected_peak, expected_step = plan["memory"]["peak"]["expected"], plan["time"]["step"]["expected"]
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}")
    print(f"{result['num_parameters']:,} parameters, {result['tokens_a_step']} tokens a step\n")

    def gigabytes(num_bytes: float) -> str:
        return f"{num_bytes / GB:.2f}"

    rows = [
        ["peak RSS, GB", gigabytes(result["peak_rss_bytes"]), gigabytes(expected_peak), gigabytes(BAR_RSS_BYTES)],
        ["step, s", step.text(".1f"), f"{expected_step:.1f}", ""],
        ["tokens/s", f"{result['tokens_per_s']:.1f}", f"{result['tokens_a_step'] / expected_step:.1f}", ""],
        ["waiting for the disk, s", f"{result['stall_s']:.1f}", "", ""],
    ]
    for name, key, num_bytes in (("read", "read_bytes", READ), ("written", "write_bytes", WRITTEN)):
        bar = gigabytes(BAR_TRAFFIC * num_bytes * moved)
        rows.append([f"{name} a step, GB", gigabytes(result[key]), gigabytes(plan[f"ssd_{key}"]), bar])
    print_table(("", "measured", "forecast", "bar, at most"), rows)
    losses = ", ".join(f"{loss:.3f}" for loss in result["losses"])
    print(f"\nlosses {losses}; {result['wall_s']:.0f} s in all, making the weights included")
    print(f"the disk has room for {result['largest_num_parameters'] / GB:.1f} billion parameters, {AT_REST} bytes each")


if __name__ == "__main__":
    sys.exit(main())
