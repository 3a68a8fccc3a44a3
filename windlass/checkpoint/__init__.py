"""Checkpoints: what a run needs to go on, written so that a reader finds all of it or none.

from windlass.checkpoint import Checkpointer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windlass.checkpoint.manager import Checkpointer

__all__ = ["Checkpointer"]


def __getattr__(name: str) -> Any:
    # Late, because the configuration imports this package and must not wait for torch.
    if name == "Checkpointer":
        from windlass.checkpoint.manager import Checkpointer

        return Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
