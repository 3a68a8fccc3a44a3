"""Natural GaLore: Accelerating GaLore for Memory-Efficient LLM Training and Fine-tuning (Das, 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from windlass.optim.base import StateSpec, require_key
from windlass.optim.config import NaturalGaLoreConfig
from windlass.optim.galore import GaLore
from windlass.optim.lockstep import Reply, sum_over_ranks
from windlass.optim.matrix_stack import MatrixStack, aligned, of_each
from windlass.optim.param_groups import groups_of_low_rank
from windlass.parallel.fragment import local_tensor

BLOCK_NUMEL = {"cpu": 1 << 13, "cuda": 1 << 20}
"""Elements of each tensor of a history that are in float64 at a time: few enough for a CPU's cache, enough to hide what
a kernel's launch costs."""


class NaturalGaLore(GaLore):
    """GaLore whose Adam gets a natural gradient in place of the projected one.

    With g = vec(R) of the projected gradient, and the last `history` of these, g included, as the columns of H, it is
    (damping I + H H^T)^-1 g, H H^T being an estimate of the Fisher information (times `history`). The paper finds it by
    Woodbury's identity as g / damping - H z / damping^2 with (I + H^T H / damping) z = H^T g. As g is a column of H,
    say the j-th, that equals H w with (damping I + H^T H) w = e_j, which is what is computed, in float64: it has no
    difference of two large vectors. Its length is about |g| / (damping + |g|^2) or less, so Adam's eps weighs more the
    larger gradients are; with a norm up to 1, as clipping gives it, it does not matter.

    The history is of the subspace it was made in, so it begins anew when that changes; the authors' code keeps it, and
    takes coordinates along the old directions for coordinates along the new ones.

    The keys of a group with a `rank` are GaLore's and `history` (20), `damping` (1e-3). State is GaLore's and
    `history` (history, L, r), cut along L where the matrix is cut, and `gram` (2, history, history), the same on every
    rank: H^T H as a sum of two float32 numbers an element, about as precise as float64. Where the matrix is cut a step
    has one all-reduce more than GaLore's, of `history` float64 numbers a matrix.

    Args:
        params, compat: as for `GaLore`. The authors' code projects from both sides, which the paper does not; there is
            no mode for that.

    Raises:
        ValueError: a setting is out of range, or a group with a rank holds something else than matrices.
    """

    matrix_keys: Mapping[str, Any] = {**GaLore.matrix_keys, "history": 20, "damping": 1e-3}

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        require_key(group, "history", lambda steps: isinstance(steps, int) and steps >= 1, "must be at least 1")
        require_key(group, "damping", lambda value: 0 < value < math.inf, "must be above 0 and finite")

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        steps = group["history"]
        return super().matrix_state(group, shape) | {
            "history": StateSpec((steps, max(shape), group["rank"]), 1),
            "gram": StateSpec((2, steps, steps)),
        }

    def project(self, stack: MatrixStack, projector: Tensor) -> Reply:
        projected = yield from super().project(stack, projector)
        # One by one: stacked histories would be copies of the largest part of the state.
        histories = [local_tensor(state["history"]) for state in stack.states]
        is_first = self.is_refresh(stack)
        slot = (stack.step - 1) % stack.group["update_interval"] % stack.group["history"]
        for history, newest in zip(histories, projected, strict=True):
            if is_first:
                history.zero_()
            history[slot] = newest
        del projected
        products = yield from sum_over_ranks(torch.stack([products_with(history, slot) for history in histories]))
        (parts,) = stack.state("gram")
        gram = parts.double().sum(1)
        if is_first:
            gram.zero_()
        gram[:, slot] = products
        gram[:, :, slot] = products
        parts[:, 0] = gram
        parts[:, 1] = gram - parts[:, 0]
        weights = of_each(lambda gram: natural_weights(gram, slot, stack.group["damping"]), gram)
        return torch.stack(
            [combination(history, aligned(of_one)) for history, of_one in zip(histories, weights, strict=True)]
        )


def products_with(history: Tensor, slot: int) -> Tensor:
    """The inner products in float64, (n,), of each of the n tensors in `history` with the one at `slot`."""
    products = history.new_zeros(len(history), dtype=torch.float64)
    for columns in _blocks(history):
        columns = columns.double()
        products.addmv_(columns, columns[slot])
    return products


def natural_weights(gram: Tensor, slot: int, damping: float) -> Tensor:
    """w of the natural gradient H w: (damping I + H^T H) w = e_slot, for each of `gram` = H^T H, [k, n, n] float64.

    Columns of zeros, which are those that no step has filled yet, get no weight.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Not checked: a check would wait for the device. With damping only a gradient that is not finite could fail.
    return torch.linalg.solve_ex(gram + damping * identity, identity[slot].expand(len(gram), -1))[0]


def combination(history: Tensor, weights: Tensor) -> Tensor:
    """H w, the shape of one tensor of `history`, added up in float64: weights of either sign may nearly cancel."""
    combined = torch.empty_like(history[0])
    for columns, target in zip(_blocks(history), _blocks(combined[None]), strict=True):
        target[0] = weights @ columns.double()
    return combined


def _blocks(history: Tensor) -> tuple[Tensor, ...]:
    """Views (n, m) of a bounded number of elements of each of the n tensors in `history`, which together are all."""
    return history.flatten(1).split(BLOCK_NUMEL.get(history.device.type, 1 << 20), dim=1)


def build(config: NaturalGaLoreConfig, model: nn.Module) -> NaturalGaLore:
    keys = {key: getattr(config, key) for key in ("shard_projector", "history", "damping")}
    groups = groups_of_low_rank(config, model, **keys)
    return NaturalGaLore(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
