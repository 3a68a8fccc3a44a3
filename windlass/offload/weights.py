"""Weights that are not in memory all the time: they are brought for a pass or an update, and let go after it.

A parameter's memory is given back to the system and taken again (its storage is resized to nothing and back), as
FSDP2 does with gathered weights: whatever autograd has saved of it is there again when backward comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from windlass.offload.buckets import RESIDENT_NUMEL, divide
from windlass.offload.conveyor import Conveyor, Load
from windlass.offload.direct_io import round_to_pages
from windlass.offload.split_bf16 import add_rest, split
from windlass.offload.tier_file import TierFile
from windlass.parallel.autograd_shim import preserving_version
from windlass.parallel.fragment import local_tensor
from windlass.parallel.layout import is_sharded_evenly


@dataclass(eq=False)
class _Group:
    """Parameters whose weights are moved together."""

    parameters: list[Tensor]
    passing: Load
    """The bytes that a pass computes with: the weights, or their upper halves."""
    rest: Load | None = None
    """The lower halves."""
    lowered: list[Tensor] = field(default_factory=list)
    """A parameter: see `windlass.offload.split_bf16`."""
    num_users: int = 0
    is_whole: bool = False
    """True if the weights are in memory, and not only their upper halves."""

    @property
    def room_bytes(self) -> int:
        """The size of the buffers that the group is written from."""
        loads = [self.passing] if self.rest is None else [self.passing, self.rest]
        return sum(round_to_pages(load.num_bytes) for load in loads)


class Weights:
    """The weights of float32 parameters, whose home is a tier.

    Args:
        make_home: makes the home of so many bytes: a file, or host memory.
        in_halves: keep a weight as bfloat16 and a rest of 16 bits. A pass that computes in bfloat16 then needs half the
            bytes, and has the same bits; only an update needs both.
    """

    def __init__(self, conveyor: Conveyor, make_home: Callable[[int], TierFile | Tensor], in_halves: bool) -> None:
        self._conveyor, self._make_home, self.in_halves = conveyor, make_home, in_halves
        self._groups: dict[Tensor, _Group] = {}  # by each of its parameters

    @property
    def stall_s(self) -> float:
        """Seconds that training has waited for weights so far."""
        return self._conveyor.stall_s

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor]) -> None:
        """Takes over the weights of `parameters`, and lets their memory go.

        Small ones stay, and those that are cut unevenly: FSDP2 pads them into memory of its own.
        """
        large = [p for p in parameters if local_tensor(p).numel() > RESIDENT_NUMEL and is_sharded_evenly(p)]
        for members in divide(large):
            assert all(local_tensor(parameter).dtype == torch.float32 for parameter in members)
            numel = sum(local_tensor(parameter).numel() for parameter in members)
            width = 2 if self.in_halves else 4
            group = _Group(members, Load(self._make_home(width * numel)), num_users=1, is_whole=True)
            if self.in_halves:
                group.rest = Load(self._make_home(2 * numel))
            for parameter in members:
                self._groups[parameter] = group
            self._write(group)
            self._release(group)

    def is_elsewhere(self, parameter: Tensor) -> bool:
        """True if the parameter's memory does not hold its weights now: it holds nothing, or rounded ones."""
        group = self._groups.get(parameter)
        return group is not None and not (group.num_users and group.is_whole)

    def acquire(self, parameters: Iterable[Tensor]) -> None:
        """Brings what a pass computes with into the parameters' memory, until `release`.

        With `in_halves` it is the weights rounded to bfloat16.

        Raises:
            OffloadError: the disk failed, or gave back other bytes than were written.
        """
        for group in self._groups_of(parameters):
            self._acquire(group)

    def release(self, parameters: Iterable[Tensor]) -> None:
        """Lets the memory go, unless another has acquired it too."""
        for group in self._groups_of(parameters):
            self._release(group)

    @contextlib.contextmanager
    def loaded(self, parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        """While it lasts the weights, not rounded, are in memory; with `write`, what they are then is kept."""
        groups = self._groups_of(parameters)
        for group in groups:
            self._acquire(group)
            self._make_whole(group)
        try:
            yield
            if write:
                for group in groups:
                    self._write(group)
        finally:
            for group in groups:
                self._release(group)

    def look_ahead(self, parameters: Iterable[Tensor], with_rest: bool) -> None:
        """Begins to bring what will be acquired next, as far as there is room.

        Args:
            parameters: in the order in which they will be acquired.
            with_rest: they are updated then: bring what that needs too, and leave room for what it makes.
        """
        spare: dict[Load, int] = {}
        made = 0
        for group in self._groups_of(parameters):
            if group.num_users == 0:
                spare[group.passing] = made
            if with_rest and group.rest is not None and not group.is_whole:
                spare[group.rest] = made
            if with_rest:
                made = max(made, group.room_bytes)
        self._conveyor.look_ahead(spare, spare)

    def drain(self) -> None:
        """Returns when what was written is home."""
        self._conveyor.drain()

    def close(self) -> None:
        self._conveyor.abandon()

    def _groups_of(self, parameters: Iterable[Tensor]) -> list[_Group]:
        return list(dict.fromkeys(self._groups[p] for p in parameters if p in self._groups))

    @torch.no_grad()
    def _acquire(self, group: _Group) -> None:
        group.num_users += 1
        if group.num_users > 1:
            return
        data = self._conveyor.bring(group.passing).view(torch.bfloat16 if self.in_halves else torch.float32)
        begin = 0
        for parameter in group.parameters:
            local = local_tensor(parameter)
            local.untyped_storage().resize_(local.nbytes)
            with preserving_version(parameter):
                local.view(-1).copy_(data[begin : begin + local.numel()])
            begin += local.numel()
        self._conveyor.drop(group.passing)
        group.is_whole = not self.in_halves

    def _release(self, group: _Group) -> None:
        group.num_users -= 1
        if group.num_users == 0:
            for parameter in group.parameters:
                local_tensor(parameter).untyped_storage().resize_(0)
            group.is_whole = False

    @torch.no_grad()
    def _make_whole(self, group: _Group) -> None:
        if group.is_whole:
            return
        assert group.rest is not None
        data = self._conveyor.bring(group.rest).view(torch.int16)
        begin = 0
        for parameter, lowered in zip(group.parameters, group.lowered, strict=True):
            local = local_tensor(parameter)
            add_rest(local, data[begin : begin + local.numel()], lowered)
            begin += local.numel()
        self._conveyor.drop(group.rest)
        group.is_whole = True

    @torch.no_grad()
    def _write(self, group: _Group) -> None:
        """Sends home what is in memory, which must be whole."""
        assert group.is_whole
        loads = [group.passing] if group.rest is None else [group.passing, group.rest]
        blanks = self._conveyor.blank(loads)
        passing = blanks[0].view(torch.bfloat16 if self.in_halves else torch.float32)
        rest = None if group.rest is None else blanks[1].view(torch.int16)
        group.lowered, begin = [], 0
        for parameter in group.parameters:
            local = local_tensor(parameter)
            part = slice(begin, begin + local.numel())
            if rest is None:
                passing[part].copy_(local.view(-1))
            else:
                group.lowered.append(split(local, passing[part], rest[part]))
            begin += local.numel()
        for load in loads:
            self._conveyor.take_back(load)


def most_bytes(runs: Iterable[Sequence[Tensor]]) -> int:
    """The room that the conveyor of the weights of `runs`, added one after the other, must have at least."""
    numels = [sum(local_tensor(p).numel() for p in members) for run in runs for members in divide(run)]
    return round_to_pages(4 * max(numels, default=0)) + round_to_pages(1)  # two halves, each of whole pages
