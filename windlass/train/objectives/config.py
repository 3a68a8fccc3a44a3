"""Which objective. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from windlass.registry import Registry

if TYPE_CHECKING:
    from windlass.train.objectives.objective import Objective

OBJECTIVES = Registry("objective")


@dataclass
class ObjectiveConfig:
    """The settings of every objective."""

    name: str = "next_token"

    def build(self) -> Objective:
        return cast("Objective", OBJECTIVES.build(self))


@dataclass
class NextTokenConfig(ObjectiveConfig):
    """The cross-entropy of the next token."""


OBJECTIVES.add("next_token", NextTokenConfig, "windlass.train.objectives.next_token:NextToken")
