"""The calls into autograd that torch does not export. When torch changes, this is the file to look at."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def is_in_backward() -> bool:
    """Tells if a backward pass is running in this thread, as when a checkpoint computes a forward again."""
    return torch._C._current_graph_task_id() != -1


def preserving_version(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """While it lasts autograd does not notice that `tensor`, which it may have saved, is written to."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)
