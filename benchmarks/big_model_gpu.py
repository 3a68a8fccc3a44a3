"""A model that does not fit its GPU: 13 billion parameters, all of AdamW, on a device that may use 24 GB.

    python benchmarks/big_model_gpu.py --dir /data/swap --host-gb 96

It is `windlass train` on the standard library's text in bfloat16, a Llama of the shape of the 13B model, in a process
whose allocator may take `--device-gb` of the GPU (`torch.cuda.set_per_process_memory_fraction`). AdamW runs in the
backward pass; weights (4 bytes a parameter) are on the SSD between passes, and so is its state (8 bytes a parameter)
but for `--host-gb` of it, which stay in host memory. Printed: model TFLOP/s, beside what was published of a GPU with
that much memory; the peak of device memory beside the limit; how much of the time the GPU had no kernel to run (sampled
by `nvidia-smi`); seconds that training waited for transfers; and bytes read and written a step.

`--device cpu --model tiny` tries the script where there is no GPU: nothing is limited then, and nothing sampled.

DeepSpeed's ZeRO-Infinity is not run here: it keeps 18 bytes a parameter, 234 GB for 13 billion, where this takes 156.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import Spread, describe_machine, print_json, print_table

from windlass import cli
from windlass.conf.compose import compose

GB = 10**9
VOCAB_SIZE = 32000
SHAPE_13B = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_layers": 40,
    "num_heads": 40,
    "num_kv_heads": 40,
}
WARMUP_STEPS = 1
SAMPLE_MS = 200
PUBLISHED_TFLOPS = {"Fuyou": 156, "ZeRO-Infinity": 45}
"""Of 13B on one RTX 4090 (Fuyou, 2024)."""


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    shape = [f"model.{key}={value}" for key, value in SHAPE_13B.items()] if options.model == "13b" else []
    return [
        *(["model=llama_7b", *shape] if shape else [f"model={options.model}", f"model.vocab_size={VOCAB_SIZE}"]),
        *("parallel=none", "optim=adamw", "optim.in_backward=previous_norm", "checkpoint=none"),
        *("offload=ssd", "offload.weights=streamed", f"offload.dir={folder / 'offload'}"),
        f"offload.max_host_bytes={int(options.host_gb * GB)}",
        f"offload.max_activation_bytes={int(options.activation_gb * GB)}",
        *("train.dtype=bfloat16", "train.activation_checkpoint=full", f"train.device={options.device}"),
        *(f"train.batch_size={options.batch_size}", f"train.seq_len={options.seq_len}", "train.log_every=1"),
        *(f"train.grad_accum_steps={options.grad_accum_steps}", f"train.steps={options.steps}"),
        *("train.eval_every=0", "train.eval_samples=1", f"run_dir={folder / 'run'}"),
    ]


def train_limited(device_gb: float, arguments: list[str]) -> int:
    """`windlass train` in this process, whose allocator may take no more than `device_gb` of the GPU."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, device_gb * GB / total), 0)
    return cli.main(["train", *arguments])


class Idle:
    """Samples how much of the time the GPU runs a kernel, while it lasts."""

    def __init__(self, device: str) -> None:
        self._command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        self._command += ["--id=0", f"--loop-ms={SAMPLE_MS}"]
        self._is_gpu = device == "cuda"
        self._samples: list[tuple[float, float]] = []  # (seconds since the epoch, percent of the time in use)

    def __enter__(self) -> Idle:
        if self._is_gpu:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._samples.append((time.time(), float(line)))

    def __exit__(self, *_: object) -> None:
        if self._is_gpu:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def share(self, begin: float, end: float) -> float | None:
        """How much of that time, in seconds since the epoch, was idle; None where nothing was sampled."""
        used = [percent for when, percent in self._samples if begin <= when <= end]
        return 1 - statistics.mean(used) / 100 if used else None


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train-limited", str(options.device_gb), *overrides(options, folder)]
    with Idle(options.device) as idle:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("train/loss") is not None][WARMUP_STEPS:]
    model = compose(overrides(options, folder)).model
    step = Spread.of([line["throughput/step_s"] for line in steps])
    tokens = options.batch_size * options.seq_len * options.grad_accum_steps
    flops = tokens * model.build().flops_per_token(options.seq_len)
    peaks = [line["memory/device_peak_bytes"] for line in steps if line.get("memory/device_peak_bytes")]
    return {
        "machine": describe_machine(),
        "num_parameters": sum(parameter.numel() for parameter in model.build().parameters()),
        "tokens_a_step": tokens,
        "step_s": step.to_dict(),
        "tflops": flops / step.median / 1e12,
        "device_peak_bytes": max(peaks, default=None),
        "idle": idle.share(steps[0]["time"] - steps[0]["throughput/step_s"], steps[-1]["time"]),
        **{
            key: Spread.of([line[f"offload/{key}"] for line in steps]).median
            for key in ("stall_s", "read_bytes", "write_bytes")
        },
    }


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else result["machine"]["cpu"]
    print(f"{device}, {result['num_parameters']:,} parameters, {result['tokens_a_step']:,} tokens a step\n")
    peak, idle, step = result["device_peak_bytes"], result["idle"], Spread(**result["step_s"])
    rows = [
        ["step, s", step.text(".1f"), ""],
        ["model TFLOP/s", f"{result['tflops']:.1f}", ""],
        ["device memory, GB", "" if peak is None else f"{peak / GB:.2f}", f"{options.device_gb:g}"],
        ["GPU idle", "" if idle is None else f"{idle:.0%}", ""],
        ["waiting for transfers, s", f"{result['stall_s']:.1f}", ""],
        ["read a step, GB", f"{result['read_bytes'] / GB:.2f}", ""],
        ["written a step, GB", f"{result['write_bytes'] / GB:.2f}", ""],
    ]
    print_table(("", "measured", "bar, at most"), rows)
    published = ", ".join(f"{name} {value}" for name, value in PUBLISHED_TFLOPS.items())
    print(f"\npublished TFLOP/s of 13B on one RTX 4090: {published}")


def main() -> int:
    if sys.argv[1:2] == ["--train-limited"]:
        return train_limited(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="13b", help="13b, or a preset of windlass")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--device-gb", type=float, default=24.0, help="of the GPU's memory (24)")
    parser.add_argument("--host-gb", type=float, default=0.0, help="of the state in host memory; rest on the SSD (0)")
    parser.add_argument(
        "--activation-gb", type=float, default=8.0, help="of the layers' inputs on the GPU; the rest on the SSD (8)"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a micro-step (4)")
    parser.add_argument("--grad-accum-steps", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on a disk that takes O_DIRECT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: see --help", file=sys.stderr)
        return 0
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="windlass-benchmark-", dir=options.dir) as name:
        result = measure(options, Path(name))
    if options.json:
        print_json(result)
    else:
        report(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
