"""The fragment: the piece of a named global tensor that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from windlass.parallel.layout import layout_of


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
    """The block of the global tensor that this rank's part of `tensor` is; a plain tensor is its own whole.

    A dim of size n that is sharded over k ranks gives each ceil(n / k), the last ones fewer or none, as `torch.chunk`;
    sharded over several axes, each splits what those before it left.

    Raises:
        ValueError: this rank holds several blocks of the tensor, or partial sums.
    """
    tier = Tier.host if tensor.device.type == "cpu" else Tier.device
    offset, shape = layout_of(tensor, name).block()
    return Fragment(name, tuple(tensor.shape), offset, shape, tensor.dtype, tier)


SMALL_BYTES = 4096
"""Tensors that are no larger, such as step counters, stay together: read back, they come in one piece."""


class ReplicaShare:
    """Says which tensors a rank speaks for where several hold the same: of each, one does, and of all, as many bytes.

    All ranks must ask about the same tensors in the same order. The first speaks for all that are small.

    Args:
        device_mesh: of all ranks, of whose axes a DTensor's mesh may have some.
    """

    def __init__(self, rank: int, world_size: int, device_mesh: DeviceMesh | None = None) -> None:
        self.rank, self.world_size, self._device_mesh = rank, world_size, device_mesh
        self._bytes: dict[int, list[int]] = {}  # number of replicas -> what each has to say so far
        self._other_axes: dict[DeviceMesh, list[tuple[int, int]]] = {}

    def replicas(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Which of those that hold the same part of `tensor` this rank is, and how many they are."""
        if not isinstance(tensor, DTensor):
            return self.rank, self.world_size
        mesh = tensor.device_mesh
        if mesh not in self._other_axes:
            self._other_axes[mesh] = _axes_besides(mesh, self._device_mesh)
        replica, num_replicas = 0, 1
        replicated = [
            (mesh.get_local_rank(axis), mesh.size(axis))
            for axis, placement in enumerate(tensor.placements)
            if isinstance(placement, Replicate)
        ]
        for coordinate, size in [*replicated, *self._other_axes[mesh]]:
            replica, num_replicas = replica * size + coordinate, num_replicas * size
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


def _axes_besides(part: DeviceMesh, whole: DeviceMesh | None) -> list[tuple[int, int]]:
    """(this rank's coordinate, size) of the axes that `whole` has beside those of `part`, where that is a part of it.

    Ranks along them hold the same of a tensor over `part`, as they do where tensor parallelism left a parameter alone.
    """
    if whole is None or whole.mesh_dim_names is None or part.mesh_dim_names is None:
        return []
    names, all_names, coordinates = part.mesh_dim_names, whole.mesh_dim_names, whole.get_coordinate()
    if coordinates is None or not set(names) < set(all_names):
        return []
    others = [(name, place) for name, place in zip(all_names, coordinates, strict=True) if name not in names]
    ranks = whole.mesh.permute([all_names.index(name) for name in (*(name for name, _ in others), *names)])
    if not torch.equal(ranks[tuple(place for _, place in others)], part.mesh):
        return []
    return [(place, whole.size(all_names.index(name))) for name, place in others]


def with_local(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded as `tensor` is, and whose part in this process is `local`."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def empty_like_global(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of `dtype`, sharded just as `tensor` is."""
    return with_local(tensor, torch.empty_like(local_tensor(tensor), dtype=dtype))
