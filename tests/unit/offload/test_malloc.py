from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

HAS_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")

# The setting is of the whole process, so the test has one of its own. Small tensors that stay, each after a large one
# that is freed, keep the heap from shrinking.
SCRIPT = """
import sys
import psutil
import torch
from windlass.offload.malloc import free_to_system, give_back_free_memory

MIB = 1 << 20
if sys.argv[1] == "at once":
    free_to_system(MIB)
torch.ones(7 * MIB)  # freed: from here on glibc keeps pieces of this size
large, small = [], []
for _ in range(50):
    large.append(torch.ones(MIB // 2))
    small.append(torch.ones(4096))
before = psutil.Process().memory_info().rss
large.clear()
if sys.argv[1] == "later":
    give_back_free_memory()
print((before - psutil.Process().memory_info().rss) // MIB)
"""


def freed_mib(when: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, when], check=True, capture_output=True, text=True, timeout=120)
    return int(done.stdout)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(not HAS_GLIBC, reason="needs glibc's malloc")
def test_what_is_freed_goes_back_to_the_system() -> None:
    assert freed_mib("at once") >= 90, "of 100"
    assert freed_mib("later") >= 90, "of 100"
    assert freed_mib("no") < 50, "or nothing would have to be done"
