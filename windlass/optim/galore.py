"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (Zhao et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from windlass.optim.adamw import adam_direction
from windlass.optim.base import StateSpec, require_key
from windlass.optim.config import GaLoreConfig
from windlass.optim.lockstep import Gathered, Reply, Update, all_gather, gather_to_owners, scatter_from_owners
from windlass.optim.low_rank import (
    LowRankOptimizer,
    adam_step_size,
    is_cut_along_short_dim,
    own_rows,
    sum_columns,
    to_columns,
)
from windlass.optim.matrix_stack import MatrixStack
from windlass.optim.param_groups import groups_of_low_rank
from windlass.parallel.layout import Layout

GRAM_NUMEL = 1 << 20
"""Elements of a gradient that are in float64 at a time."""


class GaLore(LowRankOptimizer):
    """Adam in the subspace of the gradient's r main directions, which are found anew every `update_interval` steps.

    A param group with a `rank` is optimized so; its keys `update_interval` (200), `scale` (of the updates, 0.25) and
    `shard_projector` (False) have defaults. Groups without get AdamW. The moments stay as they are when the subspace
    changes; each new direction has the sign that is closer to the old one in its place, so that momentum goes on.

    State of an (a, b) matrix with L = max(a, b), s = min(a, b): `exp_avg` and `exp_avg_sq` (L, r), `projector` (s, r),
    `step`. The moments are cut over the ranks where the matrix is. The projector is whole on every rank, or cut too
    with `shard_projector`: then state takes exactly 1/N, and s r elements are all-gathered a step. Else there is no
    communication between refreshes if the matrix is cut along L; if it is along s, the projected gradient is summed
    over the ranks and the update gathered, 2 L r elements. At a refresh one rank has the whole gradient of a matrix,
    finds the directions and gives them to the others: they are the same to the bit for any number of ranks.

    Args:
        params: parameters or param groups, plain tensors or DTensors sharded over one mesh axis.
        compat: find the directions with a float32 SVD and leave their signs as they come, as the authors' galore-torch
            does. Otherwise they are the eigenvectors of the Gram matrix in float64, and a zero gradient changes none.

    Raises:
        ValueError: a setting is out of range, or a group with a rank holds something else than matrices.
    """

    matrix_keys: Mapping[str, Any] = {"update_interval": 200, "scale": 0.25, "shard_projector": False}

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        require_key(group, "shard_projector", lambda value: isinstance(value, bool), "must be True or False")

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        projector = StateSpec((min(shape), group["rank"]), 0 if group["shard_projector"] else None)
        return super().matrix_state(group, shape) | {"projector": projector}

    def gathered(self, stack: MatrixStack) -> Gathered | None:
        long, short = stack.tall_layout.shape
        rank, is_refresh, across = stack.group["rank"], self.is_refresh(stack), is_cut_along_short_dim(stack)
        everywhere = long * rank if across else 0
        if is_refresh or (stack.group["shard_projector"] and not across):
            everywhere += short * rank
        at_owner = long * short if is_refresh else 0
        return Gathered(at_owner, everywhere) if everywhere else None

    def update(self, stack: MatrixStack) -> Update:
        if self.is_refresh(stack):
            yield from self._refresh(stack)
        projector = yield from self._projector(stack)
        projected = yield from self.project(stack, projector)
        exp_avg, exp_avg_sq = stack.state("exp_avg", "exp_avg_sq")
        direction = adam_direction(projected, exp_avg, exp_avg_sq, stack.group["betas"], stack.group["eps"])
        del projected
        direction = yield from to_columns(stack, direction)
        factors = (projector, direction) if stack.is_wide else (direction, projector)
        stack.subtract_product(*factors, adam_step_size(stack) * stack.group["scale"])
        stack.decay()

    def project(self, stack: MatrixStack, projector: Tensor) -> Reply:
        """Returns what Adam gets: this rank's rows of R = G P, [k, own L, r]."""
        return (yield from sum_columns(stack, stack.project(projector)))

    def is_refresh(self, stack: MatrixStack) -> bool:
        return (stack.step - 1) % stack.group["update_interval"] == 0

    def _projector(self, stack: MatrixStack) -> Reply:
        """Those rows of P [k, s, r] that meet this rank's columns of the tall G."""
        (projector,) = stack.state("projector")
        if not stack.group["shard_projector"]:
            return own_rows(stack, projector)
        if stack.tall_layout.dim == 0:
            return (yield from all_gather(projector, _projector_layout(stack)))
        return projector  # whole on a rank of its own, or cut as the columns are

    def _refresh(self, stack: MatrixStack) -> Update:
        """Sets the projectors to the main directions of this step's gradients, found by the owners of the matrices."""
        layout = _projector_layout(stack)
        (before,) = stack.state("projector")
        if layout.dim is not None:
            before = yield from gather_to_owners(before, layout, stack.owners)
        elif layout.group is not None:
            before = before[[index for index, owner in enumerate(stack.owners) if owner == layout.rank]]
        gradients = yield from gather_to_owners(stack.tall_gradient(), stack.tall_layout, stack.owners)
        found = torch.empty_like(before)
        for index, gradient in enumerate(gradients):
            found[index] = self._directions(gradient, before[index], stack.is_wide, stack.group["compat"])
        del gradients  # what waits for other ranks below must not be of the size of a matrix
        projector = yield from scatter_from_owners(found, layout, stack.owners)
        (kept,) = stack.state("projector")
        kept.copy_(projector)

    def _directions(self, gradient: Tensor, before: Tensor, is_wide: bool, is_compat: bool) -> Tensor:
        """The new P (s, r) for the tall G (L, s); the one before where G has no directions."""
        low, high = torch.stack(gradient.aminmax()).tolist()
        if not high - low < float("inf"):
            # Adam will take such a gradient into its moments, as torch's does; an error here would be raised on one
            # rank while the others wait for it.
            return before
        rank = before.shape[-1]
        if is_compat:
            # In the matrix's own orientation, on which the signs depend.
            matrix = (gradient.mT if is_wide else gradient).contiguous()
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            return left[:, :rank] if is_wide else right[:rank].mT
        if low == high == 0 and before.any():
            return before
        return aligned(main_directions(gradient, rank), before)


def main_directions(gradient: Tensor, rank: int) -> Tensor:
    """The right singular vectors (s, rank) of the largest singular values of `gradient` (L, s), the largest first.

    They are the eigenvectors of its Gram matrix, which in float64 is at least as precise as the SVD in float32, and
    much faster. The bits do not depend on the strides of `gradient`.
    """
    width = gradient.shape[1]
    gram = gradient.new_zeros(width, width, dtype=torch.float64)
    for rows in gradient.split(max(1, GRAM_NUMEL // width)):
        rows = rows.to(torch.float64, memory_format=torch.contiguous_format)
        gram.addmm_(rows.T, rows)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1).float()


def aligned(directions: Tensor, before: Tensor) -> Tensor:
    """`directions` (s, r), each with the sign that makes its product with the one in its place in `before` positive.

    Where that is zero, as it is in the beginning, its largest component becomes positive.
    """
    product = (directions * before).sum(0)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    return directions * torch.where(product == 0, largest, product).sign()


def _projector_layout(stack: MatrixStack) -> Layout:
    shape = (min(stack.layout.shape), stack.group["rank"])
    return stack.layout.of(shape, 0 if stack.group["shard_projector"] else None)


def build(config: GaLoreConfig, model: nn.Module) -> GaLore:
    groups = groups_of_low_rank(config, model, shard_projector=config.shard_projector)
    return GaLore(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
