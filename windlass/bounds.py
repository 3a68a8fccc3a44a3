"""Bounds of numbers in dataclasses of settings, said once with each field and checked by one function. Torch-free.

@dataclass
class TrainConfig:
    steps: int = bounded(300, at_least=1)

    def __post_init__(self) -> None:
        check_bounds(self, "train")
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from windlass.errors import require

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field takes. Null passes: the field's type says if it may be."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float | None = None
    """Infinity asks for a finite number."""
    fix: str | None = None
    """The order in the message; None: to set the default."""

    def admit(self, value: Any) -> bool:
        """True if `value` is within them; NaN never is."""
        is_below = self.below is None or value < self.below
        return self.at_least <= value <= self.at_most and value > self.above and is_below

    @property
    def rule(self) -> str:
        """The bounds as a clause: "must be at least 1"."""
        if self.at_most < math.inf:
            return f"must be in [{self.at_least}, {self.at_most}]"
        if self.below is not None and self.below < math.inf:
            is_closed = self.at_least > -math.inf
            low, high = self.at_least if is_closed else self.above, self.below
            return f"must be in [{low}, {high})" if is_closed else f"must be between {low} and {high}"
        if self.above > -math.inf:
            return f"must be above {self.above}{' and finite' if self.below is not None else ''}"
        return "must not be negative" if self.at_least == 0 else f"must be at least {self.at_least}"


def bounded(default: T, **bounds: Any) -> T:
    """A field of a dataclass with a default and `Bounds`, which `check_bounds` checks."""
    return dataclasses.field(default=default, metadata={Bounds: Bounds(**bounds)})


def check_bounds(settings: Any, group: str) -> None:
    """Checks the bounded fields of a dataclass. Bounds of a base hold for its subclasses' own defaults, too.

    Raises:
        ConfigError: a field, which `group` precedes in the message, is out of its bounds.
    """
    bounds: dict[str, Bounds] = {}
    for kind in reversed(type(settings).__mro__):
        for field in kind.__dict__.get("__dataclass_fields__", {}).values():
            if Bounds in field.metadata:
                bounds[field.name] = field.metadata[Bounds]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in bounds and value is not None:
            key = f"{group}.{field.name}"
            fix = "leave it null" if field.default is None else f"set {key}={field.default}"
            require(bounds[field.name].admit(value), key, value, bounds[field.name].rule, bounds[field.name].fix or fix)
