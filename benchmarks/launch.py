"""Claim: a run begins about as soon as a bare script under torchrun does, and goes on sooner after a kill.

`python benchmarks/launch.py` times, in turns, from the command to the end of step 1: `windlass train` with each of its
launchers on 1, 2 and 4 gloo ranks, and `torchrun` of a script of 60 lines that has torch alone (`launch_bare.py`; a
model of the same sizes under DDP). Data is prepared before. Then a worker of 2 is killed with SIGKILL, and what is
timed is from there to the next step that all have finished: windlass goes on from its memory (`checkpoint=erasure`, a
snapshot each step), while the bare script has saved nothing and begins at step 0. With Ray the time has the start of a
cluster of its own in it.

A step is seen to be done by the line that rank 0 writes, looked for each 5 ms. Timings are printed and never asserted:
the exit code is 0 unless something fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from common import MARK, Spread, describe_machine, print_json, print_table

SHAPE = {"vocab_size": 257, "hidden_size": 192, "intermediate_size": 512, "num_layers": 4, "num_heads": 6}
"""Of `model=tiny` on bytes."""
BARE = "bare script, torchrun"
LAUNCHERS = ("local", "torchrun", "ray")
KILL_AFTER_STEP = 5
NUM_KILLED_RANKS = 2
POLL_S = 0.005
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Settings:
    batch_size: int
    seq_len: int
    folder: Path
    shm_dir: Path


class Started:
    """One way to train, started now in a session of its own.

    Args:
        name: `BARE`, or a launcher of windlass.
    """

    def __init__(self, settings: Settings, name: str, num_ranks: int, *overrides: str) -> None:
        self.name, self.folder = name, Path(tempfile.mkdtemp(dir=settings.folder))
        self.log = self.folder / "output"
        self._last_rank, self._mark = num_ranks - 1, str(uuid.uuid4())
        if name == BARE:
            self._steps, command = self.folder / "steps.jsonl", _bare_command(settings, num_ranks, self.folder)
        else:
            self._steps = self.folder / "run" / "metrics.jsonl"
            command = _windlass_command(settings, name, num_ranks, self.folder / "run", overrides)
        environment = os.environ | {"OMP_NUM_THREADS": "1", MARK: self._mark}
        with self.log.open("wb") as log:
            self.begin = time.monotonic()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def steps(self) -> list[dict[str, Any]]:
        return _lines(self._steps)

    def lives(self) -> int:
        """How often the workers have been started again, and have said so."""
        if self.name == BARE:
            return int(self.steps()[-1]["life"])
        return sum(event["kind"] == "restart" for event in _lines(self._steps.with_name("events.jsonl")))

    def wait_until(self, is_so: Callable[[], bool]) -> float:
        """The moment at which it is. Raises RuntimeError if that does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} ended or hung: {self.log.read_text()}")
            time.sleep(POLL_S)
        return time.monotonic()

    def kill_worker(self) -> float:
        """SIGKILL to the last rank. Returns when."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                if self._rank(process) == self._last_rank:
                    process.kill()
                    return time.monotonic()
        raise RuntimeError(f"{self.name} has no worker of rank {self._last_rank}")

    def end(self) -> None:
        """Ends it as a user does, and then whatever is left of it."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        shutil.rmtree(self.folder)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def _rank(self, process: psutil.Process) -> int | None:
        if self.name == BARE:
            rank = process.environ().get("RANK")
            return None if rank is None else int(rank)
        prefix, _, rank = process.name().partition("-")
        return int(rank) if prefix == "windlass" and rank.isdigit() else None


