"""APOLLO: SGD-like Memory, AdamW-level Performance (2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from windlass.optim.adamw import adam_direction
from windlass.optim.base import StateSpec, require_key
from windlass.optim.config import ApolloConfig, Granularity
from windlass.optim.lockstep import Update, sum_over_ranks
from windlass.optim.low_rank import (
    LowRankOptimizer,
    adam_step_size,
    is_cut_along_short_dim,
    own_rows,
    sum_columns,
    to_columns,
)
from windlass.optim.matrix_stack import MatrixStack, matrix_squares, row_squares
from windlass.optim.param_groups import groups_of_low_rank
from windlass.parallel.fragment import Fragment
from windlass.parallel.random import fill_normal_

MAX_NORM_GROWTH = 1.01
"""A step's update may be this much longer than the one before (the norm-growth limiter of Fira, 2024)."""
MIN_NORM_MEMORY = 0.6
"""The limiter's memory falls by no more than this factor a step. Without a floor one small gradient makes all later
updates small: they grow by 1% a step. Lengths of ordinary steps fall less."""
NEXT_TO_NOTHING = 1e-3
"""An update that is so much shorter than the one before is not remembered, and one that is so much shorter than AdamW's
is not compared with: gradients next to zero make such, and growing from them would take hundreds of steps."""


