"""Buckets: parameters whose optimizer state is read, updated and written as one run of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from windlass.parallel.fragment import SMALL_BYTES, local_tensor, with_local

BUCKET_NUMEL = 1 << 23
"""Elements of the weights of a bucket, at most: 64 MiB of AdamW's state. A larger parameter is a bucket of its own."""
RESIDENT_NUMEL = 1 << 13
"""Parameters of no more elements stay in memory: norms and biases are not worth a trip to the disk, and optimizers that
stack small matrices into one product compute them with other bits when they step apart."""


@dataclass(frozen=True)
class Slot:
    """One state tensor of one parameter: what it is, and where its bytes begin."""

    parameter: Tensor
    key: str
    like: Tensor
    """On the meta device: its shape, dtype and cut."""
    begin: int

    @property
    def nbytes(self) -> int:
        return local_tensor(self.like).nbytes

    @property
    def end(self) -> int:
        return self.begin + self.nbytes

    def local(self, data: Tensor) -> Tensor:
        """The tensor of this rank whose bytes are in `data`, without a copy."""
        like = local_tensor(self.like)
        return data[self.begin : self.end].view(like.dtype).view(like.shape)

    def tensor(self, data: Tensor) -> Tensor:
        return with_local(self.like, self.local(data))

    def tensor_for_update(self, data: Tensor) -> Tensor:
        """As the optimizer made it. Bytes lie row by row; where its tensor does not, it is a copy, for its kernels."""
        local, like = self.local(data), local_tensor(self.like)
        if local.stride() != like.stride():
            local = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=data.device).copy_(local)
        return with_local(self.like, local)


class SlotTable:
    """The slots of a bucket's state tensors: wide dtypes first, so that all are aligned without a gap between them;
    then by key, so that what several parameters have of one kind is one piece of memory.

    Args:
        state: the parameters' state; tensors of few bytes, and what is no tensor, are left out.
    """

    def __init__(self, state: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        found: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
        for parameter, values in state:
            for key, value in values.items():
                if is_stowed(value):
                    found.setdefault((-value.element_size(), key), []).append((parameter, value))
        self.slots: list[Slot] = []
        end = 0
        for (_, key), members in sorted(found.items(), key=lambda item: item[0][0]):
            for parameter, value in members:
                self.slots.append(Slot(parameter, key, on_meta(value), end))
                end = self.slots[-1].end
        self.num_bytes = end
        self._by_key = {(id(slot.parameter), slot.key): slot for slot in self.slots}

    def slot(self, parameter: Tensor, key: str) -> Slot | None:
        return self._by_key.get((id(parameter), key))

    def holds(self, state: Iterable[tuple[Tensor, dict[str, Any]]]) -> bool:
        """True if there is a slot for each tensor of `state`; some of them may be missing."""
        for other in SlotTable(state).slots:
            slot = self.slot(other.parameter, other.key)
            if slot is None or (slot.like.shape, slot.like.dtype) != (other.like.shape, other.like.dtype):
                return False
        return True

    def __str__(self) -> str:
        return ", ".join(f"{slot.key} {list(slot.like.shape)} {slot.like.dtype}" for slot in self.slots) or "nothing"


def is_stowed(value: Any) -> bool:
    """True if a value of an optimizer's state is worth keeping elsewhere."""
    return isinstance(value, Tensor) and local_tensor(value).nbytes > SMALL_BYTES


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and cut without memory."""
    return with_local(tensor, torch.empty_like(local_tensor(tensor), device="meta"))


def is_elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and local_tensor(value).device.type == "meta"


def divide(parameters: Sequence[Tensor], max_numel: int = BUCKET_NUMEL) -> list[list[Tensor]]:
    """`parameters` in their order, in runs of at most `max_numel` elements of this rank."""
    runs: list[list[Tensor]] = []
    filled = 0
    for parameter in parameters:
        numel = local_tensor(parameter).numel()
        if not runs or filled + numel > max_numel:
            runs.append([])
            filled = 0
        runs[-1].append(parameter)
        filled += numel
    return runs


def spread(sizes: Sequence[int], budgets: Sequence[int | None]) -> list[int]:
    """Chooses a place for each thing: place i takes up to `budgets[i]` bytes (None: any); the rest goes after the last.

    A place's share is spread evenly over `sizes`, so that a step uses the slowest one all through.
    """
    total = sum(sizes)
    known = [total if budget is None else budget for budget in budgets]
    used, passed, places = [0] * len(known), 0, []

    def first_with_room(size: int, part: float) -> int:
        fitting = (place for place, budget in enumerate(known) if used[place] + size <= budget * part)
        place = next(fitting, len(known))
        if place < len(known):
            used[place] += size
        return place

    for size in sizes:
        passed += size
        places.append(first_with_room(size, passed / total if total else 1.0))
    # What room is left, as where two places would have taken the same thing.
    return [
        first_with_room(size, 1.0) if place == len(known) else place for size, place in zip(sizes, places, strict=True)
    ]
