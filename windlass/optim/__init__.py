"""Optimizers and learning-rate schedules, each usable in any training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windlass.optim.apollo import Apollo
    from windlass.optim.cosmos import Cosmos
    from windlass.optim.galore import GaLore
    from windlass.optim.muon import Muon
    from windlass.optim.natural_galore import NaturalGaLore
    from windlass.optim.param_groups import low_rank_param_groups, matrix_param_groups
    from windlass.optim.sgd_sai import SGDSaI

_HOMES = {
    "Apollo": "apollo",
    "Cosmos": "cosmos",
    "GaLore": "galore",
    "Muon": "muon",
    "NaturalGaLore": "natural_galore",
    "SGDSaI": "sgd_sai",
    "low_rank_param_groups": "param_groups",
    "matrix_param_groups": "param_groups",
}

__all__ = [
    "Apollo",
    "Cosmos",
    "GaLore",
    "Muon",
    "NaturalGaLore",
    "SGDSaI",
    "low_rank_param_groups",
    "matrix_param_groups",
]


def __getattr__(name: str) -> Any:
    # Lazily: the configuration imports `windlass.optim.config`, and with it this file, without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
