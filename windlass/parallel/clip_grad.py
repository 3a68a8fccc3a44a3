"""Clipping by the global gradient norm, over whatever cut and whatever dtype the gradients have.

The norm is also the check that all gradients are finite, so they are read once for both, and then once to be scaled.
Nothing of the size of a gradient is made on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from windlass.parallel.collectives import all_reduce
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh

CHUNK_NUMEL = 1 << 17
"""Elements of a gradient of low precision that are in float32 at a time on a CPU: 512 KiB."""


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None, mesh: Mesh) -> Tensor:
    """Scales gradients so that their global 2-norm is at most `max_norm`; None only measures it.

    One all-reduce of one number over the ranks that hold one model; replicas hold the same gradients and need none.
    On one rank the arithmetic of float32 gradients is `torch.nn.utils.clip_grad_norm_`'s, to the bit.

    Returns:
        The norm before clipping, a 0-dim tensor, float32 at least, equal on all ranks; not finite if any gradient is
        not. The gradients are of no use then; weights and optimizer state have not been touched.
    """
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients).to(mesh.device)
    if mesh.num_shards > 1:
        norm = all_reduce(norm.double().square_(), mesh.shard_group).sqrt_().to(norm.dtype)
    if max_norm is not None and gradients:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


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
