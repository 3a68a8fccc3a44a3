"""Puts the dataclasses into Hydra's ConfigStore, and reads resolved configurations back."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from windlass.conf.schema import GROUPS, Config, schema_of
from windlass.errors import ConfigError
from windlass.files import atomic_file, sync_folder


@functools.cache
def register() -> None:
    """Makes the schemas known to Hydra, once: `schema/root`, and `schema/GROUP[_NAME]` for each preset to build on."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config, package="_global_")
    for group, kinds in GROUPS.items():
        for name, schema in kinds.items():
            store.store(group="schema", name=f"{group}_{name}" if name else group, node=schema)


def to_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration; their own rules are checked here.

    Raises:
        ConfigError: a value breaks a rule, or a mandatory one is missing.
    """
    _refuse_added_keys(composed, Config)
    return cast("Config", OmegaConf.to_object(composed))


def _refuse_added_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    """OmegaConf lets `+key=value` add a key to a dataclass; no code would read it."""
    known = {field.name for field in dataclasses.fields(schema)}
    for key in node:
        if key not in known:
            raise ConfigError(f"{prefix}{key}", node[key], "is no key of this configuration", "leave the override out")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _refuse_added_keys(child, child._metadata.object_type, f"{prefix}{key}.")


def save_config(config: Config, path: Path) -> None:
    """Writes `config` as plain YAML that `load_config` reads back to an equal one; whole or not at all."""
    with atomic_file(path) as file:
        file.write(to_yaml(config).encode())
    sync_folder(path.parent)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def to_plain(config: Config) -> dict[str, Any]:
    """`config` as dicts, lists, numbers and strings."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return cast("dict[str, Any]", plain)


def load_config(path: Path) -> Config:
    """Reads what `save_config` wrote.

    Raises:
        ConfigError: the file is not a configuration of this version of windlass.
    """
    try:
        plain = OmegaConf.load(path)
        if not isinstance(plain, DictConfig):
            raise ValueError("it holds no keys")
        typed: dict[str, Any] = {}
        for group in GROUPS:
            schema = schema_of(group, str(plain[group]["name"]))
            typed[group] = OmegaConf.merge(OmegaConf.structured(schema), plain[group])
        merged = OmegaConf.merge(OmegaConf.structured(Config), typed, plain)
        return to_config(cast("DictConfig", merged))
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            "config",
            path,
            f"is not a readable windlass configuration ({error})",
            "use the config.yaml of a run",
        ) from error
