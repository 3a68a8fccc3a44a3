"""What the erasure codec and the checksum take, beside a copy of the same data on the same thread.

    python benchmarks/codec.py [--rounds 15] [--megabytes 256] [--shards 4] [--engine isa-l|torch]

All figures are bytes of data (256 MB in k shards) a second, on one thread; in each round everything takes its turn, and
the ratio is to the copy of that round. A copy reads and writes the data once; encoding reads it once and writes m/k
of it, repairing m shards likewise. With `update`, shards arrive one by one and parity is read and written each time.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common import Spread, describe_machine, print_table

from windlass.checkpoint.codec.erasure import ENGINES, Codec
from windlass.checksum import crc32c

COPY = "memcpy"


@dataclass(frozen=True)
class Work:
    name: str
    run: Callable[[], object]
    bar: float | None = None
    """At least this many times the bytes a second of the copy."""


def room(count: int, num_bytes: int) -> np.ndarray:
    """(count, num_bytes) uint8 of shared pages, as slots in shared memory are."""
    return np.frombuffer(mmap.mmap(-1, count * num_bytes), np.uint8).reshape(count, num_bytes)


def contenders(shards: int, num_bytes: int, engine: str | None) -> list[Work]:
    length = num_bytes // shards // 64 * 64
    data, target = room(shards, length), room(shards, length)
    data[:] = np.random.default_rng(0).integers(0, 256, data.shape, dtype=np.uint8)
    places = [array.__array_interface__["data"][0] for array in (target, data)]
    work = [Work(COPY, lambda: ctypes.memmove(places[0], places[1], data.nbytes))]
    for num_parity, name, bar in ((1, "XOR", 0.9), (2, "RS", 0.7)):
        codec, parity = Codec(shards, num_parity, engine), room(num_parity, length)
        parity[:] = 0
        work += [
            Work(f"{name} m={num_parity} encode", encoder(codec, data, parity), bar),
            Work(f"{name} m={num_parity} update", updater(codec, data, parity)),
            Work(f"{name} m={num_parity} repair", repairer(codec, data, parity, target)),
        ]
    work.append(Work("crc32c", lambda: crc32c(data)))
    return work


def encoder(codec: Codec, data: np.ndarray, parity: np.ndarray) -> Callable[[], object]:
    return lambda: codec.encode(list(data), list(parity))


def updater(codec: Codec, data: np.ndarray, parity: np.ndarray) -> Callable[[], object]:
    def run() -> None:
        for index, shard in enumerate(data):
            codec.encode_update(index, shard, list(parity), first=index == 0)

    return run


def repairer(codec: Codec, data: np.ndarray, parity: np.ndarray, target: np.ndarray) -> Callable[[], object]:
    """Restores the first m data shards from the others, once checked to the byte."""
    lost = codec.num_parity_shards
    left = dict(enumerate([*data, *parity]))
    for index in range(lost):
        del left[index]

    def run() -> None:
        codec.reconstruct(left, dict(enumerate(target[:lost])))

    codec.encode(list(data), list(parity))
    run()
    if not np.array_equal(target[:lost], data[:lost]):
        raise AssertionError("the repaired shards are not those that were lost")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--engine", choices=ENGINES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_bytes = options.megabytes * 10**6
    work = contenders(options.shards, num_bytes, options.engine)
    engine = Codec(options.shards, 1, options.engine).engine
    print(f"{describe_machine()}\n{options.megabytes} MB in k = {options.shards} shards, {engine}, "
          f"{options.rounds} rounds\n")  # fmt: skip

    speeds: dict[str, list[float]] = {item.name: [] for item in work}
    for item in work:  # touches every page
        item.run()
    for _ in range(options.rounds):
        for item in work:
            begin = time.thread_time()  # of this thread, which neighbours on the machine do not lengthen as much
            item.run()
            speeds[item.name].append(num_bytes / (time.thread_time() - begin) / 1e9)
    rows = []
    for item in work:
        ratio = Spread.of([mine / copy for mine, copy in zip(speeds[item.name], speeds[COPY], strict=True)])
        bar = "" if item.bar is None else f">= {item.bar:g}"
        held = "" if item.bar is None else ("met" if ratio.median >= item.bar else "MISSED")
        rows.append([item.name, Spread.of(speeds[item.name]).text(".2f"), ratio.text(".2f"), bar, held])
    print_table(["", "GB/s of data (range)", "over memcpy (range)", "bar", ""], rows)


if __name__ == "__main__":
    main()
