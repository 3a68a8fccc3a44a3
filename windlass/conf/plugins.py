"""Packages and modules of others that register models, objectives, optimizers and sources of their own."""

from __future__ import annotations

import functools
import importlib
import os
from importlib.metadata import entry_points

from windlass.errors import ConfigError

ENTRY_POINTS = "windlass.plugins"
"""The group of entry points with which an installed package names a module that registers what it has."""
VARIABLE = "WINDLASS_PLUGINS"
"""Names modules that do, separated by commas, in the environment of a launcher and its workers."""


@functools.cache
def load_plugins() -> None:
    """Imports what the entry points of installed packages and the environment name, once. No file of a run names any.

    Raises:
        ConfigError: a module cannot be imported, or registers a name that is taken.
    """
    named = {entry.value: f"the entry point {entry.name}" for entry in entry_points(group=ENTRY_POINTS)}
    named |= {name.strip(): VARIABLE for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
    for module, key in named.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            rule = f"cannot be imported ({type(error).__name__}: {error})"
            fix = "correct the module, put its folder into PYTHONPATH, or leave it out"
            raise ConfigError(key, module, rule, fix) from error
