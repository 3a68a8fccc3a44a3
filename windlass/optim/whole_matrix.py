"""The base of Muon and COSMOS: param groups of matrices and of AdamW, and updates that need the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from windlass.optim.base import MatrixOptimizer, require_key, require_matrix

ADAMW_KEYS: Mapping[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
"""The defaults of a group with `algorithm: "adamw"`; its `lr` and `weight_decay` are the optimizer's
own then."""


class WholeMatrixOptimizer(MatrixOptimizer):
    """Base of the optimizers whose update needs all of a matrix at once. Groups with `algorithm: "adamw"` get AdamW.

    A matrix that is cut over ranks is gathered at one of them, its owner, computed there and cut again; ranks own
    equal shares of the work. State stays cut, so a rank holds no more than its share of it between steps.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("algorithm") == "adamw":
            param_group = {**ADAMW_KEYS, **param_group}  # before the defaults of the matrices fill the gaps
        super().add_param_group(param_group)

    def is_matrix_group(self, group: Mapping[str, Any]) -> bool:
        if "algorithm" in group:
            require_key(group, "algorithm", lambda name: name == "adamw", 'must be "adamw", or left out')
        return "algorithm" not in group

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        require_matrix(type(self).__name__, name, parameter, sorter="matrix_param_groups")
