"""Is this machine fit to train? A check a line, each tried for real where that takes less than a second."""

from __future__ import annotations

import json
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from windlass import isal
from windlass.checkpoint.codec.erasure import Codec
from windlass.errors import EXIT_DONE, EXIT_FAILURE
from windlass.machine.control_groups import cpu_quota, memory_limit
from windlass.machine.measure import measure_speed
from windlass.machine.peak_flops import measured_matmul_flops
from windlass.machine.speeds import Machine, load_machine, machine_key, save_machine, ssd_key
from windlass.observe.console import size

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
NEWEST_TORCH_TESTED = (2, 15)

_MIB, _GIB = 2**20, 2**30
_WRITE_BYTES = 64 * _MIB
_WRITE_CHUNK_BYTES = 8 * _MIB
_WRITE_BUDGET_S = 1.5
_CODEC_SHARD_BYTES = 2 * _MIB
_GLOO_TIMEOUT = timedelta(seconds=3)
_OPTIONAL_PACKAGES = ("matplotlib", "wandb", "tokenizers", "ray", "deepspeed", "pyeclib")
_GPU_NODE = Path("/dev/nvidia0")
_SHM = Path("/dev/shm")


class Status(StrEnum):
    passed = "pass"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Check:
    """A finding. `fix` says what to do about a `warn` or a `fail`; None for a `pass`."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def diagnose(folder: Path | None = None, measure: bool = False) -> list[Check]:
    """Look the machine over, in well under 8 s. What cannot even be looked at is a `fail`.

    Args:
        folder: whose disk is tried, with up to 256 MiB in a file that is removed again; None is the current folder.
        measure: measure again what plans know of this machine's speed; else only what has never been measured.
    """
    folder = folder or Path.cwd()
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", lambda: check_torch_version(torch.__version__)),
        ("cpu", _cpu),
        ("memory", _memory),
        ("gpu", _gpu),
        ("gloo", _gloo),
        ("shared memory", _shared_memory),
        ("disk space", lambda: _disk_space(folder)),
        ("disk write", lambda: _disk_write(folder)),
        ("direct I/O", lambda: _direct_io(folder)),
        ("matmul", _matmul),
        ("speed", lambda: _speed(folder, measure)),
        ("erasure codec", _erasure_codec),
        ("limits", _limits),
        ("packages", _packages),
    ]
    return [_tried(name, look) for name, look in checks]


def exit_status(checks: list[Check]) -> int:
    """1 if any check failed, else 0: a warning does not keep anyone from training."""
    return EXIT_FAILURE if any(check.status is Status.fail for check in checks) else EXIT_DONE


def render(checks: list[Check], as_json: bool) -> str:
    """The checks as aligned text, or as JSON: `{"status": worst, "checks": [{name, status, detail, fix}]}`."""
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    if as_json:
        worst = next((s for s in (Status.fail, Status.warn) if counts[s]), Status.passed)
        return json.dumps({"status": worst, "checks": [asdict(check) for check in checks]}, indent=2)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        status = check.status if check.status is Status.passed else check.status.upper()
        lines.append(f"{status}  {check.name:<{width}}  {check.detail}")
        if check.fix is not None:
            lines.append(f"{'':{width + 6}}  fix: {check.fix}")
    summary = f"{counts[Status.passed]} passed, {counts[Status.warn]} to note, {counts[Status.fail]} failed"
    return "\n".join([*lines, summary])


def _tried(name: str, look: Callable[[], Check]) -> Check:
    """A machine that a check cannot cope with is what the check is for: it fails, and the others go on."""
    try:
        return look()
    except Exception as error:
        fix = "mend what the message names, or report it if it is not the machine's fault"
        return Check(name, Status.fail, f"{type(error).__name__}: {error}".splitlines()[0], fix)


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", Status.fail, version, f"install Python {oldest} or newer")
    return Check("python", Status.passed, f"{version} on {platform.system()} {platform.machine()}")


def check_torch_version(version: str) -> Check:
    """Checks that windlass runs on torch `version`, and was tested there."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST_TORCH, NEWEST_TORCH_TESTED))
    if release < OLDEST_TORCH:
        return Check("torch", Status.fail, f"{version} is too old", f'pip install "torch>={oldest}"')
    if release > NEWEST_TORCH_TESTED:
        detail = f"{version} is newer than {newest}, the newest tested"
        return Check("torch", Status.warn, detail, f'if something fails, pip install "torch<={newest}"')
    return Check("torch", Status.passed, version)


