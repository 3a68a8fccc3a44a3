"""Whole runs of windlass in rank processes that a test can kill."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from support.ranks import CONTEXT, free_port, run_ranks
from windlass.checkpoint.durable.manifest import MANIFEST, committed_steps, step_folder, step_name
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.data.prepare import prepared_folder
from windlass.errors import EXIT_DONE, EXIT_USER_ERROR
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


def shared_folder() -> Path:
    """What all tests of a session share, those in other workers of pytest too."""
    return Path(os.environ["WINDLASS_TEST_SHARED"])


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Held by one process at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def data_overrides() -> list[str]:
    """The corpus, which is tokenised once a session."""
    corpus, cache = shared_folder() / "corpus", shared_folder() / "cache"
    overrides = ["data=text", f"data.path={corpus}", f"data.cache_dir={cache}", "data.num_workers=1"]
    if not cache.exists():
        with lock(shared_folder() / "corpus.lock"):
            if not cache.exists():
                write_corpus(corpus)
                prepared_folder(compose(overrides).data, progress=False)
    return overrides


def run_config(root: Path, run_dir: str, *overrides: str) -> Config:
    """A small run into `root/run_dir`, on the corpus of all tests."""
    config = copy.deepcopy(_composed(overrides))
    config.run_dir = str(root / run_dir)
    return config


@functools.lru_cache(maxsize=256)  # Hydra takes a tenth of a second
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose(
        [
            *(() if any(override.startswith("model=") for override in overrides) else TINY_MODEL),
            *data_overrides(),
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
            "metrics.report=false",  # most of what a run of a few steps costs
            "metrics.peak_flops=1e12",
            *overrides,
        ]
    )


@dataclass
class Attempt:
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


def start(config: Config, num_ranks: int, largest_file_bytes: int | None = None) -> Attempt:
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
    return Attempt(processes)


def run(config: Config, num_ranks: int, largest_file_bytes: int | None = None) -> list[int | None]:
    """Exit codes of a whole attempt."""
    return start(config, num_ranks, largest_file_bytes=largest_file_bytes).join()


def undisturbed(num_ranks: int, *overrides: str, like: Callable[..., Config] = run_config) -> Config:
    """A run to its end that nothing disturbed; made once a session for all tests that compare with the same.

    Args:
        like: makes the configuration from root, name and `overrides`, as the test does for its own run.
    """
    key = hashlib.sha256(repr((num_ranks, overrides, like.__qualname__)).encode()).hexdigest()[:16]
    folder = shared_folder() / "undisturbed"
    folder.mkdir(exist_ok=True)
    config = like(folder, key, *overrides)
    done = folder / f"{key}.done"
    with lock(folder / f"{key}.lock"):
        if not done.exists():
            begin = time.monotonic()
            assert run(config, num_ranks) == [EXIT_DONE] * num_ranks, output(config)
            assert_trained(config)
            done.write_text(str(time.monotonic() - begin))
    return config


def life_s(config: Config) -> float:
    """How long a run of `undisturbed` took."""
    return float(Path(f"{config.run_dir}.done").read_text())


def refused(
    config: Config, num_ranks: int = 1, largest_file_bytes: int | None = None, ends_process: bool = False
) -> str:
    """The message of a run that must refuse: one line, and the same exit code on all ranks.

    The ranks are processes that the tests keep, unless the refusal `ends_process`, as it does where one rank refuses
    while others wait for it.
    """
    before = output(config)
    if ends_process:
        exit_codes = run(config, num_ranks, largest_file_bytes)
    else:
        exit_codes = run_ranks(_run_here, num_ranks, config, largest_file_bytes)
    printed = output(config).removeprefix(before)
    assert exit_codes == [EXIT_USER_ERROR] * num_ranks, printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("windlass: error: ")]
    assert len(errors) == 1, printed
    assert "Fix: " in errors[0]
    return errors[0]


def _run_here(config: Config, largest_file_bytes: int | None) -> int:
    """A rank in a process that goes on afterwards."""
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        _redirect(config)
        if largest_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, limits[1]))
        return run_worker(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.stdout, sys.stderr = streams
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def output(config: Config, rank: int = 0) -> str:
    """What a rank has printed, over all its attempts."""
    path = output_path(config, rank)
    return path.read_text() if path.exists() else ""


def output_path(config: Config, rank: int) -> Path:
    run_dir = Path(config.run_dir)
    return run_dir.with_name(f"{run_dir.name}.rank{rank}.out")


def rank_main(config: Config, variables: dict[str, str], largest_file_bytes: int | None) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    _redirect(config)
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    sys.exit(run_worker(config))


def losses(config: Config) -> dict[int, list[float]]:
    """Step -> every loss that was logged for it: more than one where a kill had steps trained again."""
    found: dict[int, list[float]] = {}
    for record in metrics(config):
        if "train/loss" in record:
            found.setdefault(record["step"], []).append(record["train/loss"])
    return found


def assert_trained(config: Config, after: int = 0) -> None:
    """Asserts that a run has come to its last step by training: every step is there, with a finite loss that falls and
    a gradient, and none was skipped.

    Args:
        after: the step that it went on from, if what was before is in another folder.
    """
    records = {record["step"]: record for record in metrics(config) if "train/loss" in record}
    assert sorted(records) == list(range(after + 1, config.train.steps + 1)), (
        f"steps {sorted(records)}: {output(config)}"
    )
    for step, record in records.items():
        for key in ("train/loss", "optim/grad_norm"):
            value = record[key]
            assert value is not None and math.isfinite(value) and value > 0, f"{key} of step {step} is {value}"
        assert not record["optim/skipped_steps"], f"steps were skipped until step {step}"
    assert not events(config, "skipped_step")
    few = max(1, len(records) // 4)
    values = [records[step]["train/loss"] for step in sorted(records)]
    assert len(values) == 1 or sum(values[-few:]) < sum(values[:few]), f"the loss does not fall: {values}"
    assert events(config, "done")[-1]["step"] == config.train.steps


def assert_same_training(config: Config, calm: Config, note: str = "") -> None:
    """Asserts that two runs have trained, and alike: every loss that was logged, also twice, and all weights and
    optimizer state of the newest checkpoint, to the bit.

    Args:
        calm: the one that nothing disturbed, so that each of its steps was trained once.
        note: what is said where it does not hold.
    """
    for trained in (config, calm):
        assert_trained(trained)
    expected, seen = losses(calm), losses(config)
    assert seen.keys() == expected.keys()
    for step, values in seen.items():
        assert len(expected[step]) == 1 and set(values) == set(expected[step]), f"step {step} {note}"
    for trained in (config, calm):
        assert committed_steps(checkpoints(trained))[-1] == trained.train.steps
    assert newest_digest(config) == newest_digest(calm), note


def assert_close_training(config: Config, calm: Config, atol: float) -> None:
    """Asserts that two runs have trained, with losses that are `atol` apart at most, nats a token, at every step."""
    for trained in (config, calm):
        assert_trained(trained)
    expected, seen = losses(calm), losses(config)
    assert seen.keys() == expected.keys()
    for step, values in expected.items():
        assert abs(seen[step][-1] - values[-1]) <= atol, f"step {step}"


def _redirect(config: Config) -> None:
    """Sends what this rank prints to its file."""
    path = output_path(config, int(os.environ["RANK"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115


def metrics(config: Config) -> list[dict]:
    """All lines of the metrics but one that is half written."""
    path = Path(config.run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(config: Config, kind: str) -> list[dict]:
    lines = (Path(config.run_dir) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def checkpoints(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def is_committed(config: Config, step: int) -> bool:
    return (checkpoints(config) / step_name(step) / MANIFEST).exists()


def newest_digest(config: Config) -> str:
    """SHA-256 over every global weight and optimizer tensor of the newest checkpoint, whatever its cut.

    All are finite: two runs that came to nothing are not the same.
    """
    folder = step_folder(checkpoints(config), committed_steps(checkpoints(config))[-1])
    reader = open_checkpoint(folder)
    hasher = hashlib.sha256()
    names = [name for name in sorted(reader.manifest.tensors) if not name.startswith("rng.")]
    assert any(name.startswith("model.") for name in names) and any(name.startswith("optimizer.") for name in names)
    for name in names:
        tensor = reader.read_whole(name)
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} is not finite"
        hasher.update(name.encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    reader.close()
    return hasher.hexdigest()
