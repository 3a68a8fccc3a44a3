"""Numbers out of the bounds of their fields are refused with one message; those of a base hold for its subclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from windlass.bounds import bounded, check_bounds
from windlass.errors import ConfigError


@dataclass
class Settings:
    count: int = bounded(4, at_least=1)
    free: int = 0
    at_least_0: float = bounded(0.0, at_least=0)
    rate: float = bounded(0.5, above=0, below=math.inf)
    share: float = bounded(0.5, at_least=0, at_most=1)
    dropout: float = bounded(0.0, at_least=0, below=1)
    part: float = bounded(0.5, above=0, below=1)
    limit: float | None = bounded(None, above=0, fix="leave it null for no limit")
    other: int | None = bounded(None, at_least=1)

    def __post_init__(self) -> None:
        check_bounds(self, "settings")


@dataclass
class Special(Settings):
    count: int = 8
    """No bounds of its own."""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", 0, "must be at least 1. Fix: set settings.count=4."),
        ("at_least_0", -0.1, "must not be negative. Fix: set settings.at_least_0=0.0."),
        ("at_least_0", math.nan, "must not be negative. Fix: set settings.at_least_0=0.0."),
        ("rate", 0.0, "must be above 0 and finite. Fix: set settings.rate=0.5."),
        ("rate", math.inf, "must be above 0 and finite. Fix: set settings.rate=0.5."),
        ("share", 1.5, "must be in [0, 1]. Fix: set settings.share=0.5."),
        ("dropout", 1.0, "must be in [0, 1). Fix: set settings.dropout=0.0."),
        ("part", 1.0, "must be between 0 and 1. Fix: set settings.part=0.5."),
        ("part", 0.0, "must be between 0 and 1. Fix: set settings.part=0.5."),
        ("limit", 0, "must be above 0. Fix: leave it null for no limit."),
        ("other", 0, "must be at least 1. Fix: leave it null."),
    ],
)
def test_a_number_out_of_its_bounds(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings(**{key: value})
    assert str(raised.value) == f"settings.{key}={value}: {message}"


def test_bounds_of_a_base_hold_for_a_default_of_its_own() -> None:
    assert (Settings().count, Special().count) == (4, 8)
    with pytest.raises(ConfigError, match=r"settings\.count=0: must be at least 1\. Fix: set settings\.count=8"):
        Special(count=0)


def test_the_ends_of_bounds_and_null_pass() -> None:
    assert Settings(count=1, free=-5, at_least_0=math.inf, share=1, dropout=0, limit=math.inf).limit == math.inf
    assert Settings(share=0, limit=None, other=None).other is None
