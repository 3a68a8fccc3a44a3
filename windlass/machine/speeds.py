"""Keeps this machine's measured speeds in a file, so that plans need not measure again.

An entry is of one host, CPU, GPU and torch: another of any of them is another machine.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from windlass.files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

FORMAT = 3
"""The format of the file; what is in another format is measured anew."""


@dataclass
class Machine:
    """Figures of one machine. Those that are None or missing have not been measured."""

    key: str
    process_bytes: dict[str, int] = field(default_factory=dict)
    """The host memory of a rank in training that is not for its tensors, by `process_kind`."""
    process_end_bytes: dict[str, int] = field(default_factory=dict)
    """The same at the end, when the report is drawn; of a run of one rank."""
    op_overhead_s: float | None = None
    """The cost of a call of an operator besides its kernel: Python, autograd, the dispatcher."""
    op_s: dict[str, float] = field(default_factory=dict)
    """Seconds of an operator's call by threads and `Op.key`."""
    matmul_flops: dict[str, float] = field(default_factory=dict)
    """FLOP/s of large matrix products, by dtype."""
    memcpy_bytes_per_s: float | None = None
    """Read and written bytes together, one thread."""
    gloo_bytes_per_s: float | None = None
    """Logical bytes a second of a collective between two ranks of this machine."""
    ssd: dict[str, dict[str, float]] = field(default_factory=dict)
    """Disks, by device of a folder: `read_bytes_per_s` and `write_bytes_per_s` with O_DIRECT, and the processor's
    `cpu_s_per_byte` of reading or writing and checking one."""
    host_to_device_bytes_per_s: float | None = None
    device_to_host_bytes_per_s: float | None = None


def machine_file() -> Path:
    """`machine.json` in `cache_folder`. Raises FileNotFoundError for a user without a home."""
    folder = cache_folder()
    if folder is None:
        raise FileNotFoundError("HOME is not set, and this user has no other home")
    return folder / "machine.json"


def machine_key() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.node()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores, {gpu}, torch {torch.__version__}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def process_kind(num_ranks: int, dtype: str) -> str:
    """The kind of a process, on which its own memory depends: it talks to others or not, and whose kernels it runs."""
    return f"{'one rank' if num_ranks == 1 else 'several ranks'}, {dtype}"


def ssd_key(folder: Path) -> str:
    """The device that `folder` lies on."""
    number = existing_folder(folder).stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def existing_folder(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def load_machine() -> Machine:
    """Reads what is kept of this machine; empty where there is nothing, or nothing that can be read."""
    key = machine_key()
    entry = _entries().get(key)
    known = set(Machine.__dataclass_fields__)
    return Machine(**{name: value for name, value in entry.items() if name in known}) if entry else Machine(key)


def save_machine(machine: Machine) -> None:
    """Keeps `machine` beside what the file has of others; whole or not at all. Not where a cache cannot be written."""
    try:
        path = machine_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _entries() | {machine.key: asdict(machine)}
        with atomic_file(path) as file:
            file.write(json.dumps({"format": FORMAT, "machines": entries}, indent=1).encode())
    except OSError as error:
        logger.warning("what this machine was measured at is not kept: %s", error)


def _entries() -> dict[str, dict[str, Any]]:
    try:
        kept = json.loads(machine_file().read_text())
    except (OSError, ValueError):  # a cache: what cannot be read is measured again
        return {}
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        return {}
    return kept["machines"]
