"""Runs the updates of many matrices side by side, so that what they send travels together.

An update is written as a generator, for one stack of matrices, as if it were alone: where it needs other ranks it
yields a request and is resumed with the answer. `run_in_lockstep` advances all updates to their next request and
answers these with one collective of a kind, so a model of 200 matrices costs one all-reduce where the algorithm has
one. On a rank of its own every request is answered at once by what it sent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.parallel.collectives import all_reduce_over, all_to_all
from windlass.parallel.layout import Layout

MAX_GATHERED_NUMEL = 1 << 25
"""Elements that a wave of updates may bring to a rank, unless one matrix has more: 128 MiB in float32, besides what the
buffers take that they travel through, up to twice as much."""


@dataclass(frozen=True)
class Gathered:
    """Elements that an update brings together, from all ranks, of each of its matrices."""

    at_owner: int = 0
    """At the one rank that owns the matrix in this step."""
    everywhere: int = 0
    """At every rank."""


class Wave:
    """Says who owns which matrix in updates that run side by side, and when they are as many as memory allows.

    Every rank of a group finds the same from the same matrices.
    """

    def __init__(self, num_ranks: int) -> None:
        self._costs = [0] * num_ranks
        self._owned = [0] * num_ranks
        self._everywhere = 0

    def take(self, count: int, cost: int, gathered: Gathered) -> list[int] | None:
        """The owners of `count` matrices, the ranks that have the least to do; None if there is no room for them.

        An empty wave has room for anything, else large matrices could not be updated at all.

        Args:
            cost: what an owner computes for one of the matrices, in units of its own.
        """
        costs, owned, owners = list(self._costs), list(self._owned), []
        for _ in range(count):
            owner = min(range(len(costs)), key=lambda rank: (costs[rank], owned[rank]))
            owners.append(owner)
            costs[owner] += cost
            owned[owner] += gathered.at_owner
        everywhere = self._everywhere + count * gathered.everywhere
        # A rank's first matrix is no reason for another wave: memory for one must be there anyway.
        is_full = max(owned) > max(MAX_GATHERED_NUMEL, gathered.at_owner) or everywhere > MAX_GATHERED_NUMEL
        if is_full and (self._everywhere or any(self._owned)):
            return None
        self._costs, self._owned, self._everywhere = costs, owned, everywhere
        return owners


@dataclass(frozen=True)
class Sum:
    """Asks for the sum of `tensor` over the ranks, bit-equal on all of them. `tensor` is used up."""

    tensor: Tensor


@dataclass(frozen=True)
class Exchange:
    """Asks for one tensor from each rank, of the shapes in `receives`, and gives `sends` to them, in rank order."""

    sends: Sequence[Tensor]
    receives: Sequence[tuple[int, ...]]


Update = Generator[Sum | Exchange, list[Tensor], None]
"""An update; it is resumed with a list: of the sum alone, or of what each rank sent."""
Reply = Generator[Sum | Exchange, list[Tensor], Tensor]
"""A step of an update that communicates and returns a tensor; call it with `yield from`."""


def run_in_lockstep(updates: Iterable[tuple[tuple[dist.ProcessGroup, ...], Update]]) -> None:
    """Runs every update to its end. All ranks of a group must give it the same updates in the same order.

    Args:
        updates: each with the groups that it is over, one a mesh axis. An update over several may ask for sums alone.
    """
    over_groups: dict[tuple[dist.ProcessGroup, ...], list[Update]] = defaultdict(list)
    for groups, update in updates:
        if groups:
            over_groups[groups].append(update)
        else:
            _run_alone(update)
    for groups, members in over_groups.items():
        waiting = [(update, request) for update in members if (request := next(update, None)) is not None]
        while waiting:
            answers = _answer([request for _, request in waiting], groups)
            following = []
            for (update, _), answer in zip(waiting, answers, strict=True):
                request = _resume(update, answer)
                if request is not None:
                    following.append((update, request))
            waiting = following


def _run_alone(update: Update) -> None:
    request = next(update, None)
    while request is not None:
        request = _resume(update, [request.tensor] if isinstance(request, Sum) else list(request.sends))


def _resume(update: Update, answer: list[Tensor]) -> Sum | Exchange | None:
    try:
        return update.send(answer)
    except StopIteration:
        return None


def _answer(requests: Sequence[Sum | Exchange], groups: tuple[dist.ProcessGroup, ...]) -> list[list[Tensor]]:
    answers: dict[int, list[Tensor]] = {}
    sums: dict[torch.dtype, dict[int, Tensor]] = defaultdict(dict)
    exchanges: dict[torch.dtype, dict[int, Exchange]] = defaultdict(dict)
    for index, request in enumerate(requests):
        if isinstance(request, Sum):
            sums[request.tensor.dtype][index] = request.tensor
        else:
            exchanges[request.sends[0].dtype][index] = request
    for members in sums.values():
        flat = all_reduce_over(torch.cat([tensor.reshape(-1) for tensor in members.values()]), groups)
        parts = flat.split([tensor.numel() for tensor in members.values()])
        for (index, tensor), part in zip(members.items(), parts, strict=True):
            answers[index] = [part.view(tensor.shape)]
    for members in exchanges.values():
        (group,) = groups
        answers |= _exchange(members, group)
    return [answers[index] for index in range(len(requests))]


def _exchange(requests: dict[int, Exchange], group: dist.ProcessGroup) -> dict[int, list[Tensor]]:
    ranks = range(group.size())
    sends = torch.cat([request.sends[rank].reshape(-1) for rank in ranks for request in requests.values()])
    send_numels = [sum(request.sends[rank].numel() for request in requests.values()) for rank in ranks]
    numels = [[math.prod(request.receives[rank]) for request in requests.values()] for rank in ranks]
    received = all_to_all(sends, send_numels, [sum(of_rank) for of_rank in numels], group)
    parts = iter(received.split([numel for of_rank in numels for numel in of_rank]))
    answers: dict[int, list[Tensor]] = {index: [] for index in requests}
    for rank in ranks:
        for index, request in requests.items():
            answers[index].append(next(parts).view(request.receives[rank]))
    return answers


def sum_over_ranks(tensor: Tensor) -> Reply:
    """The sum over the ranks; uses `tensor` up."""
    return (yield Sum(tensor))[0]


def reduce_scatter(partial: Tensor, layout: Layout) -> Reply:
    """Sums [k, *layout.shape] over the ranks, and returns what this rank holds of it in `layout`.

    The terms are added in the order of the ranks.
    """
    assert layout.dim is not None
    spans = [layout.span(rank) for rank in range(layout.num_ranks)]
    sends = [partial.narrow(layout.dim + 1, span.start, span.stop - span.start) for span in spans]
    mine = sends[layout.rank].shape
    first, *others = yield Exchange(sends, [tuple(mine)] * layout.num_ranks)
    for other in others:
        first = first + other
    return first


def all_gather(local: Tensor, layout: Layout) -> Reply:
    """The whole of [k, *layout.shape] on every rank, from what each holds."""
    assert layout.dim is not None
    shapes = [(local.shape[0], *layout.local_shape(rank)) for rank in range(layout.num_ranks)]
    parts = yield Exchange([local] * layout.num_ranks, shapes)
    return torch.cat(parts, dim=layout.dim + 1)


def gather_to_owners(local: Tensor, layout: Layout, owners: Sequence[int]) -> Reply:
    """The whole of those of the k tensors that this rank owns, [owned, *layout.shape], from all ranks' parts.

    Args:
        owners: the rank that is to have each of the k tensors.
    """
    if layout.group is None:
        return local
    assert layout.dim is not None
    of_rank = [[index for index, owner in enumerate(owners) if owner == rank] for rank in range(layout.num_ranks)]
    sends = [local[indexes] for indexes in of_rank]
    num_owned = len(of_rank[layout.rank])
    parts = yield Exchange(sends, [(num_owned, *layout.local_shape(rank)) for rank in range(layout.num_ranks)])
    return torch.cat(parts, dim=layout.dim + 1)


def scatter_from_owners(owned: Tensor, layout: Layout, owners: Sequence[int]) -> Reply:
    """The reverse of `gather_to_owners`: [k, *layout.local_shape()] from the owners' [owned, *layout.shape].

    With `layout.dim` None every rank gets all of each tensor.
    """
    if layout.group is None:
        return owned
    ranks = range(layout.num_ranks)
    if layout.dim is None:
        sends = [owned] * layout.num_ranks
    else:
        spans = [layout.span(rank) for rank in ranks]
        sends = [owned.narrow(layout.dim + 1, span.start, span.stop - span.start) for span in spans]
    shapes = [(sum(owner == rank for owner in owners), *layout.local_shape()) for rank in ranks]
    parts = yield Exchange(sends, shapes)
    position = [sum(other == owner for other in owners[:index]) for index, owner in enumerate(owners)]
    return torch.stack([parts[owner][place] for owner, place in zip(owners, position, strict=True)])
