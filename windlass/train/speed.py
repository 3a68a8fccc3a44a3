"""How fast this machine moves bytes and multiplies matrices, measured once and kept for plans."""

from __future__ import annotations

import functools
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch

from windlass.checksum import crc32c
from windlass.offload.direct_io import DirectFile, Engine, disk_error, why_not_direct
from windlass.train.flops import measured_matmul_flops
from windlass.train.machine import Machine, ssd_key

SSD_BYTES = 256 << 20
"""Of the file that a disk is tried with."""
PART_BYTES = 4 << 20
"""As tiers are read and written (`windlass.offload.tier_file`)."""
COPY_BYTES = 64 << 20
ROUNDS = 3


def measure_speed(machine: Machine, folder: Path) -> None:
    """Adds to `machine` what it has not got of the disk of `folder`, memory, matrix products and the GPU's bus.

    Raises:
        OffloadError: the folder cannot be written to.
    """
    key = ssd_key(folder)
    if key not in machine.ssd:
        machine.ssd[key] = ssd_speed(folder)
    if machine.memcpy_bytes_per_s is None:
        machine.memcpy_bytes_per_s = memcpy_bytes_per_s()
    if not machine.matmul_flops:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine.matmul_flops = {
            name: measured_matmul_flops(device, getattr(torch, name)) for name in ("float32", "bfloat16")
        }
    if torch.cuda.is_available() and machine.host_to_device_bytes_per_s is None:
        machine.host_to_device_bytes_per_s, machine.device_to_host_bytes_per_s = bus_bytes_per_s()


def ssd_speed(folder: Path) -> dict[str, float]:
    """Writes and reads a file as tiers do, with checksums, past the page cache where the file system allows it.

    Raises:
        OffloadError: the folder cannot be written to.
    """
    is_direct, engine = why_not_direct(folder) is None, Engine()
    path = folder / f".windlass-speed-{secrets.token_hex(4)}"
    pages = mmap.mmap(-1, SSD_BYTES)  # of its full size: a part that stays in the cache is checked faster
    pages[:] = os.urandom(PART_BYTES) * (SSD_BYTES // PART_BYTES)  # disks that compress would flatter zeros
    offsets, data = range(0, SSD_BYTES, PART_BYTES), memoryview(pages)

    def write(offset: int) -> None:
        part = data[offset : offset + PART_BYTES]
        crc32c(part)
        file.write_from(part, offset)

    def read(offset: int) -> None:
        part = data[offset : offset + PART_BYTES]
        file.read_into(part, offset)
        crc32c(part)

    try:
        file = DirectFile(path, SSD_BYTES, is_direct, engine.figures)
        writes = [functools.partial(write, offset) for offset in offsets]
        reads = [functools.partial(read, offset) for offset in offsets]
        cpu_begin = time.process_time()
        write_s = _best_s(lambda: engine.submit(*writes).wait())
        read_s = _best_s(lambda: engine.submit(*reads).wait())
        cpu_s = (time.process_time() - cpu_begin) / (2 * ROUNDS * SSD_BYTES)
        file.close()
    except OSError as error:
        raise disk_error(folder, f"cannot make a file of {SSD_BYTES} bytes", error) from error
    finally:
        engine.close()
        path.unlink(missing_ok=True)
    return {
        "read_bytes_per_s": SSD_BYTES / read_s,
        "write_bytes_per_s": SSD_BYTES / write_s,
        "cpu_s_per_byte": cpu_s,
        "is_direct": is_direct,
    }


def memcpy_bytes_per_s() -> float:
    """Bytes read and written together by one thread's copies into fresh memory, as a step's kernels make them."""
    source, threads = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2 * COPY_BYTES / _best_s(source.clone)
    finally:
        torch.set_num_threads(threads)


def bus_bytes_per_s() -> tuple[float, float]:
    """From pinned host memory to the GPU, and back."""
    host = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    device = host.cuda()

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)
        torch.cuda.synchronize()

    return COPY_BYTES / _best_s(lambda: copy(device, host)), COPY_BYTES / _best_s(lambda: copy(host, device))


def _best_s(call: Callable[[], object]) -> float:
    """The fastest of a few rounds, since other programs only slow down."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
