"""What must be the same on all nodes of a job. Torch-free."""

from __future__ import annotations

import platform
from importlib import metadata

import windlass

VERSIONS = ("windlass", "torch", "python")


def versions() -> dict[str, str]:
    """Of this process, by the names in `VERSIONS`, without importing what takes long."""
    return {
        "windlass": windlass.__version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }
