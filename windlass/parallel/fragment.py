"""The fragment: the piece of a named global tensor that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard


class Tier(StrEnum):
    """Where the bytes of a fragment are."""

    device = "device"
    host = "host"
    ssd = "ssd"


@dataclass(frozen=True)
class Fragment:
    """The block of a global tensor that starts at `offset` and has `shape`, both in elements along each dim."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    tier: Tier = Tier.device

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indexes the global tensor: `global_tensor[fragment.slices]` is the fragment."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def overlap(self, other: Fragment) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The block that both hold, as indexes into `self`'s and `other`'s local tensors; None if there is none."""
        mine, theirs = [], []
        for start, size, other_start, other_size in zip(
            self.offset, self.shape, other.offset, other.shape, strict=True
        ):
            low, high = max(start, other_start), min(start + size, other_start + other_size)
            if low >= high:
                return None
            mine.append(slice(low - start, high - start))
            theirs.append(slice(low - other_start, high - other_start))
        return tuple(mine), tuple(theirs)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that is in this process, sharing its memory and without autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def fragment_of(name: str, tensor: torch.Tensor) -> Fragment:
    """Which block of the global tensor this rank's part of `tensor` is; a plain tensor is its own whole.

    A dim of size n that is cut over k ranks gives each ceil(n / k), the last ones fewer or none, as `torch.chunk`.
    """
    tier = Tier.host if tensor.device.type == "cpu" else Tier.device
    shape, offset = list(tensor.shape), [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None, "this rank is outside the tensor's mesh"
        for mesh_axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate):
                continue
            assert isinstance(placement, Shard) and shape[placement.dim] == tensor.shape[placement.dim], (
                f"{name}: placements {tensor.placements} cut a dim twice"
            )
            size, num_ranks = tensor.shape[placement.dim], tensor.device_mesh.size(mesh_axis)
            chunk = -(-size // num_ranks)
            start = min(size, chunk * coordinates[mesh_axis])
            offset[placement.dim], shape[placement.dim] = start, min(chunk, size - start)
    return Fragment(name, tuple(tensor.shape), tuple(offset), tuple(shape), tensor.dtype, tier)


SMALL_BYTES = 4096
"""Tensors that are no larger, such as step counters, stay together: read back, they come in one piece."""


class ReplicaShare:
    """Which tensors a rank speaks for where several ranks hold the same: of each, one, and of all, as many bytes each.

    All ranks must ask about the same tensors in the same order. The first speaks for all that are small.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._bytes: dict[int, list[int]] = {}  # number of replicas -> what each has to say so far

    def replicas(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Which of those that hold the same part of `tensor` this rank is, and how many they are."""
        if not isinstance(tensor, DTensor):
            return self.rank, self.world_size
        replica, num_replicas = 0, 1
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None, "this rank is outside the tensor's mesh"
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate):
                replica = replica * tensor.device_mesh.size(axis) + coordinates[axis]
                num_replicas *= tensor.device_mesh.size(axis)
        return replica, num_replicas

    def includes(self, tensor: torch.Tensor, num_bytes: int | None = None) -> bool:
        """A plain tensor is held by all ranks.

        Args:
            num_bytes: of all that is said with it; None: its own.
        """
        replica, num_replicas = self.replicas(tensor)
        num_bytes = tensor.numel() * tensor.element_size() if num_bytes is None else num_bytes
        if num_bytes <= SMALL_BYTES:
            return replica == 0
        spoken = self._bytes.setdefault(num_replicas, [0] * num_replicas)
        least = spoken.index(min(spoken))
        spoken[least] += num_bytes
        return least == replica


def with_local(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor that is cut over the ranks as `tensor` is, and whose part in this process is `local`."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def empty_like_global(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of `dtype`, cut over the ranks just as `tensor` is."""
    return with_local(tensor, torch.empty_like(local_tensor(tensor), dtype=dtype))
