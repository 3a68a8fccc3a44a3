"""Names that a configuration may choose from, each with its dataclass and with what builds it. Torch-free.

A package keeps a registry in its `config.py`. What builds is named as an entry point is, `module:function`, and is
imported when it is needed, so that reading a configuration imports no framework.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

OTHERS = ""
"""The name of an entry that stands for every name that has none of its own."""


@dataclass(frozen=True)
class Entry:
    config: type
    factory: str | Callable[..., Any] | None


class Registry(Collection[str]):
    """The names of one group of a configuration, in the order of their registration.

    Args:
        group: as users write it: `optim` of `optim=adamw`.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, config: type, factory: str | Callable[..., Any] | None = None) -> None:
        """Registers `name`.

        Args:
            name: the value of the group's key `name`; `OTHERS` for all that have no entry.
            config: a dataclass derived from the group's own.
            factory: `module:function` or a function: it takes a `config`, and then what `build` is called with.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.group}={name} is registered twice")
        self._entries[name] = Entry(config, factory)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def config_of(self, name: str) -> type:
        """The dataclass of `name`. Raises KeyError where there is none."""
        return self._entry(name).config

    def build(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the factory of `config.name` with `config` and the arguments."""
        entry = self._entry(config.name)
        if not isinstance(config, entry.config):
            raise TypeError(
                f"{self.group}={config.name} takes a {entry.config.__name__}, not a {type(config).__name__}"
            )
        factory = entry.factory
        if factory is None:
            raise TypeError(f"{self.group}={config.name} is built elsewhere")
        return (resolve(factory) if isinstance(factory, str) else factory)(config, *args, **kwargs)

    def _entry(self, name: str) -> Entry:
        return self._entries[name] if name in self._entries else self._entries[OTHERS]


def resolve(reference: str) -> Callable[..., Any]:
    """Imports what `module:name` names; `name` may have dots."""
    module, _, name = reference.partition(":")
    return attrgetter(name)(importlib.import_module(module))
