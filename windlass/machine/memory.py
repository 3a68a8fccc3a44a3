"""Finds how much memory this host has for us."""

from __future__ import annotations

import psutil

from windlass.machine.control_groups import memory_limit

LOW_WATER_FRACTION = 0.02
"""Host memory that a step must leave free; below it Linux may kill any process without a word."""


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of this host, or of the control group that it confines us to."""
    memory = psutil.virtual_memory()
    limit, used = memory_limit()
    if limit is None:
        return memory.available, memory.total
    return min(memory.available, limit - used), min(memory.total, limit)
