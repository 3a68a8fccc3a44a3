"""What plans take gloo's collectives to copy, beside what they copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from windlass.parallel import fsdp_shim
from windlass.plan.recorder import Recorder, Trace

MIB = 1 << 20
NUM_BYTES = 64 * MIB
"""More than glibc keeps of what is given back."""
COLLECTIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "all_gather": fsdp_shim._all_gather,
    "reduce_scatter": lambda whole, part: fsdp_shim._reduce_scatter(part, whole),
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
    "broadcast": lambda whole, part: dist.broadcast(whole, 0),
}


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(NUM_BYTES // 4), torch.ones(NUM_BYTES // 8)


def growth(name: str) -> int:
    """Bytes by which a rank's peak is above what it held before a collective."""
    dist.init_process_group("gloo")
    whole, part = tensors()
    dist.all_reduce(torch.ones(8))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    COLLECTIVES[name](whole, part)
    peak = status("VmHWM")
    dist.destroy_process_group()
    return peak - before


def status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_plan_counts_what_gloo_copies(name: str) -> None:
    trace = Trace()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with FakeTensorMode():
            whole, part = tensors()
            recorder = Recorder(trace)
            recorder.take(whole)
            recorder.take(part)
            trace.memory.clear()
            with recorder:
                COLLECTIVES[name](whole, part)
    finally:
        dist.destroy_process_group()
    planned = sum(event.num_bytes for event in trace.memory if event.kind.value == "take")
    for measured in run_ranks(growth, 2, name):
        assert abs(measured - planned) < 8 * MIB, (name, measured, planned)
