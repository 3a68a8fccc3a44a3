"""COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs (2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from windlass.optim.base import StateSpec, require_key
from windlass.optim.config import CosmosConfig
from windlass.optim.lockstep import Gathered, Update, gather_to_owners, scatter_from_owners
from windlass.optim.matrix_stack import MatrixStack, aligned, join, one_by_one
from windlass.optim.newton_schulz import newton_schulz
from windlass.optim.param_groups import matrix_param_groups
from windlass.optim.whole_matrix import WholeMatrixOptimizer

MIN_RESIDUAL = 1e-5
"""The part outside of the basis, over the whole: below it is float32 rounding, and no direction to follow."""


class Cosmos(WholeMatrixOptimizer):
    """Adam in the leading r-dim eigenspace of the gradients' covariance, Muon in the rest of the space.

    Groups with `algorithm: "adamw"` get AdamW, with `betas` (0.9, 0.95) and `eps` 1e-8; all parameters of the others
    must be matrices. `matrix_param_groups(model)` makes such groups. (The authors give Adam all matrices of more
    than 10,000 rows; here only the group decides.)

    State of an (a, b) matrix, with r = min(rank, a, b): `momentum_buffer` (a, b), cut as the matrix is; `exp_avg_sq`
    (a, r), `basis` (b, r) and `covariance` (r, r), cut along dim 0; and `step`. All float32. Cut over N ranks, a step
    sends (3 a b + 2 (a r + b r + r^2)) (N-1)/N elements of a matrix, to its owner and back, in float32. Its owner
    computes what one rank would, on CPUs to the bit.

    Args:
        params: parameters or param groups, plain tensors or DTensors sharded over one mesh axis.
        betas: of the momentum, and of the second moments and the covariance.
        gamma: the weight of Muon's part.
        ratio: the root mean square of an update, over `lr`.
        weight_decay: decoupled, before the update.
        compat: Newton-Schulz in float32. The authors', and the default, is in bfloat16, at half the time.

    Raises:
        ValueError: a setting is out of range, or a group without AdamW holds something else than matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 64,
        gamma: float = 0.2,
        ratio: float = 0.1,
        weight_decay: float = 0.0,
        compat: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "rank": rank,
            "gamma": gamma,
            "ratio": ratio,
            "weight_decay": weight_decay,
            "compat": compat,
        }
        super().__init__(params, defaults)

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        require_key(group, "rank", lambda rank: isinstance(rank, int) and rank >= 1, "must be a whole number from 1")
        require_key(group, "gamma", lambda gamma: 0 <= gamma < math.inf, "must be finite and not negative")
        require_key(group, "ratio", lambda ratio: 0 < ratio < math.inf, "must be above 0 and finite")

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        rows, columns = shape
        rank = min(group["rank"], rows, columns)
        return {
            "momentum_buffer": StateSpec(shape, is_like_parameter=True),
            "exp_avg_sq": StateSpec((rows, rank), sharded_dim=0),
            "basis": StateSpec((columns, rank), sharded_dim=0),
            "covariance": StateSpec((rank, rank), sharded_dim=0),
        }

    def gathered(self, stack: MatrixStack) -> Gathered | None:
        # The gradient and the direction come, and the update is of their size.
        numels = [math.prod(spec.shape) for spec in self.matrix_state(stack.group, stack.layout.shape).values()]
        return Gathered(at_owner=sum(numels) + 2 * numels[0])

    def update(self, stack: MatrixStack) -> Update:
        layout, owners, beta1 = stack.layout, stack.owners, stack.group["betas"][0]
        gradient = stack.gradient()
        (momentum,) = stack.state("momentum_buffer")
        momentum.mul_(beta1).add_(gradient)
        direction = gradient.add(momentum, alpha=beta1)
        # Over the sum of the weights that its gradients have.
        direction.mul_((1 - beta1) / (1 - beta1 ** (stack.step + 1)))
        gradient = yield from gather_to_owners(gradient, layout, owners)
        direction = yield from gather_to_owners(direction, layout, owners)
        keys = ("exp_avg_sq", "basis", "covariance")
        specs = self.matrix_state(stack.group, layout.shape)
        layouts = [layout.of(specs[key].shape, 0) for key in keys]
        own_parts = stack.state(*keys)
        wholes = []
        for part, its_layout in zip(own_parts, layouts, strict=True):
            wholes.append((yield from gather_to_owners(part, its_layout, owners)))
        if len(gradient):  # this rank owns any
            reflections = [_turn_basis(stack, *parts) for parts in one_by_one(gradient, *wholes)]
            direction = self._precondition(stack, direction, wholes[0], reflections)
        del gradient
        for part, whole, its_layout in zip(own_parts, wholes, layouts, strict=True):
            part.copy_((yield from scatter_from_owners(whole, its_layout, owners)))
        step = yield from scatter_from_owners(direction, layout, owners)
        stack.decay()
        stack.subtract(step.mul_(stack.lr))

    def _precondition(
        self, stack: MatrixStack, direction: Tensor, exp_avg_sq: Tensor, reflections: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The update [k, a, b] for lr 1, from the momentum [k, a, b] and what `torch.geqrf` gave for the bases.

        What lies outside of the basis is orthogonalized in coordinates of its own: b - r columns instead of b with r
        empty directions, which takes half the time at r = b / 4 and leaves no room there for bfloat16's noise.
        """
        group = stack.group
        size, rank = math.sqrt(math.prod(stack.layout.shape)), exp_avg_sq.shape[-1]
        turned = [
            torch.ormqr(*reflection, part, left=False).tensor_split((rank,), dim=-1)
            for reflection, (part,) in zip(reflections, one_by_one(direction), strict=True)
        ]
        dtype = torch.float32 if group["compat"] else torch.bfloat16
        orthogonal = newton_schulz(join([outside for _, outside in turned]), dtype=dtype).float()
        correction = 1 - group["betas"][1] ** stack.step
        steps = []
        for reflection, (inside, outside), (part, outer, square) in zip(
            reflections, turned, one_by_one(direction, orthogonal, exp_avg_sq), strict=True
        ):
            is_direction = _norm(outside) > MIN_RESIDUAL * _norm(part)
            outer = outer * torch.where(is_direction, _scale_to(group["gamma"] * size, outer), 0.0)
            inner = inside / (square / correction).sqrt_().add_(group["eps"])
            step = torch.cat((inner, outer), dim=-1)
            step.mul_(_scale_to(group["ratio"] * size, step))
            steps.append(torch.ormqr(*reflection, step, left=False, transpose=True))
        return join(steps)


def _turn_basis(
    stack: MatrixStack, gradient: Tensor, exp_avg_sq: Tensor, basis: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Takes the gradient [k, a, b] into the state, in place.

    The covariance C = (1 - beta2) sum beta2^age G^T G is known as Q S Q^T alone; one orthogonal iteration of C a step
    turns the basis Q (b, r) towards its leading eigenspace.

    Returns:
        The new basis as `torch.geqrf` gives it: reflections, which make it a basis of the whole space.
    """
    beta2 = stack.group["betas"][1]
    gradient, before, covariance_before = aligned(gradient), aligned(basis), aligned(covariance)
    if stack.step == 1:
        image = _leading_directions(gradient, basis.shape[-1])
    else:
        image = gradient.mT @ (gradient @ before)
        image.mul_(1 - beta2).add_(before @ covariance_before, alpha=beta2)
    reflectors, scales = torch.geqrf(image)
    turned = torch.linalg.householder_product(reflectors, scales)
    turn = turned.mT @ before
    inside = gradient @ turned
    basis.copy_(turned)
    covariance.copy_(turn @ covariance_before @ turn.mT)
    covariance.mul_(beta2).add_(inside.mT @ inside, alpha=1 - beta2)
    exp_avg_sq.mul_(beta2).addcmul_(inside, inside, value=1 - beta2)
    return reflectors, scales


def _leading_directions(gradient: Tensor, rank: int) -> Tensor:
    """Multiples of the right singular vectors [k, b, rank] of the largest singular values of [k, a, b].

    From the Gram matrix over the shorter dim: the decomposition of a (b, b) matrix takes minutes where b is large.
    """
    rows, columns = gradient.shape[-2:]
    gram = gradient.mT @ gradient if rows >= columns else gradient @ gradient.mT
    gram = gram.nan_to_num(0, 0, 0)  # eigh would raise, for all matrices; the NaN stays in its own, by the gradient
    leading = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
    return leading if rows >= columns else gradient.mT @ leading


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms [k, 1, 1], float64: squares of small entries would be 0 in float32."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def _scale_to(length: float, matrices: Tensor) -> Tensor:
    """Factors [k, 1, 1] that give matrices [k, a, b] the Frobenius norm `length`. Finite: a matrix of zeros stays one,
    and one next to zero becomes shorter than `length`."""
    return (length / _norm(matrices).clamp_(min=4 * length * torch.finfo(torch.float32).tiny)).float()


def build(config: CosmosConfig, model: nn.Module) -> Cosmos:
    keys = {key: getattr(config, key) for key in ("lr", "betas", "eps", "rank", "gamma", "ratio", "weight_decay")}
    return Cosmos(matrix_param_groups(model, lr=config.adamw_lr or config.lr), **keys)
