"""Claim: `windlass plan` knows what a run will take: persistent bytes within 1 %, peak memory within 5 %, a step's time
within 15 %, bytes over the SSD within 2 %.

`python benchmarks/plan.py` makes the plan of several layouts, then trains each for a few steps, in processes of their
own, and prints both side by side. Memory is the kernel's high-water mark of a rank (`VmHWM`, the largest rank), which
has everything in it; time is the median step after the first. Run it on a quiet machine: plans are of one. Figures are
printed and never asserted: the exit code is 0 unless something fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import describe_machine, print_json, print_table

from windlass.checkpoint.inspect import list_checkpoints
from windlass.observe.metrics import METRICS_FILE

MODEL = ("model=llama_60m", "train.seq_len=256", "train.batch_size=4")
TWO_RANKS = ("parallel=zero3", "launch=torchrun", "launch.nproc_per_node=2", "train.batch_size=2")
FOUR_MICRO_BATCHES = ("train.grad_accum_steps=4", "train.batch_size=1")
STREAMED = ("offload=ssd", "offload.weights=streamed")
IN_BACKWARD = "optim.in_backward=previous_norm"
MODEL_130M = ("model=llama_130m", "train.seq_len=256", "parallel=none")
MODEL_350M = ("model=llama_350m", "train.seq_len=256", "train.batch_size=2", "parallel=none")
MODEL_350M += ("train.dtype=bfloat16", "train.activation_checkpoint=full")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "tiny": ("model=tiny", "parallel=none"),
    "float32": (*MODEL, "parallel=none"),
    "bfloat16": (*MODEL, "parallel=none", "train.dtype=bfloat16"),
    "recompute": (*MODEL, "parallel=none", "train.dtype=bfloat16", "train.activation_checkpoint=full"),
    "accumulate": (*MODEL, "parallel=none", "train.grad_accum_steps=4", "train.batch_size=1"),
    "apollo": (*MODEL, "parallel=none", "optim=apollo"),
    "ssd": (*MODEL, "parallel=none", "offload=ssd"),
    "ssd apollo": (*MODEL, "parallel=none", "offload=ssd", "optim=apollo"),
    "ssd 130m": (*MODEL_130M, "train.batch_size=4", "train.dtype=bfloat16", "offload=ssd"),
    "streamed": (*MODEL, "parallel=none", *STREAMED, "train.dtype=bfloat16", *FOUR_MICRO_BATCHES),
    "streamed 130m": (*MODEL_130M, "train.batch_size=2", *STREAMED, IN_BACKWARD),
    "streamed 350m": (*MODEL_350M, *STREAMED),
    "all on ssd 350m": (*MODEL_350M, *STREAMED, IN_BACKWARD),
    "zero3": (*MODEL, *TWO_RANKS),
    "zero3 apollo": (*MODEL, *TWO_RANKS, "optim=apollo", "train.dtype=bfloat16"),
}
BARS = {"persistent": 0.01, "peak": 0.05, "step": 0.15, "read": 0.02, "written": 0.02}
NUM_UNSTEADY = 2
"""Steps until bytes are as ever: the first makes state, the second finds little of it read ahead."""
UNITS = (("persistent", 1e6, 1), ("peak", 1e6, 0), ("step", 1, 3), ("read", 1e6, 0), ("written", 1e6, 0))
POLL_S = 0.05


def forecast(overrides: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "windlass.cli", "plan", "--json", *overrides]
    plan: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    memory, step = plan["memory"], plan["time"]["step"]
    return {
        "persistent": plan["num_ranks"] * (memory["weights"] + memory["optimizer"]),
        "peak": memory["peak"]["expected"],
        "peak_low": memory["peak"]["low"],
        "peak_high": memory["peak"]["high"],
        "step": step["expected"],
        "read": plan["ssd_read_bytes"],
        "written": plan["ssd_write_bytes"],
    }


def measure(overrides: Sequence[str], steps: int, folder: Path) -> dict[str, float]:
    """What a run of `steps` steps takes. Its last checkpoint has what persists, and is made after the peak."""
    command = [sys.executable, "-m", "windlass.cli", "train", *overrides, f"run_dir={folder}", "checkpoint=none"]
    command += [f"train.steps={steps}", "train.log_every=1", "train.eval_every=0", "train.eval_samples=1"]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                peaks[member.pid] = max(peaks.get(member.pid, 0), _high_water_bytes(member.pid))
            time.sleep(POLL_S)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    seconds = [line["throughput/step_s"] for line in lines if "throughput/step_s" in line]
    steady = [line for line in lines if "throughput/step_s" in line][NUM_UNSTEADY:]
    # Transfers that end after their step count in the next one, so it is the mean that can be forecast.
    moved = {
        name: statistics.mean(line.get(f"offload/{key}", 0) for line in steady)
        for name, key in (("read", "read_bytes"), ("written", "write_bytes"))
    }
    return {"peak": max(peaks.values()), "step": statistics.median(seconds[1:]), **moved}


def saved_bytes(overrides: Sequence[str], folder: Path) -> int:
    """Weights and optimizer state as a checkpoint of one step has them."""
    command = [sys.executable, "-m", "windlass.cli", "train", *overrides, f"run_dir={folder}", "checkpoint=durable"]
    command += ["train.steps=1", "train.eval_samples=1", "train.seq_len=16", "train.batch_size=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return list_checkpoints(folder)[-1].num_bytes


def _high_water_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # it has ended
        return 0


def summarize(name: str, steps: int) -> dict[str, Any]:
    overrides = LAYOUTS[name]
    planned = forecast(overrides)
    with tempfile.TemporaryDirectory(prefix="windlass-benchmark-") as folder:
        measured = measure(overrides, steps, Path(folder) / "run")
        measured["persistent"] = saved_bytes(overrides, Path(folder) / "saved")
    ratios = {key: planned[key] / measured[key] if measured[key] else 1.0 + bool(planned[key]) for key in BARS}
    return {
        "planned": planned,
        "measured": measured,
        "ratio": ratios,
        "met": {key: abs(ratios[key] - 1) <= bar for key, bar in BARS.items()},
        "in_range": planned["peak_low"] <= measured["peak"] <= planned["peak_high"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)} (all)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    results = {}
    for name in options.layouts or LAYOUTS:
        sys.stderr.write(f"{name} ...\n")
        results[name] = summarize(name, options.steps)
    if options.json:
        print_json({"machine": describe_machine(), "bars": BARS, "layouts": results})
        return 0
    rows = [
        [
            name,
            *(
                f"{result['planned'][key] / unit:,.{digits}f} / {result['measured'][key] / unit:,.{digits}f} = "
                f"{result['ratio'][key]:.3f} {'met' if result['met'][key] else 'MISSED'}"
                for key, unit, digits in UNITS
            ),
            "yes" if result["in_range"] else "NO",
        ]
        for name, result in results.items()
    ]
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}\n")
    print("planned / measured")
    headers = ["layout", "persistent MB (1 %)", "peak MB a rank (5 %)", "step s (15 %)"]
    headers += ["read MB (2 %)", "written MB (2 %)", "peak in range"]
    print_table(headers, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
