"""Names, their dataclasses and what builds them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest

from windlass.conf.schema import GROUPS
from windlass.registry import OTHERS, Registry, resolve


@dataclass
class Settings:
    name: str = "one"
    size: int = 1


@dataclass
class Larger(Settings):
    size: int = 9


def built(config: Settings, more: int) -> tuple[str, int]:
    return config.name, config.size + more


def test_a_name_has_its_dataclass_and_is_built_with_what_is_given() -> None:
    registry = Registry("thing")
    registry.add("one", Settings, built)
    registry.add("two", Larger, f"{__name__}:built")
    assert list(registry) == ["one", "two"] and registry.config_of("two") is Larger
    assert registry.build(Settings(), 2) == ("one", 3) and registry.build(Larger("two"), more=1) == ("two", 10)
    with pytest.raises(KeyError):
        registry.config_of("three")
    with pytest.raises(TypeError, match="thing=two takes a Larger, not a Settings"):
        registry.build(Settings("two"), 1)


def test_others_stand_for_names_that_have_no_entry() -> None:
    registry = Registry("thing")
    registry.add(OTHERS, Settings, built)
    registry.add("two", Larger)
    assert registry.config_of("any") is Settings and registry.build(Settings("any"), 0) == ("any", 1)
    with pytest.raises(TypeError, match="is built elsewhere"):
        registry.build(Larger("two"))


def test_a_name_is_not_registered_twice() -> None:
    registry = Registry("thing")
    registry.add("one", Settings, built)
    with pytest.raises(ValueError, match="thing=one is registered twice"):
        registry.add("one", Larger, built)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_named_is_there(group: str) -> None:
    for entry in vars(GROUPS[group])["_entries"].values():
        if isinstance(entry.factory, str):
            module, _, name = entry.factory.partition(":")
            target: Any = importlib.import_module(module)
            assert resolve(entry.factory) is getattr(target, name) and callable(resolve(entry.factory))
