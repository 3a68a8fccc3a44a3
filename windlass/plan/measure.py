"""Measures what no trace tells a plan of this machine: once, in less than a minute, and keeps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.errors import DoesNotFit
from windlass.machine.measure import measure_speed
from windlass.machine.speeds import Machine, process_kind, save_machine
from windlass.models.config import LlamaConfig
from windlass.models.llama import Llama
from windlass.observe.metrics import METRICS_FILE
from windlass.train.config import DType

_NOTHING = ("model=tiny", "model.vocab_size=320", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2")
"""A model that takes no memory to speak of, so that all that its process holds is the process's own."""
_GLOO_BYTES = 32 << 20
_GLOO_TIMEOUT = timedelta(seconds=30)
_OVERHEAD_STEPS = 20


def measure_machine(machine: Machine, num_ranks: int, dtype: DType, folder: Path) -> None:
    """Adds what is missing for plans of `num_ranks` ranks that compute in `dtype` to `machine`, and keeps it.

    Args:
        folder: whose disk is measured.

    Raises:
        DoesNotFit: not even a model of no size trains here. OffloadError: the folder cannot be written to.
    """
    kind = process_kind(num_ranks, dtype)
    if kind not in machine.process_bytes:
        machine.process_bytes[kind], end_bytes = _process_bytes(min(2, num_ranks), dtype)
        if num_ranks == 1:
            machine.process_end_bytes[kind] = end_bytes
    if machine.op_overhead_s is None:
        machine.op_overhead_s = _op_overhead_s()
    if machine.gloo_bytes_per_s is None:
        machine.gloo_bytes_per_s = _gloo_bytes_per_s()
    measure_speed(machine, folder)
    save_machine(machine)


def _process_bytes(num_ranks: int, dtype: DType) -> tuple[int, int]:
    """Resident memory of a rank while it trains, and at most, of a run that is made for this."""
    with tempfile.TemporaryDirectory(prefix="windlass-plan-") as folder:
        text = Path(folder) / "text.jsonl"
        text.write_text((json.dumps({"text": "The anchor holds. " * 64}) + "\n") * 64)
        command = [sys.executable, "-P", "-m", "windlass.cli", "train", *_NOTHING, "data=text", f"data.path={text}"]
        command += [f"data.cache_dir={folder}/cache", f"run_dir={folder}/run", "checkpoint=none"]
        command += [
            f"train.dtype={dtype}",
            "train.steps=4",
            "train.log_every=1",
            "train.batch_size=1",
            "train.seq_len=16",
        ]
        command += ["train.eval_every=0", "train.eval_samples=1", "metrics.console=plain", "metrics.peak_flops=1e12"]
        if num_ranks > 1:
            command += ["launch=torchrun", f"launch.nproc_per_node={num_ranks}", "parallel=zero3"]
        with (Path(folder) / "output").open("w+b") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                output.seek(0)
                raise DoesNotFit(
                    "plan",
                    "...",
                    f"the smallest training run failed here: {output.read().decode(errors='replace')[-500:]}",
                    "run `windlass doctor`",
                )
        lines = (Path(folder) / "run" / METRICS_FILE).read_text().splitlines()
        resident = [json.loads(line).get("memory/host_rss_bytes", 0) for line in lines]
    return max(resident), 1024 * usage.ru_maxrss


class _Calls(TorchDispatchMode):
    """Counts calls of operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _op_overhead_s() -> float:
    """Seconds that a call of an operator takes in a training step when its tensors are next to nothing."""
    model = Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_layers=4, num_heads=2))
    ids, counter = torch.zeros(1, 4, dtype=torch.int64), _Calls()
    with counter:
        model(ids).sum().backward()
    seconds = []
    for _ in range(_OVERHEAD_STEPS):
        begin = time.thread_time()
        model(ids).sum().backward()
        seconds.append(time.thread_time() - begin)
    return median(seconds) / counter.count


def _gloo_bytes_per_s() -> float:
    """Logical bytes a second of an all-gather between two ranks, each a thread of this process."""
    seconds: list[float] = []

    def member(rank: int, path: str) -> None:
        group = dist.ProcessGroupGloo(dist.FileStore(path, 2), rank, 2, _GLOO_TIMEOUT)
        part = torch.ones(_GLOO_BYTES // 2, dtype=torch.uint8)
        whole = torch.empty(_GLOO_BYTES, dtype=torch.uint8)
        for _ in range(4):
            begin = time.perf_counter()
            group._allgather_base(whole, part).wait()  # pyrefly: ignore[missing-attribute]
            seconds.append(time.perf_counter() - begin)

    with tempfile.TemporaryDirectory() as folder:
        members = [threading.Thread(target=member, args=(rank, f"{folder}/store")) for rank in (0, 1)]
        for thread in members:
            thread.start()
        for thread in members:
            thread.join()
    return _GLOO_BYTES / 2 / min(seconds[2:])
