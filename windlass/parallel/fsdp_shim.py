"""The calls into FSDP2 that torch does not export. When torch changes, this is the file to look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from windlass.parallel.collectives import COMM
from windlass.parallel.waiting import WAITED

# torch 2.13 renamed both; the old names still work but warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Allocate:
    """Plain allocations for a collective's buffers."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Allocate, AllGather):
    """FSDP2's default all-gather, counted. On a CPU its call waits; on a GPU a stream of its own does."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        COMM.add("all_gather", output_tensor.nbytes, group.size())
        with _host_waits(output_tensor.device):
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedReduceScatter(_Allocate, ReduceScatter):
    """FSDP2's default reduce-scatter, counted, and where there are replicas the all-reduce that follows it.

    Args:
        num_replicas: over how many FSDP2 reduces on what was scattered.
    """

    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._ready = 0.0
        """When the buffer was there that the all-reduce begins with."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = super().allocate(size, dtype=dtype, device=device)
        self._ready = time.perf_counter()  # the last: a single shard is not scattered but copied there
        return buffer

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        COMM.add("reduce_scatter", input_tensor.nbytes, group.size())
        with _host_waits(input_tensor.device):
            work = _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        self._ready = time.perf_counter()
        return work

    def after_all_reduce(self, buffer: torch.Tensor) -> None:
        """FSDP2's hook, called with the buffer that it has just all-reduced over the replicas."""
        COMM.add("all_reduce", buffer.nbytes, self.num_replicas)
        if buffer.device.type == "cpu":
            WAITED.add(time.perf_counter() - self._ready)


def _host_waits(device: torch.device) -> AbstractContextManager[None]:
    """Nobody here asks FSDP2 for `async_op`, so with gloo a collective is over when its call returns."""
    return WAITED.host() if device.type == "cpu" else nullcontext()


def count_collectives(module: FSDPModule, num_replicas: int) -> None:
    """Makes the collectives of one `fully_shard`ed module add themselves to `COMM` and `WAITED`."""
    reduce_scatter = CountedReduceScatter(num_replicas)
    module.set_custom_all_gather(CountedAllGather())
    module.set_custom_reduce_scatter(reduce_scatter)
    if num_replicas > 1:
        module.set_all_reduce_hook(reduce_scatter.after_all_reduce)
    for group in _param_groups(module):
        if group.device.type == "cuda":
            _count_stream_waits(group)


def _param_groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has several
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def _count_stream_waits(group: Any) -> None:
    """Has the compute stream's waits for this group's collectives counted: for its weights, and for its gradients.

    Each wrapper waits for what the wrapped method is about to wait for, which then finds it done: nothing that the
    method enqueues after its wait is counted.
    """
    wait_for_unshard, post_backward, finalize = group.wait_for_unshard, group.post_backward, group.finalize_backward

    def wait_for(event: torch.Event | None) -> None:
        if event is not None:
            with WAITED.stream():
                group.device_handle.current_stream().wait_event(event)

    def counted_wait_for_unshard() -> None:
        if group._all_gather_result is not None:
            wait_for(group._all_gather_result.all_gather_event)
        wait_for_unshard()

    def counted_post_backward(*unused: Any) -> None:
        # Before it reduces, it waits for the buffer of a module before; torch 2.13 made one such module a list.
        context = group.comm_ctx
        states = getattr(context, "reduce_scatter_states", None)
        if states is None:
            states = [context.reduce_scatter_state] if context.reduce_scatter_state is not None else []
        if group.reduce_grads and len(states) >= getattr(context, "reduce_scatter_max_input_buffers", 1):
            wait_for(states[0].event)
        post_backward(*unused)

    def counted_finalize() -> None:
        with WAITED.stream():
            finalize()

    group.wait_for_unshard, group.post_backward = counted_wait_for_unshard, counted_post_backward
    group.finalize_backward = counted_finalize


def around_unshard(module: FSDPModule, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Has `before` run when a `fully_shard`ed module is about to read its shards, and `after` when it has read them.

    Hooks on the module come too late for that: FSDP2 gathers a module's weights ahead of its backward.
    """
    for group in _param_groups(module):
        _wrap_unshard(group, before, after)


def _wrap_unshard(group: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    unshard, wait = group.unshard, group.wait_for_unshard

    def unshard_between(async_op: bool = False) -> None:
        is_needed = group._all_gather_result is None and not group.is_unsharded
        if is_needed:
            before()
        unshard(async_op)
        if is_needed and group._all_gather_result is None:  # it was not for now
            after()

    def wait_and_tell() -> None:
        is_gathering = group._all_gather_result is not None
        wait()
        if is_gathering:
            after()

    group.unshard, group.wait_for_unshard = unshard_between, wait_and_tell
