"""The calls into FSDP2 that torch does not export. When torch changes, this is the file to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from windlass.parallel.collectives import COMM

# torch 2.13 renamed both; the old names still work but warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Allocate:
    """Plain allocations for a collective's buffers."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Allocate, AllGather):
    """FSDP2's default all-gather, counted."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        COMM.add("all_gather", output_tensor.nbytes, group.size())
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedReduceScatter(_Allocate, ReduceScatter):
    """FSDP2's default reduce-scatter, counted."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        COMM.add("reduce_scatter", input_tensor.nbytes, group.size())
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def count_collectives(module: FSDPModule, num_replicas: int) -> None:
    """Makes the collectives of one `fully_shard`ed module add themselves to `COMM`."""
    module.set_custom_all_gather(CountedAllGather())
    module.set_custom_reduce_scatter(CountedReduceScatter())
    if num_replicas > 1:
        # FSDP2 calls the hook with the buffer that it has just all-reduced over the replicas.
        module.set_all_reduce_hook(lambda buffer: COMM.add("all_reduce", buffer.nbytes, num_replicas))


def around_unshard(module: FSDPModule, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Has `before` run when a `fully_shard`ed module is about to read its shards, and `after` when it has read them.

    Hooks on the module come too late for that: FSDP2 gathers a module's weights ahead of its backward.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has several
    for group in [state._fsdp_param_group] if groups is None else groups:
        if group is not None:
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
