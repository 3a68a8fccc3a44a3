"""Measures how fast this machine moves bytes and multiplies matrices, once, and keeps it for plans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from windlass.machine.peak_flops import measured_matmul_flops
from windlass.machine.speeds import Machine, ssd_key
from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine
from windlass.offload.tier_file import TierFolder

SSD_BYTES = 256 << 20
"""The size of the file that a disk is tried with."""
COPY_BYTES = 64 << 20
ROUNDS = 3


def measure_speed(machine: Machine, folder: Path) -> None:
    """Adds to `machine` what it has not got of the disk of `folder`, memory, matrix products and the GPU's bus.

    Raises:
        DoesNotFit: the disk has no room for a file to try it with.
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
        DoesNotFit: the disk has no room for the file.
        OffloadError: the folder cannot be written to.
    """
    engine, arena = Engine(), Arena(SSD_BYTES)
    with contextlib.ExitStack() as stack:
        stack.callback(arena.close)
        stack.callback(engine.close)
        tier = TierFolder(folder, engine, "windlass-speed")
        stack.callback(tier.close)
        file, buffer = tier.create(SSD_BYTES), arena.allocate(SSD_BYTES)
        # Disks that compress would flatter zeros. A run's own random numbers stay as they are.
        buffer.data.view(torch.int64).random_(generator=torch.Generator())
        cpu_begin = time.process_time()
        write_s = _best_s(lambda: file.write(buffer.data).wait())
        read_s = _best_s(lambda: file.read(buffer.data).wait())
        cpu_s = (time.process_time() - cpu_begin) / (2 * ROUNDS * SSD_BYTES)
    return {
        "read_bytes_per_s": SSD_BYTES / read_s,
        "write_bytes_per_s": SSD_BYTES / write_s,
        "cpu_s_per_byte": cpu_s,
        "is_direct": tier.reason_not_direct is None,
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
    """The rate from pinned host memory to the GPU, and back."""
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
