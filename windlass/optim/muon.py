"""Muon: An optimizer for hidden layers in neural networks (Jordan, 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from windlass.optim.base import StateSpec, require_key
from windlass.optim.config import LRAdjustment, MuonConfig
from windlass.optim.lockstep import Gathered, Update, gather_to_owners, scatter_from_owners
from windlass.optim.matrix_stack import MatrixStack
from windlass.optim.newton_schulz import COEFFICIENTS, newton_schulz
from windlass.optim.param_groups import matrix_param_groups
from windlass.optim.whole_matrix import WholeMatrixOptimizer


class Muon(WholeMatrixOptimizer):
    """Momentum whose singular values are all brought near 1. The rule and the arguments are `torch.optim.Muon`'s.

    Groups with `algorithm: "adamw"` get AdamW, with `betas` (0.9, 0.95) and `eps` 1e-8; all parameters of the others
    must be matrices. `matrix_param_groups(model)` makes such groups.

    State of an (a, b) matrix: `momentum_buffer` (a, b), cut as the matrix is, and `step`. Cut over N ranks, a step
    sends 2 a b (N-1)/N elements of it in bfloat16: to its owner and back. Newton-Schulz rounds to bfloat16 anyway, so
    the result is that of one rank, on CPUs to the bit.

    Args:
        params: parameters or param groups, plain tensors or DTensors sharded over one mesh axis.
        weight_decay: decoupled, before the update.
        ns_coefficients, ns_steps: of the Newton-Schulz iteration, see `newton_schulz`.
        eps: the least norm that a momentum is divided by.
        adjust_lr_fn: what a matrix's learning rate is multiplied by: "original", as None, sqrt(max(1, a / b));
            "match_rms_adamw" 0.2 sqrt(max(a, b)), with which one learning rate suits the matrices and AdamW's part
            (Muon is Scalable for LLM Training, 2025).

    Raises:
        ValueError: a setting is out of range, or a group without AdamW holds something else than matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        super().check_matrix(group, name, parameter)
        for key in ("lr", "weight_decay"):
            require_key(group, key, lambda value: 0 <= value < math.inf, "must be finite and not negative")
        require_key(group, "eps", lambda eps: 0 < eps < math.inf, "must be above 0 and finite")
        require_key(group, "momentum", lambda momentum: 0 <= momentum < 1, "must be in [0, 1)")
        require_key(group, "ns_coefficients", lambda values: len(values) == 3, "must be three numbers")
        require_key(group, "ns_steps", lambda steps: 0 <= steps < 100, "must be a number of steps below 100")
        kinds = [kind.value for kind in LRAdjustment]
        rule = f"must be None or one of {', '.join(kinds)}"
        require_key(group, "adjust_lr_fn", lambda kind: kind is None or kind in kinds, rule)

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(shape, is_like_parameter=True)}

    def gathered(self, stack: MatrixStack) -> Gathered | None:
        return Gathered(at_owner=math.prod(stack.layout.shape))

    def update(self, stack: MatrixStack) -> Update:
        group, layout = stack.group, stack.layout
        gradient = stack.gradient()
        (momentum,) = stack.state("momentum_buffer")
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = direction.to(torch.bfloat16)
        del gradient
        whole = yield from gather_to_owners(direction, layout, stack.owners)
        whole = newton_schulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        direction = yield from scatter_from_owners(whole, layout, stack.owners)
        stack.decay()
        stack.subtract(direction.float().mul_(stack.lr * lr_ratio(group["adjust_lr_fn"], layout.shape)))


def lr_ratio(adjustment: str | None, shape: tuple[int, ...]) -> float:
    """The factor of the learning rate of a matrix of `shape`."""
    rows, columns = shape
    if adjustment == LRAdjustment.match_rms_adamw:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def build(config: MuonConfig, model: nn.Module) -> Muon:
    keys = {key: getattr(config, key) for key in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps")}
    groups = matrix_param_groups(model, lr=config.adamw_lr or config.lr)
    return Muon(groups, adjust_lr_fn=config.adjust_lr_fn.value, **keys)
