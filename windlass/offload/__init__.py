"""Training state that lies outside of the device's memory: in host memory, or on an SSD."""

from typing import Any

_HOMES = {"OffloadedOptimizer": "optimizer", "offload_optimizer": "optimizer"}

__all__ = ["OffloadedOptimizer", "offload_optimizer"]


def __getattr__(name: str) -> Any:
    # Lazily: the configuration imports `windlass.offload.config`, and with it this file, without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
