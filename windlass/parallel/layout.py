"""How a tensor lies over the ranks, in one value that is the same for plain tensors and for every kind of DTensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Layout:
    """A tensor of global `shape`, whole on this rank or cut along `dim` over a group, as `torch.chunk` cuts it.

    Replicas of a cut (HSDP's other nodes) are not part of it: they hold the same and compute the same.

    Args:
        dim: None where every rank of the group holds all of it.
        group: the ranks that together hold one tensor; None is this rank alone.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    group: dist.ProcessGroup | None = None
    rank: int = 0
    num_ranks: int = 1

    def span(self, rank: int | None = None) -> slice:
        """The indexes along `dim` that `rank` (this one) holds; may be empty."""
        assert self.dim is not None
        size = self.shape[self.dim]
        chunk = -(-size // self.num_ranks)
        start = min(size, chunk * (self.rank if rank is None else rank))
        return slice(start, min(size, start + chunk))

    def local_shape(self, rank: int | None = None) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        span = self.span(rank)
        return (*self.shape[: self.dim], span.stop - span.start, *self.shape[self.dim + 1 :])

    def of(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """Another tensor over the same ranks."""
        return replace(self, shape=shape, dim=dim if self.group is not None else None)


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout of a plain tensor, or of a DTensor that is cut along at most one dim.

    Raises:
        ValueError: it is cut twice, or holds partial sums.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Layout(shape)
    cuts = [
        (axis, placement)
        for axis, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate) and tensor.device_mesh.size(axis) > 1
    ]
    if not cuts:
        return Layout(shape)
    axis, placement = cuts[0]
    if len(cuts) > 1 or type(placement) is not Shard:
        raise ValueError(f"a tensor of placements {tensor.placements} must be cut along one dim over one mesh axis")
    mesh = tensor.device_mesh
    return Layout(shape, placement.dim, mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis))


def is_cut_evenly(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold equal parts of `tensor`, or all of it."""
    layout = layout_of(tensor)
    return layout.dim is None or layout.shape[layout.dim] % layout.num_ranks == 0


def zeros_over(
    tensor: torch.Tensor, shape: tuple[int, ...], dim: int | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeros of global `shape` on the ranks that hold `tensor`, cut along `dim` where `tensor` is cut at all.

    With `dim` None it is a plain tensor, the same on every rank.
    """
    if not isinstance(tensor, DTensor) or dim is None:
        return torch.zeros(shape, dtype=dtype, device=tensor.device)
    local = torch.zeros(layout_of(tensor).of(shape, dim).local_shape(), dtype=dtype, device=tensor.device)
    placements = [Replicate() if isinstance(old, Replicate) else Shard(dim) for old in tensor.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, tensor.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
