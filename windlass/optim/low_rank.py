"""The base of APOLLO and the GaLore family: the param groups, the view, Adam on the projected gradient R = G P.

A matrix is seen with its longer dim L as rows, so G is (L, s), P (s, r), R and its moments (L, r). Cut along L, a rank
projects its rows by itself. Cut along s, the ranks' partial products are summed into a cut along L, so the state is
cut along L in both cases and no rank holds more than its share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from windlass.optim.base import MatrixOptimizer, StateSpec, require_key
from windlass.optim.lockstep import Reply, all_gather, reduce_scatter
from windlass.optim.matrix_stack import MatrixStack
from windlass.parallel.layout import Layout


class LowRankOptimizer(MatrixOptimizer):
    """Base of the optimizers that keep Adam's moments of a projected gradient. A group is projected if it has a `rank`.

    Weights decay after the update, and Adam's eps is added to the root of the uncorrected second moment, as the
    authors of GaLore and APOLLO do it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        compat: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "compat": compat}
        super().__init__(params, defaults)

    def is_matrix_group(self, group: Mapping[str, Any]) -> bool:
        return "rank" in group

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        require_key(group, "rank", lambda rank: isinstance(rank, int) and rank >= 1, "must be a whole number from 1")
        require_key(group, "update_interval", lambda steps: isinstance(steps, int) and steps >= 1, "must be at least 1")
        require_key(group, "scale", lambda scale: scale > 0, "must be above 0")
        if group["rank"] > min(parameter.shape):
            raise ValueError(
                f"rank={group['rank']} is above the smaller dim of {name}, {list(parameter.shape)}: lower the rank, or "
                "put it into a group without one (low_rank_param_groups does so)"
            )

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        moments = StateSpec((max(shape), group["rank"]), sharded_dim=0)
        return {"exp_avg": moments, "exp_avg_sq": moments}

    def adamw_eps(self, group: Mapping[str, Any], step: int) -> float:
        return group["eps"] / math.sqrt(1 - group["betas"][1] ** step)


def adam_step_size(stack: MatrixStack) -> float:
    """The learning rate with Adam's bias correction."""
    beta1, beta2 = stack.group["betas"]
    return stack.lr * math.sqrt(1 - beta2**stack.step) / (1 - beta1**stack.step)


def is_cut_along_short_dim(stack: MatrixStack) -> bool:
    return stack.tall_layout.dim == 1


def own_rows(stack: MatrixStack, projector: Tensor) -> Tensor:
    """Those rows of P [..., s, r] that meet this rank's columns of the tall G."""
    layout = stack.tall_layout
    return projector[..., layout.span(), :] if layout.dim == 1 else projector


def moment_layout(stack: MatrixStack, width: int) -> Layout:
    """The layout of what there is of each of the L rows: (L, width), cut along L."""
    layout = stack.tall_layout
    return layout.of((layout.shape[0], width), 0)


def sum_columns(stack: MatrixStack, partial: Tensor) -> Reply:
    """From what each rank's columns of G give for every row [k, L, width], the sums for this rank's rows.

    Where G is not cut along s the rows are whole already.
    """
    if not is_cut_along_short_dim(stack):
        return partial
    return (yield from reduce_scatter(partial, moment_layout(stack, partial.shape[-1])))


def to_columns(stack: MatrixStack, rows: Tensor) -> Reply:
    """The reverse way: what this rank has for its rows [k, own L, width], for all rows if G is cut along s."""
    if not is_cut_along_short_dim(stack):
        return rows
    return (yield from all_gather(rows, moment_layout(stack, rows.shape[-1])))