class Apollo(LowRankOptimizer):
    """Scales the gradient as AdamW would, each channel by a factor estimated in a random subspace of rank r.

    A param group with a `rank` is optimized so; its keys `update_interval` (steps between random projections, 200),
    `scale` (1), `granularity` ("channel" or "tensor") and `seed` (0) have defaults. Groups without get AdamW.
    APOLLO-Mini is rank=1, scale=128, granularity="tensor".

    State of an (a, b) matrix: `exp_avg` and `exp_avg_sq` (max(a, b), r), `step` and `prev_norm`. The projection is made
    again from the seed when it changes and after a resume; matrices of one width share one, so it takes min(a, b) r
    elements once and not once a matrix. Its elements depend on the seed, its shape and the step alone, not on device
    or ranks. Cut along the longer dim, the only communication of a step is one all-reduce of a number a matrix.

    Args:
        params: parameters or param groups, plain tensors or DTensors sharded over one mesh axis.
        compat: draw the projections from the seeds of the authors' apollo-torch, a generator of the device for each
            matrix, and limit growth after a zero gradient as it does. For comparisons on one rank.

    Raises:
        ValueError: a setting is out of range, or a group with a rank holds something else than matrices.
    """

    matrix_keys: Mapping[str, Any] = {
        "update_interval": 200,
        "scale": 1.0,
        "granularity": Granularity.channel.value,
        "seed": 0,
    }

    @cached_property
    def _projections(self) -> dict[Any, dict[int, Tensor]]:
        """Those in use; no state, as they can be made again."""
        return {}

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        kinds = [kind.value for kind in Granularity]
        require_key(group, "granularity", lambda kind: kind in kinds, f"must be one of {', '.join(kinds)}")

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        return super().matrix_state(group, shape) | {"prev_norm": StateSpec(())}

    def update(self, stack: MatrixStack) -> Update:
        by_channel = stack.group["granularity"] == Granularity.channel
        projection = own_rows(stack, self._projection(stack))
        projected, squares = stack.project_and(row_squares if by_channel else matrix_squares, projection)
        if not by_channel:
            projected = yield from sum_columns(stack, projected)
        elif is_cut_along_short_dim(stack):
            both = yield from sum_columns(stack, torch.cat((projected, squares), dim=-1))
            projected, squares = both[..., :-1], both[..., -1:]
        exp_avg, exp_avg_sq = stack.state("exp_avg", "exp_avg_sq")
        direction = adam_direction(projected, exp_avg, exp_avg_sq, stack.group["betas"], stack.group["eps"])
        # What waits for other ranks below must not add up to the size of the state.
        if by_channel:
            factor = _norm(direction) / (_norm(projected) + 1e-8)
            del direction, projected
            square_norm = yield from sum_over_ranks(_sums(factor.square() * squares))
            norm = square_norm.sqrt()
            factor = yield from to_columns(stack, factor)
        else:
            terms = torch.stack([_sums(direction.square()), _sums(projected.square()), squares[:, 0, 0]])
            del direction, projected
            of_direction, of_projected, of_gradient = (yield from sum_over_ranks(terms)).sqrt()
            factor = (of_direction / (of_projected + 1e-8))[:, None, None]
            norm = factor[:, 0, 0] * of_gradient
        excess = self._limit_growth(stack, norm)
        factor = factor * (adam_step_size(stack) * stack.group["scale"] ** 0.5 / excess)[:, None, None]
        stack.subtract_scaled_gradient(factor.mT if stack.is_wide else factor)
        stack.decay()

    def _limit_growth(self, stack: MatrixStack, norm: Tensor) -> Tensor:
        """By how much an update of length `norm` is too long; sets `prev_norm` to its length after division by that."""
        (prev_norm,) = stack.state("prev_norm")
        if stack.step == 1:
            prev_norm.copy_(norm)
            return torch.ones_like(norm)
        excess = (norm / (prev_norm + 1e-8)).clamp_(min=MAX_NORM_GROWTH).div_(MAX_NORM_GROWTH)
        if stack.group["compat"]:
            prev_norm.copy_(norm / excess)
            return excess
        usual = math.sqrt(max(stack.layout.shape) * stack.group["rank"])  # elements of the moments are about 1
        excess = torch.where(prev_norm > NEXT_TO_NOTHING * usual, excess, torch.ones_like(excess))
        fallen = torch.maximum(norm / excess, MIN_NORM_MEMORY * prev_norm)
        prev_norm.copy_(torch.where(norm > NEXT_TO_NOTHING * prev_norm, fallen, prev_norm))
        return excess

    def _projection(self, stack: MatrixStack) -> Tensor:
        """P of this step, (s, r): N(0, 1/r), the same for all matrices of one width (compat: [k, s, r])."""
        epoch = (stack.step - 1) // stack.group["update_interval"]
        width, rank, device = min(stack.layout.shape), stack.group["rank"], stack.parameters[0].device
        if stack.group["compat"]:
            makers = [(member, partial(self._authors_projection, member, rank, epoch)) for member in stack.parameters]
            return torch.stack([self._kept((member, epoch), make) for member, make in makers])
        key = (stack.group["seed"], width, rank, device)
        return self._kept((key, epoch), lambda: random_projection(width, rank, stack.group["seed"], epoch).to(device))

    def _kept(self, key: tuple[Any, int], make: Callable[[], Tensor]) -> Tensor:
        """Returns what `make` returned for `key` before; the two newest used of each thing are kept.

        Two, because parameters that were added later change their projection at other steps.
        """
        kept = self._projections.setdefault(key[0], {})
        value = kept.pop(key[1], None)
        kept[key[1]] = make() if value is None else value  # now the last
        while len(kept) > 2:
            del kept[next(iter(kept))]
        return kept[key[1]]

    def _authors_projection(self, parameter: Tensor, rank: int, epoch: int) -> Tensor:
        """apollo-torch 1.0.3: seeds count the parameters from 1; each refresh takes a seed drawn from the last one."""
        parameters = (member for group in self.param_groups for member in group["params"])
        seed = 1 + next(index for index, member in enumerate(parameters) if member is parameter)
        for _ in range(epoch):
            seed = int(torch.randint(0, 2**63 - 1, (15,), generator=torch.Generator().manual_seed(seed))[-1])
        rows, columns = parameter.shape
        shape = (rank, columns) if rows >= columns else (rows, rank)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=parameter.device) / math.sqrt(rank)
        return values.mT if rows >= columns else values


def random_projection(width: int, rank: int, seed: int, epoch: int) -> Tensor:
    """N(0, 1/rank) float32 (width, rank), a function of the arguments alone, on the CPU."""
    name = f"projection/{width}x{rank}/{epoch}"
    values = torch.empty(width, rank)
    fragment = Fragment(name, (width, rank), (0, 0), (width, rank), torch.float32)
    fill_normal_(values, fragment, seed=seed, std=rank**-0.5)
    return values


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def _sums(matrices: Tensor) -> Tensor:
    """The sums [k] over each matrix of [k, rows, columns]. One by one, as threads share a sum that is alone."""
    return torch.stack([matrix.sum() for matrix in matrices.unbind(0)])


def build(config: ApolloConfig, model: nn.Module) -> Apollo:
    groups = groups_of_low_rank(config, model, granularity=config.granularity.value)
    return Apollo(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
