"""Clipping by the global gradient norm, however gradients are sharded and whatever dtype they have.

The norm is also the check that all gradients are finite, so they are read once for both, and then once to be scaled.
Nothing of the size of a gradient is made on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from windlass.parallel.collectives import all_reduce_over
from windlass.parallel.fragment import local_tensor
from windlass.parallel.layout import layout_of
from windlass.parallel.mesh import Mesh

CHUNK_NUMEL = 1 << 17
"""Elements of a gradient of low precision that are in float32 at a time on a CPU: 512 KiB."""


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None, mesh: Mesh) -> Tensor:
    """Scales gradients so that their global 2-norm is at most `max_norm`; None only measures it.

    One all-reduce of one number over each axis that gradients are sharded over; replicas hold the same gradients and
    need none. On one rank the arithmetic of float32 gradients is `torch.nn.utils.clip_grad_norm_`'s, to the bit.

    Returns:
        The norm before clipping, a 0-dim tensor, float32 at least, equal on all ranks; not finite if any gradient is
        not. The gradients are of no use then; weights and optimizer state have not been touched.

    Raises:
        ValueError: a gradient is sharded so that ranks hold several blocks of it, or partial sums.
    """
    whole = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [local_tensor(gradient) for gradient in whole]
    norms = []
    for groups, members in by_groups(whole, gradients).items():
        norm = total_norm(members).to(mesh.device)
        if groups:
            norm = all_reduce_over(norm.double().square_(), groups).sqrt_().to(norm.dtype)
        norms.append(norm)
    norm = norms[0] if len(norms) == 1 else total_norm(norms).to(mesh.device)
    if max_norm is not None and gradients:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


def sum_over_shards(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The sum of one number of each parameter, from all ranks that hold parts of it; 0-dim, equal on all ranks.

    Args:
        values: of this rank's parts.
    """
    sums = [
        all_reduce_over(torch.stack(members).sum(), groups) for groups, members in by_groups(parameters, values).items()
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def by_groups(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> dict[tuple[dist.ProcessGroup, ...], list[Tensor]]:
    """The values of each tensor by the groups over which it is sharded, in an order that all ranks find."""
    found: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    known: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, tuple[dist.ProcessGroup, ...]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        key = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        if key not in known:
            known[key] = layout_of(tensor, "a gradient").groups
        found.setdefault(known[key], []).append(value)
    return found


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of tensors of this rank, 0-dim, float32 or float64 whatever they are; 0 of none.

    `torch.nn.utils.get_total_norm` gives the norm of bfloat16 tensors in bfloat16, of two to three digits.
    """
    if not tensors:
        return torch.zeros(())
    norms = each_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def each_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, 0-dim, float32 or float64 whatever they are."""
    others = [tensor for tensor in tensors if not _is_low(tensor)]
    of_others = iter(torch._foreach_norm(others) if others else [])
    return [_norm(tensor) if _is_low(tensor) else next(of_others) for tensor in tensors]


def _is_low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _norm(tensor: Tensor) -> Tensor:
    """The norm of a tensor of low precision, accumulated and given in float32."""
    # On a CPU torch would make a float32 copy of what it reduces; a GPU's kernel reads the elements as they are.
    chunks = _chunks(tensor) if tensor.device.type == "cpu" else [tensor]
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float32) for chunk in chunks]
    return torch.linalg.vector_norm(torch.stack(norms))


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most `CHUNK_NUMEL` elements, which together are `tensor`; whatever its strides, nothing is copied."""
    if tensor.numel() <= CHUNK_NUMEL:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(CHUNK_NUMEL)
    elif len(tensor) == 1:
        yield from _chunks(tensor[0])
    else:
        for part in tensor.split(max(1, CHUNK_NUMEL * len(tensor) // tensor.numel())):
            yield from _chunks(part)
