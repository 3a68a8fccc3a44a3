"""Whether a change of the code leaves every loss as it was, to the bit, and reads the checkpoints from before.

`python benchmarks/same_bits.py record DIR` trains twelve layouts with the windlass of its interpreter. With that of
another checkout `python benchmarks/same_bits.py compare DIR NEW_DIR` trains them again, and goes on from a copy of each
checkpoint that the first has left half way. It prints a line a layout and ends with 1 if a loss differs.

Losses are of one machine: kernels, and so bits, differ between machines. They are compared as they are in
`metrics.jsonl`, in full precision, once it is seen that they are finite, fall, and that no step was skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

STEPS, HALF = 12, 6
BASE = (
    "train.seq_len=64",
    "train.batch_size=2",
    "train.eval_every=0",
    "train.eval_samples=8",
    "train.log_every=1",
    "optim.warmup_steps=1",
    "metrics.report=false",
    "checkpoint.keep=0",
    f"checkpoint.persist_every={HALF}",
    f"train.steps={STEPS}",
)
ERASURE = ("checkpoint=erasure", "checkpoint.failure_domain=rank")
STREAMED = ("offload=ssd", "offload.weights=streamed")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank, AdamW": (1, ("optim=adamw",)),
    "zero3, APOLLO, erasure": (2, ("parallel=zero3", "optim=apollo", "optim.rank=16", *ERASURE)),
    "zero2, GaLore, lazy, bfloat16": (
        2,
        ("parallel=zero2", "optim=galore", "optim.rank=16", "checkpoint=lazy", "train.dtype=bfloat16"),
    ),
    "zero1, Muon": (2, ("parallel=zero1", "optim=muon", "train.grad_accum_steps=2")),
    "ddp, SGD-SaI": (2, ("parallel=ddp", "optim=sgd_sai")),
    "hsdp, AdamW": (4, ("parallel=hsdp", "parallel.num_replicas=2", "optim=adamw", "train.grad_accum_steps=2")),
    "state on SSD, AdamW": (1, ("offload=ssd", "optim=adamw")),
    "all on SSD, APOLLO-Mini, two micro-batches": (1, (*STREAMED, "optim=apollo_mini", "train.grad_accum_steps=2")),
    "zero3, all on SSD, COSMOS": (2, ("parallel=zero3", *STREAMED, "optim=cosmos", "optim.rank=8")),
    "zero2, state in RAM, Natural GaLore in backward": (
        2,
        (
            *("parallel=zero2", "offload=cpu", "optim=natural_galore", "optim.rank=16"),
            *("optim.in_backward=unclipped", "train.max_norm=null"),
        ),
    ),
    "half the activations, bfloat16, AdamW in backward": (
        1,
        (
            *("train.activation_checkpoint=fraction", "train.activation_fraction=0.5", "train.dtype=bfloat16"),
            *("optim=adamw", "optim.in_backward=previous_norm"),
        ),
    ),
    "recomputed, dropout, attention within documents": (
        1,
        (
            *("train.activation_checkpoint=full", "model.dropout=0.1", "model.tie_embeddings=false"),
            *("data.borders=attention", "train.grad_accum_steps=2", "optim=adamw"),
        ),
    ),
}


def train(run_dir: Path, num_ranks: int, overrides: tuple[str, ...]) -> dict[int, float]:
    """Trains in `run_dir` and returns the loss by step. Raises SystemExit where the run has not trained."""
    launch = () if num_ranks == 1 else ("launch=torchrun", f"launch.nproc_per_node={num_ranks}")
    windlass = Path(sys.executable).with_name("windlass")
    ended = subprocess.run(
        [windlass, "train", *BASE, *launch, *overrides, f"run_dir={run_dir}"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode != 0:
        sys.exit(f"{run_dir}: ended with {ended.returncode}\n{ended.stdout}{ended.stderr}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}
    in_order = [losses[step] for step in sorted(losses)]
    has_trained = len(in_order) == STEPS and all(map(math.isfinite, in_order)) and in_order[-1] < in_order[0]
    if not has_trained or '"skipped_step"' in (run_dir / "events.jsonl").read_text():
        sys.exit(f"{run_dir}: has not trained: {losses}")
    return losses


def recovered_steps(run_dir: Path) -> list[int]:
    """The steps from which the run in a folder has gone on, in turn."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["kind"] == "recovered"]


def half_way(run_dir: Path, copy: Path) -> None:
    """Copies a finished run as it was when its first checkpoint was written."""
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("offload", "logs"))
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > HALF:
            shutil.rmtree(folder)


def cpu_name() -> str:
    """The CPU's name; not asked of windlass, as this runs with that of any checkout."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    print(f"{cpu_name()}; {STEPS} steps, a checkpoint after {HALF}")
    failed = 0
    for number, (name, (num_ranks, overrides)) in enumerate(LAYOUTS.items()):
        run_dir = (arguments.folders[-1] / str(number)).absolute()
        losses = train(run_dir, num_ranks, overrides)
        if arguments.verb == "record":
            print(f"{name}: {losses[STEPS].hex()}", flush=True)
            continue
        before = arguments.folders[0].absolute() / str(number)
        lines = [json.loads(line) for line in (before / "metrics.jsonl").read_text().splitlines()]
        expected = {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}
        copy = run_dir.with_name(f"{number}-resumed")
        half_way(before, copy)
        resumed = train(copy, num_ranks, overrides)
        if recovered_steps(copy)[-1:] != [HALF]:  # a run that began anew would have the same losses
            sys.exit(f"{copy}: has not gone on from step {HALF}")
        same = losses == expected, resumed == expected
        failed += same != (True, True)
        print(f"{name}: {'same' if same[0] else 'DIFFERS'}; resumed {'same' if same[1] else 'DIFFERS'}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
