"""AdamW: Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), in torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from windlass.optim.config import AdamWConfig
from windlass.optim.param_groups import decay_param_groups


def build_adamw(config: AdamWConfig, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> torch.optim.AdamW:
    """torch's AdamW over plain tensors or DTensors; its update is elementwise, so any cut of them is exact."""
    groups = decay_param_groups(named_parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
