"""Tensors that a checkpoint, or a folder of another program's, says it has: their dtypes, and room for them."""

from __future__ import annotations

import math

import psutil
import torch

from windlass.checkpoint.image import DTYPE_BYTES
from windlass.errors import DoesNotFit

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
"""The dtypes by the names that checkpoints use: what a checkpoint names is looked up nowhere else."""


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> torch.Tensor:
    """An uninitialised tensor on the CPU.

    Raises:
        DoesNotFit: it is larger than the machine's memory, or the system does not give so much.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    total = psutil.virtual_memory().total
    try:
        if num_bytes <= total:
            return torch.empty(shape, dtype=dtype)
        rule = f"this machine has {total / 2**30:,.0f} GiB of memory"
    except (RuntimeError, MemoryError):
        rule = "the system does not give so much memory"
    raise DoesNotFit(name, f"{num_bytes / 2**30:,.1f} GiB", rule, "free memory, or raise `ulimit -v`")
