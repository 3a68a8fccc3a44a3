"""What lies outside of the device's memory, and where. Torch-free."""

from __future__ import annotations

from enum import StrEnum

MIB = 1 << 20


class OffloadKind(StrEnum):
    none = "none"
    cpu = "cpu"
    """In host memory."""
    ssd = "ssd"
    """On a disk, but for what `max_host_bytes` leaves room for."""
