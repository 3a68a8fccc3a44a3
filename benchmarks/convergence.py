"""How well each optimizer trains: validation loss against tokens, of a small Llama on the standard library's text.

    python benchmarks/convergence.py [--out runs/convergence] [--steps 400] [--seeds 3] [--optimizers adamw apollo ...]

Every optimizer's learning rate is swept with one seed, beyond the ends where an end is best; its best rate is run with
two more seeds. Schedule, clipping, data, batches and first weights are the same for all. A run that is in the output
folder is not run again, so the benchmark can be stopped and gone on with. Writes a file a run and convergence.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, die_with_parent, num_cores, print_table

from windlass.conf.schema import schema_of
from windlass.data.config import StdlibDataConfig
from windlass.data.loader import Loader, evaluation_batches
from windlass.data.prepare import prepared_folder
from windlass.data.shards import TokenDataset
from windlass.models.config import LlamaConfig
from windlass.optim.config import Granularity, OptimConfig
from windlass.optim.scheduler import build_scheduler
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.train.evaluate import evaluate
from windlass.train.objectives.config import NextTokenConfig
from windlass.train.step import forward

SEQ_LEN, BATCH_SIZE = 128, 16
SEEDS = (0, 1, 2)
MAX_NORM = 1.0
EVAL_EVERY, EVAL_SAMPLES = 25, 256
MAX_EXTENSIONS = 3
"""How often a sweep goes on beyond its ends, while the best rate is one of them."""
UPDATE_INTERVAL = 50
"""The default of 200 is for runs of 10,000s of steps; here it would be two projections a run."""

RATES = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "apollo": (5e-3, 1e-2, 2e-2),
    "apollo_mini": (5e-3, 1e-2, 2e-2),
    "galore": (1e-2, 2e-2, 4e-2),
    "natural_galore": (1e-2, 2e-2, 4e-2),
    "muon": (2e-3, 4e-3, 8e-3),
    "cosmos": (4e-3, 8e-3, 1.6e-2),
    "sgd_sai": (1e-3, 4e-3, 1.6e-2),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "apollo_mini": {"rank": 1, "scale": 128.0, "granularity": Granularity.tensor},
}
"""What the presets of these names set beside the defaults of their dataclass."""
BARS = {"apollo": 0.03, "galore": 0.10, "apollo_mini": 0.12, "muon": -0.05, "cosmos": -0.05}
"""At most this much above AdamW, in nats a token."""


@dataclass(frozen=True)
class Job:
    optimizer: str
    lr: float
    seed: int
    num_steps: int
    threads: int

    @property
    def file(self) -> str:
        return f"{self.optimizer}-lr{self.lr:g}-seed{self.seed}-{self.num_steps}.json"

    def config(self) -> OptimConfig:
        schema = schema_of("optim", self.optimizer)
        settings = dict(SETTINGS.get(self.optimizer, {}))
        if "update_interval" in schema.__dataclass_fields__:
            settings["update_interval"] = UPDATE_INTERVAL
        return schema(name=self.optimizer, lr=self.lr, warmup_steps=self.num_steps // 10, **settings)


def train(job: Job, tokens: Path) -> dict[str, Any]:
    """One run: {"tokens": [...], "val_loss": [...], "seconds", "step_s"}."""
    torch.set_num_threads(job.threads)
    mesh = ParallelConfig(name=Sharding.none).build(torch.device("cpu"))
    objective = NextTokenConfig().build()
    dataset, validation = TokenDataset(tokens, "train"), TokenDataset(tokens, "validation")
    model = LlamaConfig(
        vocab_size=-(-dataset.vocab_size // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
    ).build()
    model.materialize(mesh.device, job.seed)
    config = job.config()
    optimizer = config.build(model)
    scheduler = build_scheduler(config, optimizer, job.num_steps)
    loader = Loader(dataset, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, data_rank=0, num_data_ranks=1, seed=job.seed)
    curve: dict[str, list[float]] = {"tokens": [], "val_loss": []}
    num_tokens, begin, optimizer_s = 0, time.perf_counter(), 0.0
    for step in range(1, job.num_steps + 1):
        batch = next(loader)
        count = objective.num_targets(batch)
        (forward(model, objective, [batch], mask_documents=False)[0] / count).backward()
        clip_grad_norm_(model.parameters(), MAX_NORM, mesh)
        started = time.perf_counter()
        optimizer.step()
        optimizer_s += time.perf_counter() - started
        scheduler.step()
        optimizer.zero_grad()
        num_tokens += count
        if step % EVAL_EVERY == 0 or step == job.num_steps:
            batches = evaluation_batches(
                validation,
                batch_size=BATCH_SIZE,
                seq_len=SEQ_LEN,
                max_samples=EVAL_SAMPLES,
                data_rank=0,
                num_data_ranks=1,
            )
            curve["tokens"].append(num_tokens)
            curve["val_loss"].append(evaluate(model, objective, batches, False, mesh).loss)
    loader.close()
    seconds = time.perf_counter() - begin
    return {"job": asdict(job), **curve, "seconds": seconds, "optimizer_step_s": optimizer_s / job.num_steps}


def run_all(jobs: list[Job], out: Path, tokens: Path, workers: int) -> dict[Job, dict[str, Any]]:
    """The results of `jobs`, from the folder where they are there."""
    results = {}
    missing = []
    for job in jobs:
        if (out / job.file).exists():
            results[job] = json.loads((out / job.file).read_text())
        else:
            missing.append(job)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        futures = {pool.submit(train, job, tokens): job for job in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            job, result = futures[future], future.result()
            (out / job.file).write_text(json.dumps(result))
            results[job] = result
            print(
                f"[{number}/{len(missing)}] {job.optimizer} lr={job.lr:g} seed={job.seed}: "
                f"{result['val_loss'][-1]:.4f} nats in {result['seconds']:.0f} s",
                flush=True,
            )
    return results


def plot(of_best: dict[str, list[dict[str, Any]]], rates: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (whole, end) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1))
    for name, results in of_best.items():
        tokens = [count / 1e6 for count in results[0]["tokens"]]
        losses = list(zip(*[result["val_loss"] for result in results], strict=True))
        mean = [statistics.mean(at_point) for at_point in losses]
        for axes in (whole, end):
            (line,) = axes.plot(tokens, mean, label=f"{name} (lr {rates[name]:g}): {mean[-1]:.3f}")
            lowest, highest = [min(point) for point in losses], [max(point) for point in losses]
            axes.fill_between(tokens, lowest, highest, color=line.get_color(), alpha=0.15)
    finals = [final(result) for results in of_best.values() for result in results]
    end.set_ylim(min(finals) - 0.05, statistics.mean(final(result) for result in of_best["adamw"]) + 0.4)
    points = next(iter(of_best.values()))[0]["tokens"]
    end.set_xlim(left=points[len(points) // 2] / 1e6)
    for axes in (whole, end):
        axes.set_xlabel("million tokens")
        axes.set_ylabel("validation loss, nats/token")
        axes.grid(alpha=0.3)
    whole.legend(fontsize=8)
    whole.set_title("each at its best learning rate; mean and range of the seeds")
    end.set_title("the second half")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=num_cores(), help="runs at the same time, a thread each")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs at the best rate")
    parser.add_argument("--optimizers", nargs="+", choices=sorted(RATES), default=list(RATES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers; it must be there before they import torch
    tokens = prepared_folder(StdlibDataConfig(), progress=False)

    names = list(dict.fromkeys(["adamw", *options.optimizers]))
    swept: dict[Job, dict[str, Any]] = {}
    best: dict[str, Job] = {}
    rates = {name: list(RATES[name]) for name in names}
    for _ in range(MAX_EXTENSIONS + 1):
        sweep = [Job(name, lr, SEEDS[0], options.steps, 1) for name in names for lr in rates[name]]
        swept = run_all(sweep, options.out, tokens, options.workers)
        for name in names:
            best[name] = min((job for job in sweep if job.optimizer == name), key=lambda job: final(swept[job]))
        if not extend(rates, best):
            break
    repeats = [Job(name, best[name].lr, seed, options.steps, 1) for name in names for seed in SEEDS[: options.seeds]]
    repeated = run_all(repeats, options.out, tokens, options.workers)
    of_best = {name: [repeated[job] for job in repeats if job.optimizer == name] for name in names}
    report(names, swept, best, of_best)
    plot(of_best, {name: best[name].lr for name in names}, options.out / "convergence.png")
    print(f"\nplot: {options.out / 'convergence.png'}")


def extend(rates: dict[str, list[float]], best: dict[str, Job]) -> bool:
    """Adds half or twice the rate where the best one is the first or the last that was tried; whether any was."""
    extended = False
    for name, job in best.items():
        if job.lr in (min(rates[name]), max(rates[name])):
            beyond = job.lr / 2 if job.lr == min(rates[name]) else job.lr * 2
            rates[name] = sorted([*rates[name], beyond])
            extended = True
    return extended


def final(result: dict[str, Any]) -> float:
    return result["val_loss"][-1]


def report(
    names: list[str], swept: dict[Job, dict[str, Any]], best: dict[str, Job], of_best: dict[str, list[dict[str, Any]]]
) -> None:
    print(f"\n{describe_machine()}\n\nSweep, seed {SEEDS[0]}, validation loss in nats/token:\n")
    print_table(
        ["optimizer", "learning rate: loss"],
        [
            [
                name,
                ", ".join(f"{job.lr:g}: {final(result):.3f}" for job, result in swept.items() if job.optimizer == name),
            ]
            for name in names
        ],
    )
    mean = {name: statistics.mean(final(result) for result in of_best[name]) for name in names}
    print("\nBest rate, mean over the seeds:\n")
    rows = []
    for name in sorted(names, key=lambda name: mean[name]):
        losses = [final(result) for result in of_best[name]]
        difference, bar = mean[name] - mean["adamw"], BARS.get(name)
        held = "" if bar is None else ("met" if difference <= bar else "MISSED")
        rows.append(
            [
                name,
                f"{best[name].lr:g}",
                f"{mean[name]:.4f} ({min(losses):.4f}..{max(losses):.4f})",
                f"{difference:+.4f}",
                "" if bar is None else f"<= {bar:+.2f}",
                held,
            ]
        )
    print_table(["optimizer", "lr", "validation loss (range)", "over AdamW", "bar", ""], rows)


if __name__ == "__main__":
    main()
