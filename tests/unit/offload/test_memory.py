"""A step takes the memory of its buffers, and not of the state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import psutil, torch
from windlass.offload.direct_io import Engine
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tier_file import TierFolder

MIB = 1 << 20
parameters = [torch.nn.Parameter(torch.ones(2 * MIB)) for _ in range(16)]  # 8 MiB each
for parameter in parameters:
    parameter.grad = torch.full_like(parameter, 0.5)
gradients = [parameter.grad for parameter in parameters]  # or their memory would make room for state
optimizer = torch.optim.AdamW(parameters, fused=True)
if sys.argv[2] == "ssd":
    folder = TierFolder(Path(sys.argv[1]), Engine(), "optimizer")
    order = [[parameter] for parameter in parameters]  # a bucket of 16 MiB each
    optimizer = OffloadedOptimizer(optimizer, folder, order=order, buffer_bytes=32 * MIB, max_host_bytes=0)
    assert optimizer.reserve() == 256 * MIB
    optimizer.owns_folder = True
before = psutil.Process().memory_info().rss
for _ in range(2):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
# Not ru_maxrss, which begins with what the process that started this one had.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
if sys.argv[2] == "ssd":
    optimizer.close()
"""
MIB = 1 << 20


def growth(folder: Path, tier: str) -> int:
    """Bytes that a process grew by at most, in its steps, beyond its weights and gradients."""
    command = [sys.executable, "-c", SCRIPT, str(folder), tier]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_step_takes_the_memory_of_its_buffers(tmp_path: Path) -> None:
    """256 MiB of state, 32 MiB of buffers."""
    assert growth(tmp_path, "memory") > 240 * MIB, "which is how much it would take"
    assert growth(tmp_path, "ssd") < (32 + 16 + 4) * MIB, "buffers, temporaries of a bucket, and little else"
    assert list(tmp_path.iterdir()) == []