def _cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    detail = f"{cores} usable cores, {threads} torch threads a process, "
    detail += f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    quota = cpu_quota()
    if quota is not None:
        detail += f", container quota {quota:g} cores"
    limit = cores if quota is None else min(cores, max(1.0, quota))
    if threads > limit:
        return Check("cpu", Status.warn, detail, f"set OMP_NUM_THREADS={int(limit)}: more threads only wait")
    return Check("cpu", Status.passed, detail)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{size(memory.available)} of {size(memory.total)} available"
    free = memory.available
    limit, used = memory_limit()
    if limit is not None and limit < memory.total:
        detail += f", container limit {size(limit)} ({size(used)} in use)"
        free = min(free, limit - used)
    if free < 2 * _GIB:
        fix = "end other programs, or raise the container's memory limit"
        return Check("memory", Status.fail if free < _GIB // 2 else Status.warn, detail, fix)
    return Check("memory", Status.passed, detail)


def _gpu() -> Check:
    if not torch.cuda.is_available():
        if _GPU_NODE.exists():
            detail = f"there is a GPU, which torch {torch.__version__} does not see"
            return Check("gpu", Status.warn, detail, "install a CUDA build of torch that the driver supports")
        return Check("gpu", Status.passed, "none: training runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({size(free)} of {size(total)} free)")
    detail = ", ".join(names)
    if not dist.is_nccl_available():
        fix = "install a build of torch with NCCL, or train with one GPU"
        return Check("gpu", Status.warn, f"{detail}; no NCCL", fix)
    return Check("gpu", Status.passed, f"{detail}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")


def _gloo() -> Check:
    """An all-reduce between two ranks, each a thread of this process: they meet over the network as ranks do."""
    begin = time.perf_counter()
    results: dict[int, float | Exception] = {}

    def member(rank: int, path: str) -> None:
        try:
            group = dist.ProcessGroupGloo(dist.FileStore(path, 2), rank, 2, _GLOO_TIMEOUT)
            value = torch.tensor([rank + 1.0])
            group.allreduce([value]).wait()  # pyrefly: ignore[missing-attribute]
            results[rank] = value.item()
        except Exception as error:  # told from the thread that asked
            results[rank] = error

    with tempfile.TemporaryDirectory() as folder:
        members = [threading.Thread(target=member, args=(r, f"{folder}/store"), daemon=True) for r in (0, 1)]
        for thread in members:
            thread.start()
        for thread in members:
            thread.join(2 * _GLOO_TIMEOUT.total_seconds())
    error = next((result for result in results.values() if isinstance(result, Exception)), None)
    if error is None and results == {0: 3.0, 1: 3.0}:
        detail = f"all-reduce of 2 ranks works ({1000 * (time.perf_counter() - begin):.0f} ms)"
        return Check("gloo", Status.passed, detail)
    detail = str(error).splitlines()[0] if error else f"an all-reduce came out as {results}, or not in time"
    fix = "set GLOO_SOCKET_IFNAME=lo (or the network's interface), and let the host's name resolve"
    return Check("gloo", Status.fail, detail, fix)


def _shared_memory() -> Check:
    if not _SHM.is_dir():
        fix = "mount a tmpfs there: checkpoint=lazy and erasure keep their copies in it"
        return Check("shared memory", Status.warn, f"there is no {_SHM}", fix)
    usage = shutil.disk_usage(_SHM)
    detail = f"{size(usage.free)} of {size(usage.total)} free in {_SHM}"
    if usage.free < _GIB:
        fix = "remount it larger: `docker run --shm-size=16g`, or `mount -o remount,size=16g /dev/shm`"
        return Check("shared memory", Status.warn, detail, fix)
    return Check("shared memory", Status.passed, detail)


def _disk_space(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    detail = f"{size(usage.free)} of {size(usage.total)} free here"
    if usage.free < 5 * _GIB:
        fix = "free space, or put run_dir and checkpoint.dir on another disk"
        return Check("disk space", Status.fail if usage.free < _GIB // 2 else Status.warn, detail, fix)
    return Check("disk space", Status.passed, detail)


def _disk_write(folder: Path) -> Check:
    chunk = os.urandom(_WRITE_CHUNK_BYTES)  # disks and file systems that compress would flatter zeros
    written = 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".windlass-doctor-", buffering=0) as file:
        begin = time.perf_counter()
        while written < _WRITE_BYTES and time.perf_counter() - begin < _WRITE_BUDGET_S:
            written += os.write(file.fileno(), chunk)
            os.fsync(file.fileno())
        rate = written / (time.perf_counter() - begin)
    detail = f"{size(rate)}/s with fsync ({size(written)} written here)"
    if rate < 50 * _MIB:
        fix = "put checkpoint.dir on a faster disk, or persist less often (checkpoint.persist_every)"
        return Check("disk write", Status.warn, detail, fix)
    return Check("disk write", Status.passed, detail)


def _direct_io(folder: Path) -> Check:
    fix = "put offload.dir on a local disk (ext4, xfs): else the page cache takes memory from training"
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return Check("direct I/O", Status.warn, "this system has no O_DIRECT", fix)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".windlass-doctor-") as file, mmap.mmap(-1, _MIB) as page:
        try:
            fd = os.open(file.name, os.O_WRONLY | flag)
        except OSError as error:
            return Check("direct I/O", Status.warn, f"O_DIRECT is refused here ({error.strerror})", fix)
        try:
            written = os.write(fd, page)  # an anonymous mapping begins at a page, as O_DIRECT wants it
        except OSError as error:
            return Check("direct I/O", Status.warn, f"O_DIRECT writes fail here ({error.strerror})", fix)
        finally:
            os.close(fd)
    return Check("direct I/O", Status.passed, f"O_DIRECT works here ({size(written)} written)")


def _matmul() -> Check:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fp32, bf16 = (measured_matmul_flops(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    detail = f"{fp32 / 1e9:,.0f} GFLOP/s float32, {bf16 / 1e9:,.0f} GFLOP/s bfloat16 on {device}"
    if bf16 < fp32:
        fix = "train with train.dtype=float32: bfloat16 is slower here"
        return Check("matmul", Status.warn, detail, fix)
    return Check("matmul", Status.passed, detail)


def _speed(folder: Path, measure: bool) -> Check:
    """Checks the speeds that `windlass plan` reckons with."""
    machine = Machine(machine_key()) if measure else load_machine()
    measure_speed(machine, folder)
    save_machine(machine)
    ssd = machine.ssd[ssd_key(folder)]
    assert machine.memcpy_bytes_per_s is not None
    detail = f"SSD here {size(ssd['read_bytes_per_s'])}/s read, {size(ssd['write_bytes_per_s'])}/s written"
    detail += f"{'' if ssd['is_direct'] else ' through the page cache'}, memory {size(machine.memcpy_bytes_per_s)}/s"
    if machine.host_to_device_bytes_per_s is not None:
        detail += f", to the GPU {size(machine.host_to_device_bytes_per_s)}/s"
        detail += f" and back {size(machine.device_to_host_bytes_per_s)}/s"
    return Check("speed", Status.passed, f"{detail} (kept for plans; --measure measures again)")


def _erasure_codec() -> Check:
    """A small encode, the fastest of three: k = 4, m = 2."""
    codec = Codec(4, 2)
    data, parity = (torch.ones(count, _CODEC_SHARD_BYTES, dtype=torch.uint8) for count in (4, 2))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        codec.encode(list(data), list(parity))
        seconds.append(time.perf_counter() - begin)
    detail = f"{codec.engine}: {data.nbytes / min(seconds) / 1e9:.2g} GB/s of data with 4 + 2 shards on one thread"
    if codec.engine != "isa-l":
        return Check("erasure codec", Status.warn, f"{detail}, for want of ISA-L", isal.FIX)
    return Check("erasure codec", Status.passed, detail)


def _limits() -> Check:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    detail = f"{'unlimited' if files == unlimited else files} open files, "
    detail += f"{'unlimited' if locked == unlimited else size(locked)} locked memory"
    if files != unlimited and files < 4096:
        return Check("limits", Status.warn, detail, "run `ulimit -n 65536` before training")
    return Check("limits", Status.passed, detail)


def _packages() -> Check:
    found, missing = [], []
    for name in _OPTIONAL_PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    detail = ", ".join(found) or "none of the optional ones"
    return Check("packages", Status.passed, detail + (f"; not installed: {', '.join(missing)}" if missing else ""))
