"""AdamW: Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), in torch's fused kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from windlass.optim.config import AdamWConfig
from windlass.optim.param_groups import decay_param_groups


def build_adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.AdamW:
    """torch's AdamW over plain tensors or DTensors; its update is elementwise, so any cut of them is exact."""
    groups = decay_param_groups(model.named_parameters(), config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def adamw_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of torch's AdamW on tensors of this rank, in place.

    Args:
        exp_avgs, exp_avg_sqs: float32, also for bfloat16 weights.
        step: the number of this step, from 1.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        by_kind.setdefault((weight.device, weight.dtype), []).append(index)
    for (device, dtype), indexes in by_kind.items():
        lists = [[tensors[index] for index in indexes] for tensors in (weights, gradients, exp_avgs, exp_avg_sqs)]
        if dtype != torch.float32:
            for weight, gradient, exp_avg, exp_avg_sq in zip(*lists, strict=True):
                _adamw_of_low_precision(weight, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay)
            continue
        torch._fused_adamw_(
            lists[0],
            [gradient.float() for gradient in lists[1]],
            lists[2],
            lists[3],
            [],
            [torch.full((), float(step), device=device)] * len(indexes),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def _adamw_of_low_precision(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch's kernel wants moments in the dtype of the weights, in which a beta2 of 0.999 would never forget."""
    correction = math.sqrt(1 - betas[1] ** step)
    stack, moments, squares = (tensor.unsqueeze(0) for tensor in (gradient.float(), exp_avg, exp_avg_sq))
    direction = adam_direction(stack, moments, squares, betas, eps * correction)[0]
    value = weight.float().mul_(1 - lr * weight_decay)
    weight.copy_(value.sub_(direction, alpha=lr * correction / (1 - betas[0] ** step)))


def adam_direction(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Takes the float32 `gradient` into the moments, in place, and returns exp_avg / (sqrt(exp_avg_sq) + eps).

    No bias correction: for that multiply by sqrt(1 - beta2^t) / (1 - beta1^t).

    Args:
        gradient, exp_avg, exp_avg_sq: stacks [k, ...].
    """
    # AdamW of weights of zero at a rate of -1, so late that its bias correction is 1: one pass of a fused kernel.
    direction = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    # A list of k: the kernel rounds the last elements of a tensor otherwise than the rest, so each must have its own.
    torch._fused_adamw_(
        list(direction.unbind(0)),
        list(gradient.contiguous().unbind(0)),
        list(exp_avg.unbind(0)),
        list(exp_avg_sq.unbind(0)),
        [],
        [torch.full((), 1e12, device=gradient.device)] * len(gradient),
        lr=-1.0,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return direction
