"""The process that workers are forked from: it has imported what they need, once a node and job.

A worker that is forked starts in a moment where a fresh interpreter imports for seconds, which counts in every restart,
and the pages of code are shared between ranks. Nothing that is imported may begin threads or touch a GPU.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

MODULES = (
    "windlass.launch.worker",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._inductor",  # what `torch.use_deterministic_algorithms` imports, most of the start of a rank
)


def fork_context() -> ForkServerContext:
    """Where to start processes from; its server begins with the first of them, in this process's environment then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    return context
