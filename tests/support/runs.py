"""Whole runs of windlass in rank processes that a test can kill."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from support.ranks import CONTEXT, free_port
from windlass.checkpoint.durable.manifest import MANIFEST, committed_steps, step_folder, step_name
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.launch.worker import run_worker

TINY_MODEL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
)


def write_corpus(folder: Path, num_documents: int = 40) -> Path:
    """A folder of small text files with some structure to learn; the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["anchor", "rope", "crew", "lift", "drum", "turn", "hold", "the", "a", "slow", "heavy", "chain"]
    for number in range(num_documents):
        picks = hashlib.sha256(str(number).encode()).digest() * 4
        text = " ".join(words[byte % len(words)] for byte in picks)
        (folder / f"{number:03d}.txt").write_text(f"{text}.\n" * (1 + number % 3))
    return folder


def run_config(root: Path, run_dir: str, *overrides: str) -> Config:
    """A small run on the corpus of `root`, which is tokenised once into `root/cache`."""
    corpus = root / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    return compose(
        [
            *TINY_MODEL,
            "data=text",
            f"data.path={corpus}",
            f"data.cache_dir={root / 'cache'}",
            "data.num_workers=1",
            "train.steps=12",
            "train.batch_size=2",
            "train.seq_len=32",
            "train.log_every=1",
            "train.eval_every=0",
            "train.eval_samples=8",
            "train.device=cpu",
            "optim.warmup_steps=3",
            "checkpoint.persist_every=3",
            "metrics.console=plain",
            "metrics.peak_flops=1e12",
            f"run_dir={root / run_dir}",
            *overrides,
        ]
    )


@dataclass
class Life:
    """The processes of one start of a run."""

    processes: list[BaseProcess]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def join(self, timeout_s: float = 120) -> list[int | None]:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not self.is_alive(), "ranks are still running"
        return [process.exitcode for process in self.processes]


def start(config: Config, num_ranks: int, largest_file_bytes: int | None = None) -> Life:
    """Starts the ranks. Their output goes to files beside the run folder.

    `largest_file_bytes` has the kernel refuse to grow a file beyond that, as a full disk does.
    """
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = CONTEXT.Process(target=rank_main, args=(copy.deepcopy(config), variables, largest_file_bytes))
        process.start()
        processes.append(process)
    return Life(processes)


def run(config: Config, num_ranks: int, largest_file_bytes: int | None = None) -> list[int | None]:
    """Exit codes of a whole life."""
    return start(config, num_ranks, largest_file_bytes=largest_file_bytes).join()


def output(config: Config, rank: int = 0) -> str:
    """What a rank has printed, over all its lives."""
    path = output_path(config, rank)
    return path.read_text() if path.exists() else ""


def output_path(config: Config, rank: int) -> Path:
    run_dir = Path(config.run_dir)
    return run_dir.with_name(f"{run_dir.name}.rank{rank}.out")


def rank_main(config: Config, variables: dict[str, str], largest_file_bytes: int | None) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    path = output_path(config, int(variables["RANK"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    sys.exit(run_worker(config))


def losses(config: Config) -> dict[int, list[float]]:
    """Step -> every loss that was logged for it: more than one where a kill had steps trained again."""
    found: dict[int, list[float]] = {}
    for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines(keepends=True):
        record = json.loads(line) if line.endswith("\n") else {}
        if "train/loss" in record:
            found.setdefault(record["step"], []).append(record["train/loss"])
    return found


def events(config: Config, kind: str) -> list[dict]:
    lines = (Path(config.run_dir) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def checkpoints(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def is_committed(config: Config, step: int) -> bool:
    return (checkpoints(config) / step_name(step) / MANIFEST).exists()


def newest_digest(config: Config) -> str:
    """SHA-256 over every global weight and optimizer tensor of the newest checkpoint, whatever its cut."""
    folder = step_folder(checkpoints(config), committed_steps(checkpoints(config))[-1])
    reader = open_checkpoint(folder)
    hasher = hashlib.sha256()
    for name in sorted(reader.manifest.tensors):
        if not name.startswith("rng."):
            hasher.update(name.encode())
            hasher.update(reader.read_whole(name).reshape(-1).view(torch.uint8).numpy().tobytes())
    reader.close()
    return hasher.hexdigest()
