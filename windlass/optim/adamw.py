"""AdamW: Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), in torch's fused kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from windlass.optim.config import AdamWConfig
from windlass.optim.param_groups import decay_param_groups
from windlass.optim.strides import dense, laid_out_as, put_back


def build(config: AdamWConfig, model: nn.Module) -> torch.optim.AdamW:
    """torch's AdamW over plain tensors or DTensors; its update is elementwise, so they may be sharded in any way."""
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
    """One step of torch's AdamW on tensors of this rank, in place. Fastest where a weight, its gradient and its moments
    have the same strides and fill their memory; what does not is copied, the weight and the moments there and back.

    Args:
        exp_avgs, exp_avg_sqs: float32, also for bfloat16 weights.
        step: the number of this step, from 1.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        by_kind.setdefault((weight.device, weight.dtype), []).append(index)
    for (_, dtype), indexes in by_kind.items():  # a kernel takes tensors of one device and dtype
        lists = [[tensors[index] for index in indexes] for tensors in (weights, gradients, exp_avgs, exp_avg_sqs)]
        if dtype != torch.float32:
            for weight, gradient, exp_avg, exp_avg_sq in zip(*lists, strict=True):
                _adamw_of_low_precision(weight, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay)
            continue
        lists[1] = [gradient.float() for gradient in lists[1]]
        _fused_adamw(*lists, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _fused_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch's kernel on float32 tensors of one device, whatever their strides are.

    The kernel takes the n-th place in the memory of each for the same element.
    """
    targets = [dense(weight) for weight in weights]
    lists = [
        [laid_out_as(tensor, target) for tensor, target in zip(tensors, targets, strict=True)]
        for tensors in (gradients, exp_avgs, exp_avg_sqs)
    ]
    torch._fused_adamw_(
        targets,
        lists[0],
        lists[1],
        lists[2],
        [],
        [torch.full((), float(step), device=targets[0].device)] * len(targets),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    put_back(weights, targets)
    put_back(exp_avgs, lists[1])
    put_back(exp_avg_sqs, lists[2])


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
    direction = torch.zeros_like(exp_avg)
    # A list of k: the kernel rounds the last elements of a tensor otherwise than the rest, so each must have its own.
    lists = [list(tensor.unbind(0)) for tensor in (direction, gradient, exp_avg, exp_avg_sq)]
    _fused_adamw(*lists, step=1e12, lr=-1.0, betas=betas, eps=eps, weight_decay=0.0)
    return direction
