"""How a tensor lies over the ranks, in one value that is the same for plain tensors and for every kind of DTensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


@dataclass(frozen=True)
class Split:
    """One mesh axis over which a tensor is sharded, along one dim, as `torch.chunk` shards it.

    Args:
        dim: None where each rank along the axis holds all of the tensor.
        group: the ranks along the axis, this one among them.
    """

    dim: int | None
    group: dist.ProcessGroup
    rank: int
    num_ranks: int

    def span(self, size: int, rank: int | None = None) -> slice:
        """The indexes of `size` that `rank` (this one) gets; may be empty."""
        chunk = -(-size // self.num_ranks)
        start = min(size, chunk * (self.rank if rank is None else rank))
        return slice(start, min(size, start + chunk))


@dataclass(frozen=True)
class Layout:
    """A tensor of global `shape`, and the splits that leave this rank its block, each of what those before it left.

    Replicas (HSDP's other nodes) are not part of it: they hold the same and compute the same.

    Elementwise code takes any layout. Code that exchanges blocks takes at most one split, and reads `dim`, `group`,
    `rank`, `num_ranks` and `span`, which are of that one.
    """

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The ranks along each axis that the tensor is sharded over: a sum over one after the other is over all."""
        return tuple(split.group for split in self.splits)

    def block(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """This rank's block of the tensor: its offset and its shape."""
        offset, shape = [0] * len(self.shape), list(self.shape)
        for split in self.splits:
            if split.dim is not None:
                span = split.span(shape[split.dim])
                offset[split.dim] += span.start
                shape[split.dim] = span.stop - span.start
        return tuple(offset), tuple(shape)

    @property
    def is_even(self) -> bool:
        """True where all ranks hold blocks of one shape."""
        parts = [1] * len(self.shape)
        for split in self.splits:
            if split.dim is not None:
                parts[split.dim] *= split.num_ranks
        return all(size % count == 0 for size, count in zip(self.shape, parts, strict=True))

    @property
    def split(self) -> Split | None:
        """The only split; None where the tensor is whole on this rank."""
        assert len(self.splits) <= 1, f"sharded over {len(self.splits)} mesh axes, where one is expected"
        return self.splits[0] if self.splits else None

    @property
    def dim(self) -> int | None:
        return None if self.split is None else self.split.dim

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.split is None else self.split.group

    @property
    def rank(self) -> int:
        return 0 if self.split is None else self.split.rank

    @property
    def num_ranks(self) -> int:
        return 1 if self.split is None else self.split.num_ranks

    def span(self, rank: int | None = None) -> slice:
        """The indexes along `dim` that `rank` (this one) holds; may be empty."""
        assert self.split is not None and self.split.dim is not None
        return self.split.span(self.shape[self.split.dim], rank)

    def local_shape(self, rank: int | None = None) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        span = self.span(rank)
        return (*self.shape[: self.dim], span.stop - span.start, *self.shape[self.dim + 1 :])

    def of(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """Another tensor over the same ranks."""
        return Layout(shape, () if self.split is None else (replace(self.split, dim=dim),))


def layout_of(tensor: torch.Tensor, name: str = "a tensor") -> Layout:
    """The layout of a plain tensor, which is whole, or of a DTensor.

    Args:
        name: of the tensor, for messages.

    Raises:
        ValueError: a rank holds several blocks of it, or partial sums.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Layout(shape)
    mesh = tensor.device_mesh
    splits = [
        Split(dim, mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis))
        for axis, dim in _order_of_splits(tensor, name)
    ]
    return Layout(shape, tuple(splits))


def _order_of_splits(tensor: DTensor, name: str) -> list[tuple[int, int]]:
    """The numbers of the mesh axes that split the tensor, each with the dim, in the order in which they do so.

    Placements split from the left to the right. FSDP2 over tensor parallelism has a placement that comes after all to
    its right that split the same dim: torch's `_StridedShard`, whose `split_factor` is how many parts they make. Of
    another factor, or where these parts are not equal, it would leave a rank several blocks.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    order: list[tuple[int, int]] = []
    strided_dims = set()
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, Replicate) or mesh.size(axis) == 1:
            continue
        if type(placement) is Shard:
            order.insert(0, (axis, placement.dim))
            continue
        factor, dim = getattr(placement, "split_factor", None), getattr(placement, "dim", None)
        if factor is None or dim is None:
            raise ValueError(f"{name} has the placements {placements}: a rank must hold a block of it, no partial sums")
        if factor != math.prod(mesh.size(other) for other, its_dim in order if its_dim == dim):
            raise ValueError(
                f"{name} has the placements {placements} over {mesh}: a rank holds several blocks of it, as the split "
                f"factor {factor} is not the number of parts that the axes to its right make"
            )
        strided_dims.add(dim)
        order.append((axis, dim))
    for dim in strided_dims:
        *inner, _ = (mesh.size(axis) for axis, its_dim in order if its_dim == dim)
        if tensor.shape[dim] % math.prod(inner):
            raise ValueError(
                f"{name} is {list(tensor.shape)} with the placements {placements} over {mesh}: a strided shard takes "
                f"a dim {dim} that divides by {math.prod(inner)}, else ranks hold several blocks"
            )
    return order


def is_sharded_evenly(tensor: torch.Tensor) -> bool:
    """Tells if all ranks hold equal parts of `tensor`, or all of it."""
    return layout_of(tensor).is_even


def zeros_over(
    tensor: torch.Tensor, shape: tuple[int, ...], dim: int | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeros of global `shape` on the ranks that hold `tensor`, sharded along `dim` where `tensor` is sharded at all.

    With `dim` None it is a plain tensor, the same on every rank.
    """
    if not isinstance(tensor, DTensor) or dim is None:
        return torch.zeros(shape, dtype=dtype, device=tensor.device)
    local = torch.zeros(layout_of(tensor).of(shape, dim).local_shape(), dtype=dtype, device=tensor.device)
    placements = [Replicate() if isinstance(old, Replicate) else Shard(dim) for old in tensor.placements]
    return _from_local(local, tensor, placements, shape)


def zeros_sharded_as(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros of the shape of `tensor`, contiguous whatever its strides are, and sharded just as it is."""
    if not isinstance(tensor, DTensor):
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    _, local_shape = layout_of(tensor).block()
    local = torch.zeros(local_shape, dtype=dtype, device=tensor.device)
    return _from_local(local, tensor, tensor.placements, tuple(tensor.shape))


def _from_local(local: torch.Tensor, like: DTensor, placements: Sequence[Placement], shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
