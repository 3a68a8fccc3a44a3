"""Collectives that count the bytes they carry, and the time that they wait for other ranks.

A count is *logical*: what the algorithm has to send or receive a rank, with the volumes of an ideal ring. Backends may
move more (gloo's reduce-scatter is an all-reduce inside). For a group of N ranks and a full tensor of B bytes:
all-gather and reduce-scatter B (N-1)/N, all-reduce 2 B (N-1)/N. An all-to-all counts what it sends to other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from windlass.parallel.waiting import WAITED


class CommCounter:
    """Bytes a rank has carried since the start, by collective."""

    def __init__(self) -> None:
        self.bytes_by_kind: Counter[str] = Counter()
        self.calls_by_kind: Counter[str] = Counter()

    def add(self, kind: str, full_bytes: int, num_ranks: int) -> None:
        """Counts one collective over `num_ranks` whose full (unsharded) tensor has `full_bytes`."""
        rounds = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
        self.bytes_by_kind[kind] += rounds[kind] * full_bytes * (num_ranks - 1) // num_ranks
        self.calls_by_kind[kind] += 1

    @property
    def total_bytes(self) -> int:
        return self.bytes_by_kind.total()


COMM = CommCounter()
"""Counts what this process carries. One a process, as torch's process groups are."""


def all_reduce(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Reduces `tensor` in place over `group`; a group of None is this rank alone."""
    if group is not None:
        COMM.add("all_reduce", tensor.nbytes, group.size())
        with WAITED.on(tensor.device):
            dist.all_reduce(tensor, op=op, group=group)
    return tensor


def all_reduce_over(tensor: torch.Tensor, groups: Iterable[dist.ProcessGroup]) -> torch.Tensor:
    """Sums `tensor` in place over one group after the other, which together are over the ranks of all their axes."""
    for group in groups:
        all_reduce(tensor, group)
    return tensor


def all_to_all(
    sends: torch.Tensor, send_numels: Sequence[int], receive_numels: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Sends a stretch of the flat `sends` to each rank of `group`, and returns what each sent here, in rank order."""
    received = sends.new_empty(sum(receive_numels))
    to_others = sends.numel() - send_numels[group.rank()]
    COMM.bytes_by_kind["all_to_all"] += to_others * sends.element_size()
    COMM.calls_by_kind["all_to_all"] += 1
    with WAITED.on(sends.device):
        dist.all_to_all_single(received, sends, list(receive_numels), list(send_numels), group=group)
    return received


def all_reduce_async(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Starts to sum `tensor` in place over `group`; `finish` what it returns before reading it."""
    if group is None:
        return None
    COMM.add("all_reduce", tensor.nbytes, group.size())
    return dist.all_reduce(tensor, group=group, async_op=True)


def finish(work: dist.Work | None) -> None:
    """Waits for what `all_reduce_async` has started on the host."""
    if work is not None:
        with WAITED.host():
            work.wait()


def all_gather_object(value: object, group: dist.ProcessGroup | None) -> list:
    """`value` of every rank of `group`, in rank order. For small things at set-up and at a checkpoint, not for steps.

    torch pickles objects between the ranks of one job; nothing that comes from a file or from outside goes this way.
    """
    if group is None:
        return [value]
    values: list = [None] * group.size()
    with WAITED.host():
        dist.all_gather_object(values, value, group=group)
    return values
