"""How fast tiers are read and written beside fio with O_DIRECT, and what CPU that takes.

    python benchmarks/direct_io.py [--folder PATH] [--rounds 7] [--megabytes 1024] [--threads 8 ...]

In each round fio (4 MiB at a time, 8 of them under way) and an engine with each number of threads read, write, and do
both at a time, half of the bytes each way; who comes first changes from round to round. All move as many bytes of
files that were written whole before the first round. Tiers are files of 64 MiB whose transfers overlap, as in a step of
an offloaded optimizer, and their time and CPU, that of the whole process, include the checksums, which fio does not
compute. Every ratio is to fio in the same round. fio gets large pages from the C library, as the arena has: from small
ones, which lie apart, a virtual disk took requests of 1 MiB at most, and was half as fast in most runs.

fio is in the package of that name: `apt-get install fio`, `dnf install fio`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Spread, describe_machine, filesystem_of, print_table

from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine, Transfer
from windlass.offload.tier_file import BLOCK_BYTES, TierFile, TierFolder

FIO_DEPTH = 8
FILE_BYTES = 64 << 20
NUM_BUFFERS = 4
"""Whole files under way at a time: two that are read, updated and written, and what overlaps at their ends."""
KINDS = {"read": "read", "write": "write", "half and half": "rw"}
"""The names of the table, and fio's."""
SPEED_BAR = 0.9
CORES_BAR = 0.3


@dataclass(frozen=True)
class Figure:
    gb_per_s: float
    cores_per_gb_per_s: float
    """Cores busy for each GB/s: CPU seconds a GB."""


class Tiers:
    """Files with data, and an engine that moves them."""

    def __init__(self, folder: TierFolder, num_files: int) -> None:
        self.arena = Arena(NUM_BUFFERS * FILE_BYTES)
        self.buffers = [self.arena.allocate(FILE_BYTES) for _ in range(NUM_BUFFERS)]
        for buffer in self.buffers:
            buffer.data.random_(0, 256)
        self.files = [folder.create(FILE_BYTES) for _ in range(num_files)]
        self.move("write")

    def move(self, kind: str) -> None:
        """Moves all files once; half of them each way, in turn, for "half and half"."""
        under_way: deque[Transfer] = deque()
        for number, (file, is_read) in enumerate(self._plan(kind)):
            if len(under_way) == NUM_BUFFERS:
                under_way.popleft().wait()
            data = self.buffers[number % NUM_BUFFERS].data
            under_way.append(file.read(data) if is_read else file.write(data))
        for transfer in under_way:
            transfer.wait()

    def _plan(self, kind: str) -> Iterator[tuple[TierFile, bool]]:
        for number, file in enumerate(self.files):
            yield file, kind == "read" or (kind == "half and half" and number % 2 == 0)


def open_tiers(stack: ExitStack, folder: Path, num_threads: int, num_bytes: int) -> Tiers:
    """Closed with `stack`."""
    engine = Engine(num_threads)
    stack.callback(engine.close)
    tier_folder = TierFolder(folder, engine, f"benchmark-{num_threads}")
    stack.callback(tier_folder.close)
    if tier_folder.reason_not_direct is not None:
        raise SystemExit(f"{folder}: {tier_folder.reason_not_direct}; name another with --folder")
    return Tiers(tier_folder, num_bytes // FILE_BYTES)


def measure(files: Tiers, kind: str) -> Figure:
    begin, cpu = time.perf_counter(), cpu_s()
    files.move(kind)
    gigabytes = len(files.files) * FILE_BYTES / 1e9
    return Figure(gigabytes / (time.perf_counter() - begin), (cpu_s() - cpu) / gigabytes)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def fio(file: Path, num_bytes: int, kind: str) -> Figure:
    command = [
        "fio",
        "--name=benchmark",
        f"--filename={file}",
        f"--size={num_bytes}",
        f"--rw={KINDS[kind]}",
        f"--bs={BLOCK_BYTES}",
        f"--iodepth={FIO_DEPTH}",
        "--ioengine=libaio",
        "--direct=1",
        "--overwrite=1",
        "--output-format=json",
    ]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    job = json.loads(text[text.index("{") :])["jobs"][0]
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1000
    cores = (job["usr_cpu"] + job["sys_cpu"]) / 100
    return Figure(moved / seconds / 1e9, cores * seconds / (moved / 1e9))


def verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def row_of(kind: str, name: str, figures: dict[tuple[str, str], list[Figure]]) -> list[str]:
    mine, peers = figures[kind, name], figures[kind, "fio"]
    speed = Spread.of([figure.gb_per_s for figure in mine])
    cores = Spread.of([figure.cores_per_gb_per_s for figure in mine])
    if mine is peers:
        return [f"{kind}, {name}", speed.text(".2f"), "", "", "", cores.text(".2f"), "", ""]
    ratio = Spread.of([figure.gb_per_s / peer.gb_per_s for figure, peer in zip(mine, peers, strict=True)])
    return [
        f"{kind}, {name}",
        speed.text(".2f"),
        ratio.text(".2f"),
        f">= {SPEED_BAR}",
        verdict(ratio.median >= SPEED_BAR),
        cores.text(".2f"),
        f"<= {CORES_BAR}",
        verdict(cores.median <= CORES_BAR),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    if shutil.which("fio") is None:
        raise SystemExit("there is no fio to compare with: apt-get install fio, or dnf install fio")
    num_bytes = max(1, (options.megabytes << 20) // FILE_BYTES) * FILE_BYTES
    torch.set_num_threads(1)
    print(f"{describe_machine()}\n{num_bytes >> 20} MiB a round, {options.rounds} rounds, on "
          f"{filesystem_of(options.folder)}\n")  # fmt: skip

    figures: dict[tuple[str, str], list[Figure]] = {}
    with tempfile.TemporaryDirectory(prefix="windlass-direct-io-", dir=options.folder) as folder, ExitStack() as stack:
        file = Path(folder) / "fio"
        fio(file, num_bytes, "write")
        contenders: dict[str, Callable[[str], Figure]] = {"fio": functools.partial(fio, file, num_bytes)}
        for num_threads in options.threads:
            files = open_tiers(stack, Path(folder), num_threads, num_bytes)
            contenders[f"{num_threads} threads"] = functools.partial(measure, files)
        for number in range(options.rounds):
            for kind, name in itertools.product(KINDS, list(contenders)[:: 1 if number % 2 else -1]):
                figures.setdefault((kind, name), []).append(contenders[name](kind))
    order = [(kind, name) for kind in KINDS for name in contenders]
    header = ["", "GB/s (range)", "over fio (range)", "bar", "", "cores per GB/s (range)", "bar", ""]
    print_table(header, [row_of(kind, name, figures) for kind, name in order])


if __name__ == "__main__":
    main()