def _bare_command(settings: Settings, num_ranks: int, folder: Path) -> list[str]:
    script = [str(Path(__file__).with_name("launch_bare.py")), json.dumps(SHAPE)]
    sizes = [str(settings.batch_size), str(settings.seq_len), str(folder / "steps.jsonl")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    return [*torchrun, f"--nproc-per-node={num_ranks}", *script, *sizes]


def _windlass_command(
    settings: Settings, launcher: str, num_ranks: int, run_dir: Path, overrides: Sequence[str]
) -> list[str]:
    launch = [f"launch={launcher}"]
    if launcher != "local":
        launch.append(f"launch.nproc_per_node={num_ranks}")
    if launcher == "ray":
        launch += ["launch.address=local", "launch.cpus_per_rank=0.1"]  # ranks may be more than cores
    return [
        *(sys.executable, "-m", "windlass.cli", "train", "model=tiny", "optim=adamw", "data=text"),
        f"data.path={settings.folder / 'corpus'}",
        f"data.cache_dir={settings.folder / 'cache'}",
        "data.validation_fraction=0.2",
        *(f"parallel={'none' if num_ranks == 1 else 'ddp'}", "train.steps=1000000", "train.log_every=1"),
        *(f"train.batch_size={settings.batch_size}", f"train.seq_len={settings.seq_len}", "train.eval_every=0"),
        *("train.device=cpu", "metrics.console=plain", f"checkpoint.shm_dir={settings.shm_dir}", f"run_dir={run_dir}"),
        *launch,
        *overrides,
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def time_start(settings: Settings, name: str, num_ranks: int) -> float:
    """Seconds from the command to the end of step 1."""
    started = Started(settings, name, num_ranks, "checkpoint=none")
    try:
        return started.wait_until(lambda: len(started.steps()) >= 1) - started.begin
    finally:
        started.end()


def time_restart(settings: Settings, name: str) -> float:
    """Seconds from a kill to the next step that the workers which are started then have finished."""
    memory = ("checkpoint=erasure", "checkpoint.failure_domain=rank", "checkpoint.num_parity_shards=0")
    started = Started(settings, name, NUM_KILLED_RANKS, *memory, "checkpoint.snapshot_every=1", "checkpoint.lease_s=60")
    try:
        started.wait_until(lambda: len(started.steps()) >= KILL_AFTER_STEP)
        killed_at = started.kill_worker()
        if name == BARE:
            return started.wait_until(lambda: started.lives() > 0) - killed_at
        started.wait_until(lambda: started.lives() > 0)
        before = len(started.steps())
        return started.wait_until(lambda: len(started.steps()) > before) - killed_at
    finally:
        started.end()


def measure(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """All ways in turns, `options.rounds` times, after a start of windlass that prepares the data."""
    time_start(settings, "local", 1)
    starts = [(BARE, num_ranks) for num_ranks in options.ranks]
    starts += [
        (name, num_ranks) for name in options.launchers for num_ranks in ((1,) if name == "local" else options.ranks)
    ]
    restarts = [BARE, *(name for name in options.launchers if name != "local")]
    begun: dict[tuple[str, int], list[float]] = {start: [] for start in starts}
    resumed: dict[str, list[float]] = {name: [] for name in restarts}
    num_bare_failures = 0
    for number in range(options.rounds):
        for start in starts:
            begun[start].append(time_start(settings, *start))
        for name in restarts:
            while True:
                try:
                    resumed[name].append(time_restart(settings, name))
                    break
                except RuntimeError:
                    # Gloo may be given the address of a rank of the life before, in each of torchrun's restarts.
                    num_bare_failures += 1
                    if name != BARE or num_bare_failures > options.rounds:
                        raise
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return {
        "machine": describe_machine(),
        "rounds": options.rounds,
        "batch_size": settings.batch_size,
        "seq_len": settings.seq_len,
        "start": [_row(name, ranks, begun[name, ranks], begun.get((BARE, ranks))) for name, ranks in starts],
        "restart": [_row(name, NUM_KILLED_RANKS, resumed[name], resumed[BARE]) for name in restarts],
        "bare_failures": num_bare_failures,
    }


def _row(name: str, num_ranks: int, seconds: list[float], bare: list[float] | None) -> dict[str, Any]:
    ratios = None if bare is None else [mine / other for mine, other in zip(seconds, bare, strict=True)]
    return {
        "name": name if name == BARE else f"windlass, launch={name}",
        "num_ranks": num_ranks,
        "seconds": Spread.of(seconds).to_dict(),
        "over_bare": None if ratios is None else Spread.of(ratios).to_dict(),
    }


def print_summary(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}")
    print(f"median (lowest..highest) of {result['rounds']} rounds; ranks of 1 thread")
    for key, title in (("start", "command to end of step 1"), ("restart", "SIGKILL of a worker to next step")):
        print(f"\n{title}\n")
        rows = []
        for row in result[key]:
            over = "" if row["over_bare"] is None else Spread(**row["over_bare"]).text(".2f")
            rows.append([row["name"], str(row["num_ranks"]), Spread(**row["seconds"]).text(".2f"), over])
        print_table(["", "ranks", "seconds", "over the bare script"], rows)
    print(f"\nthe bare script did not come back from {result['bare_failures']} further kills")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of all ways (5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (1 2 4)")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS, help="of windlass (all)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a rank (2)")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where the runs' folders go (runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.ranks) < 1:
        parser.error("--rounds and --ranks must be at least 1")
    return options


def write_corpus(folder: Path) -> None:
    """Some text, of which no more than its bytes matters."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number} turns of the drum, and the anchor is up. " * 100)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="windlass-benchmark-", dir=options.dir)).resolve()
    shm_dir = Path(tempfile.mkdtemp(prefix="windlass-benchmark-", dir="/dev/shm"))
    try:
        write_corpus(folder / "corpus")
        result = measure(Settings(options.batch_size, options.seq_len, folder, shm_dir), options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(shm_dir, ignore_errors=True)
    if options.json:
        print_json(result)
    else:
        print_summary(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
