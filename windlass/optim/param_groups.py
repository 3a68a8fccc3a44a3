"""Which parameters are optimized alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def decay_param_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices (2-D and more) with `weight_decay`, vectors and scalars (norms, biases) without."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = []
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        # torch keeps the names beside the parameters, under "param_names".
        members = [(name, parameter) for name, parameter in trained if (parameter.ndim >= 2) == is_matrix]
        if members:
            groups.append({"params": members, "weight_decay": decay})
    return groups
