"""SGD-SaI: No More Adam: Learning Rate Scaling at Initialization is All You Need (2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from windlass.optim.base import MatrixOptimizer, StateSpec, require_key
from windlass.optim.config import SGDSaIConfig
from windlass.optim.lockstep import Reply, Update, sum_over_ranks
from windlass.optim.matrix_stack import MatrixStack, local_gradient
from windlass.optim.param_groups import decay_param_groups
from windlass.parallel.fragment import local_tensor

MIN_VARIANCE = 1e-12
"""Over the mean square: below it the elements are equal, but for rounding."""


class SGDSaI(MatrixOptimizer):
    """SGD with momentum whose learning rate is scaled for each tensor, once, by the signal-to-noise of its gradient.

    gsnr = |g| / (std(g) + eps), of the tensor's first gradient that is not small: whose root mean square is above eps.
    (A scale from a gradient of zeros would be 0 for ever, and that from a tiny one next to it; some tensors start so,
    as the first factor of LoRA does.) Until then each step has the scale of its own gradient. It is sqrt(n) for n
    elements of mean zero, and that is what elements without any spread get, such as a single one.

    State of a tensor: `momentum_buffer`, of its shape and sharded as it is, `gsnr`, negative while all gradients were
    small, and `step`. Only steps that measure gsnr communicate: one all-reduce of two float64 numbers a
    tensor, over each mesh axis that it is sharded over.

    Args:
        params: parameters or param groups of any shapes, plain tensors or DTensors however sharded.
        weight_decay: decoupled, before the update.

    Raises:
        ValueError: a setting is out of range.
    """

    takes_several_axes = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    @cached_property
    def _measured(self) -> set[Tensor]:
        """The tensors that are known to have their gsnr."""
        return set()

    def is_matrix_group(self, group: Mapping[str, Any]) -> bool:
        return True

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        for key in ("lr", "eps", "weight_decay"):
            require_key(group, key, lambda value: 0 <= value < math.inf, "must be finite and not negative")
        require_key(group, "momentum", lambda momentum: 0 <= momentum < 1, "must be in [0, 1)")

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(shape, is_like_parameter=True), "gsnr": StateSpec(())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._measured.clear()

    def update(self, stack: MatrixStack) -> Update:
        gradients = [local_gradient(parameter).float() for parameter in stack.parameters]
        momenta = [local_tensor(state["momentum_buffer"]) for state in stack.states]
        scales = [state["gsnr"] for state in stack.states]
        if not self._are_measured(stack.parameters, scales):
            measured = yield from _signal_to_noise(stack, gradients)
            for scale, value in zip(scales, measured.unbind(0), strict=True):
                scale.copy_(torch.where(scale > 0, scale, value))
        if stack.step == 1:
            torch._foreach_copy_(momenta, gradients)
        else:
            torch._foreach_lerp_(momenta, gradients, 1 - stack.group["momentum"])
        stack.decay()
        for weight, momentum, scale in zip(stack.weights(), momenta, scales, strict=True):
            weight.addcmul_(momentum, scale.abs(), value=-stack.lr)

    def _are_measured(self, parameters: list[Tensor], scales: list[Tensor]) -> bool:
        """True if all have their gsnr, which is read from the device only until they do. The same on all ranks."""
        if self._measured.issuperset(parameters):
            return True
        known = torch.stack(scales).gt(0).tolist()
        self._measured.update(parameter for parameter, is_known in zip(parameters, known, strict=True) if is_known)
        return all(known)


def _signal_to_noise(stack: MatrixStack, gradients: list[Tensor]) -> Reply:
    """gsnr of each tensor [k], from all ranks' parts of its gradient; negative if that is small, 0 if it is zero."""
    # In float64, so that the sums are the same however the tensor is cut.
    doubles = [gradient.double() for gradient in gradients]
    sums = torch.stack([torch.stack((double.sum(), double.square().sum())) for double in doubles])
    del doubles
    sums = yield from sum_over_ranks(sums)
    total, square = sums.unbind(1)
    numel = math.prod(stack.layout.shape)
    variance = (square - total.square() / numel) / max(1, numel - 1)
    ratio = square.sqrt() / (variance.clamp(min=0).sqrt() + stack.group["eps"])
    ratio = torch.where(variance * numel > MIN_VARIANCE * square, ratio, math.sqrt(numel))
    is_small = square <= numel * stack.group["eps"] ** 2
    return torch.where(square > 0, torch.where(is_small, -ratio, ratio), 0.0).float()


def build(config: SGDSaIConfig, model: nn.Module) -> SGDSaI:
    groups = decay_param_groups(model.named_parameters(), config.weight_decay)
    return SGDSaI(groups, lr=config.lr, momentum=config.momentum, eps=config.eps, weight_decay=config.weight_decay)
