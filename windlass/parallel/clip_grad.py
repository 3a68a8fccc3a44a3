"""Clipping by the global gradient norm, over whatever cut the gradients have."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from windlass.parallel.collectives import all_reduce
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float | None, mesh: Mesh) -> torch.Tensor:
    """Scales gradients so that their global 2-norm is at most `max_norm`; None only measures it.

    One all-reduce of one number over the ranks that hold one model; replicas hold the same gradients and need none.
    On one rank the arithmetic is `torch.nn.utils.clip_grad_norm_`'s, to the bit.

    Returns:
        The norm before clipping, a 0-dim tensor, equal on all ranks; not finite if any gradient is not.
    """
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).to(mesh.device)
    if mesh.num_shards > 1:
        norm = all_reduce(norm.double().square_(), mesh.shard_group).sqrt_().to(norm.dtype)
    if max_norm is not None and gradients:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
