"""Puts the dataclasses into Hydra's ConfigStore, and reads resolved configurations back."""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from windlass.conf.plugins import load_plugins
from windlass.conf.schema import ADDED_LATER, GROUPS, PATH_KEYS, Config, schema_of
from windlass.conf.text_values import home_expanded
from windlass.data.config import BYTES, ChatDataConfig, PreparedDataConfig
from windlass.errors import ConfigError
from windlass.files import atomic_file, sync_folder
from windlass.untrusted import Malformed, convert, read_yaml


@functools.cache
def register() -> None:
    """Makes the schemas known to Hydra, once: `schema/root`, and `schema/GROUP[_NAME]` for each preset to build on.

    A name that is registered and has no preset of ours, such as one of a plugin, is a preset with its defaults.
    """
    load_plugins()
    store, presets = ConfigStore.instance(), Path(__file__).parent
    store.store(group="schema", name="root", node=Config, package="_global_")
    for group, kinds in GROUPS.items():
        for name in kinds:
            store.store(group="schema", name=f"{group}_{name}" if name else group, node=kinds.config_of(name))
            if name and not (presets / group / f"{name}.yaml").is_file():
                store.store(group=group, name=name, node=kinds.config_of(name)(name=name))


def to_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration; their own rules are checked here.

    Raises:
        ConfigError: a value breaks a rule, or a mandatory one is missing.
    """
    _refuse_added_keys(composed, Config)
    config = cast("Config", OmegaConf.to_object(composed))
    for key in PATH_KEYS:
        holder, _, name = key.rpartition(".")
        owner = getattr(config, holder) if holder else config
        path = getattr(owner, name, None)
        if path is not None:
            setattr(owner, name, home_expanded(key, path))
    _resolve_tokenizer(config)
    return config


def _resolve_tokenizer(config: Config) -> None:
    """Sets a `data.tokenizer` that was left null: the folder of the model, and bytes for text where it has none."""
    data = config.data
    if isinstance(data, PreparedDataConfig) and data.tokenizer is None:
        data.tokenizer = config.model.folder or (None if isinstance(data, ChatDataConfig) else BYTES)


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
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """With escapes for what YAML would read as the end of a line, or not at all."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def to_plain(config: Config) -> dict[str, Any]:
    """`config` as dicts, lists, numbers and strings."""
    return cast("dict[str, Any]", _plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def load_config(path: Path) -> Config:
    """Reads what `save_config` wrote. Whoever wrote it, nothing in it is resolved, imported or called.

    Raises:
        ConfigError: the file is not a configuration of this version of windlass.
    """
    load_plugins()
    try:
        return _from_plain(read_yaml(path))
    except (Malformed, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        rule = f"is not a readable windlass configuration ({said})"
        fix = "use the config.yaml of a run, or move this one away to go on without it"
        raise ConfigError("config", path, rule, fix) from error


def _from_plain(plain: Any) -> Config:
    """The configuration that `to_plain` made `plain` of. Keys that have a default may be missing.

    Raises:
        Malformed: it is another thing.
        ConfigError: a value breaks a rule of its dataclass.
    """
    given = {}
    for key, value in {**ADDED_LATER, **convert(plain, dict[str, Any])}.items():
        if key not in _kinds():
            raise Malformed(f"`{key}` is not known")
        kind = _schema_of(key, convert(value, dict[str, Any], key)) if key in GROUPS else _kinds()[key]
        _refuse_unset(kind, value, f"{key}.")
        given[key] = convert(value, kind, key, from_yaml=True)
    _refuse_unset(Config, given, "")
    return Config(**given)


@functools.cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def _schema_of(group: str, plain: Mapping[str, Any]) -> type:
    name = str(plain.get("name"))
    try:
        return schema_of(group, name)
    except KeyError:
        raise Malformed(f"`{group}.name` is {name!r}, not one of {', '.join(GROUPS[group])}") from None


def _refuse_unset(schema: Any, plain: Mapping[str, Any], prefix: str) -> None:
    """Raises Malformed if `plain` lacks a key of `schema` whose default is none, or is made of other keys."""
    for field in dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ():
        is_value = not isinstance(field.default, str) or (field.default != MISSING and "${" not in field.default)
        if not is_value and field.name not in plain:
            raise Malformed(f"`{prefix}{field.name}` is missing")
