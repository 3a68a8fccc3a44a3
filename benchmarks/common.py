"""What the benchmarks share: ranks on this machine, medians with their range, tables."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import statistics
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from windlass.conf.compose import compose
from windlass.conf.schema import Config

PR_SET_PDEATHSIG = 1
MARK = "WINDLASS_BENCHMARK"
"""In the environment of all ranks and of what they start, whatever becomes of its parents."""
LOOPBACK = "lo"


@dataclass(frozen=True)
class Spread:
    """What a figure was over the rounds of a run."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lowest:{spec}}..{self.highest:{spec}})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Usage:
    """What all processes of a benchmark together have used so far."""

    cpu_s: float
    """User and system; of processes that have ended too, if their parents are left."""
    disk_bytes: int
    """Handed to the kernel for a disk. Memory file systems do not count."""
    sent_bytes: int
    """Through the loopback interface, by all programs of this machine."""

    @staticmethod
    def now() -> Usage:
        """To be called by a rank of `run_ranks`."""
        cpu_s, disk_bytes = 0.0, 0
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) != os.environ[MARK]:
                    continue
                times = process.cpu_times()
                cpu_s += times.user + times.system + times.children_user + times.children_system
                disk_bytes += process.io_counters().write_bytes
            except psutil.Error:
                continue  # another user's, or it has ended
        return Usage(cpu_s, disk_bytes, psutil.net_io_counters(pernic=True)[LOOPBACK].bytes_sent)

    def since(self, before: Usage) -> Usage:
        return Usage(
            self.cpu_s - before.cpu_s, self.disk_bytes - before.disk_bytes, self.sent_bytes - before.sent_bytes
        )


def filesystem_of(folder: Path) -> str:
    """The type of the file system that `folder` is on."""
    folder = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
    """What timings depend on and what no benchmark can choose."""
    cpu = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": num_cores(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """`function(*args)` in `num_ranks` fresh processes with torchrun's environment; what each returned.

    Each rank computes with its share of the cores.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """
    context = mp.get_context("spawn")
    variables = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_ranks)),
        MARK: str(uuid.uuid4()),
    }
    before = dict(os.environ)
    os.environ.update(variables)  # OpenMP reads its variable before a rank's first line of Python could set it
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, sender, function, args))
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        outcomes = [_receive(pipe) for pipe in pipes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
        for process in processes:
            process.join()
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for result, _ in outcomes]


def _receive(pipe: Connection) -> tuple[Any, str | None]:
    try:
        return pipe.recv()
    except EOFError:
        return None, "died without a word"


def peak_memory_of(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `run`, and the most bytes that the process held meanwhile less what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmRSS")
    result = run()
    return result, _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def die_with_parent() -> None:
    """A benchmark that is ended must not leave processes that compute on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _rank_main(rank: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    die_with_parent()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    try:
        sender.send((function(*args), None))
    except Exception:
        sender.send((None, traceback.format_exc()))
    finally:
        sender.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table: the first column left, others right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str], fill: str = " ") -> str:
        cells = [line[0].ljust(widths[0], fill)]
        cells += [cell.rjust(width, fill) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    print(text(header))
    print(text(["", *[":" for _ in widths[1:]]], fill="-"))
    for row in rows:
        print(text(row))


def print_json(result: Any) -> None:
    print(json.dumps(result, indent=2))


def llama_config(shape: dict[str, int], batch_size: int, seq_len: int, run_dir: Path) -> Config:
    """A float32 Llama of `shape` (keys of `model.`) under ZeRO-3 and AdamW."""
    return compose(
        [
            "model=llama_60m",
            *(f"model.{key}={value}" for key, value in shape.items()),
            f"model.num_kv_heads={shape['num_heads']}",
            "parallel=zero3",
            "optim=adamw",
            "train.dtype=float32",
            f"train.batch_size={batch_size}",
            f"train.seq_len={seq_len}",
            f"run_dir={run_dir}",
        ]
    )
