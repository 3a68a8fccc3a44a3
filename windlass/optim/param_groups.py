"""Which parameters are optimized alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from windlass.errors import ConfigError
from windlass.optim.config import LowRankConfig

LARGE_MODEL_PARAMETERS = 1_000_000_000
LARGE_MODEL_RANK = 256
HEADS = ("lm_head", "head", "output", "embed_out", "score", "classifier")
"""The names of the module that makes logits, in common model code."""

Named = list[tuple[str, torch.Tensor]]
"""Parameters with names, which torch's optimizers take and keep under "param_names"."""


def decay_param_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices (2-D and more) with `weight_decay`, vectors and scalars (norms, biases) without."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = []
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        members = [(name, parameter) for name, parameter in trained if (parameter.ndim >= 2) == is_matrix]
        if members:
            groups.append({"params": members, "weight_decay": decay})
    return groups


def low_rank_param_groups(
    model: nn.Module, rank: int | None = None, *, heads: Collection[str] = HEADS, **keys: Any
) -> list[dict[str, Any]]:
    """Param groups for `Apollo`, `GaLore` and `NaturalGaLore`: the inner linear layers with a rank, the rest without.

    Embeddings, the head, vectors, and matrices whose smaller dim is not above `rank` (there is nothing to save) get
    plain AdamW; vectors do not decay.

    Args:
        rank: None is `default_rank(model)`.
        heads: names of modules that make logits.
        keys: further keys of the low-rank group: `scale`, `update_interval`, `granularity`, ...

    Raises:
        ValueError: there is nothing to project.
    """
    if rank is None:
        rank = default_rank(model)
    sorted_ = sort_parameters(model, heads)
    large = [(name, parameter) for name, parameter in sorted_.inner if min(parameter.shape) > rank]
    small = [(name, parameter) for name, parameter in sorted_.inner if min(parameter.shape) <= rank]
    if not large:
        widths = sorted({min(parameter.shape) for _, parameter in sorted_.inner})
        raise ValueError(f"no linear layer inside the model is wider than rank {rank}: their smaller dims are {widths}")
    groups = [{"params": large, "rank": rank, **keys}, {"params": sorted_.outer + small}]
    return _without_empty([*groups, {"params": sorted_.vectors, "weight_decay": 0.0}])


def matrix_param_groups(model: nn.Module, *, heads: Collection[str] = HEADS, **adamw: Any) -> list[dict[str, Any]]:
    """Param groups for `Muon` and `Cosmos`: the inner linear layers, and the rest for AdamW; vectors do not decay.

    Args:
        heads: names of modules that make logits.
        adamw: keys of the AdamW groups: `lr`, `betas`, `eps`, `weight_decay`.
    """
    sorted_ = sort_parameters(model, heads)
    rest = {"algorithm": "adamw", **adamw}
    groups = [{"params": sorted_.inner}, {**rest, "params": sorted_.outer}]
    return _without_empty([*groups, {**rest, "params": sorted_.vectors, "weight_decay": 0.0}])


def _without_empty(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


@dataclass
class SortedParameters:
    """The parameters of a model that are trained."""

    inner: Named = field(default_factory=list)
    """Weights of linear layers, but not of the head."""
    outer: Named = field(default_factory=list)
    """Other tensors of 2 dims and more: embeddings, the head, convolutions."""
    vectors: Named = field(default_factory=list)


def sort_parameters(model: nn.Module, heads: Collection[str] = HEADS) -> SortedParameters:
    """Sorts by the module that holds a parameter; one that several hold is inner only if all are linear layers."""
    linear: set[torch.Tensor] = set()
    others: set[torch.Tensor] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        is_inner = isinstance(module, nn.Linear) and name.rpartition(".")[2] not in heads
        for key, parameter in module.named_parameters(recurse=False):
            (linear if is_inner and key == "weight" else others).add(parameter)
    found = SortedParameters()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            found.vectors.append((name, parameter))
        elif parameter in linear and parameter not in others:
            found.inner.append((name, parameter))
        else:
            found.outer.append((name, parameter))
    return found


def default_rank(model: nn.Module) -> int:
    """256 for models from 1B parameters, else a quarter of the width, as in APOLLO (2024).

    The width is the smaller dim that most elements of the inner linear layers have.
    """
    if sum(parameter.numel() for parameter in model.parameters()) >= LARGE_MODEL_PARAMETERS:
        return LARGE_MODEL_RANK
    numel_of_width: dict[int, int] = {}
    for _, parameter in sort_parameters(model).inner:
        width = min(parameter.shape)
        numel_of_width[width] = numel_of_width.get(width, 0) + parameter.numel()
    if not numel_of_width:
        raise ValueError("the model has no linear layers to project: give low_rank_param_groups a rank, or use AdamW")
    return max(1, max(numel_of_width, key=lambda width: (numel_of_width[width], width)) // 4)


def groups_of_low_rank(config: LowRankConfig, model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    """`low_rank_param_groups` as configured, with `keys` for the matrices.

    Raises:
        ConfigError: no matrix is larger than the rank.
    """
    try:
        groups = low_rank_param_groups(
            model, config.rank, update_interval=config.update_interval, scale=config.scale, **keys
        )
    except ValueError as error:
        fix = "lower it, leave it out, or choose optim=adamw"
        raise ConfigError("optim.rank", config.rank, str(error), fix) from error
    for group in groups:
        if "rank" not in group:
            group["lr"] = config.adamw_lr or config.lr
    return groups
