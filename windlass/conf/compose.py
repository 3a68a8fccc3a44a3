"""Runs a function under Hydra, and turns what Hydra and OmegaConf raise into one message with a fix."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from windlass.conf.schema import Config
from windlass.conf.store import register, to_config, to_plain
from windlass.conf.text_values import taken_as_text
from windlass.errors import EXIT_STOPPED, ConfigError
from windlass.urls import HOW_INSTEAD, has_password

CONFIG_MODULE = "windlass.conf"
CONFIG_NAME = "train"


def run_hydra(task: Callable[[Config], int], prog: str, arguments: Sequence[str]) -> int:
    """Composes the configuration from `arguments` and calls `task` with it, once for each job of a sweep (`-m`).

    Hydra's own flags (`--help`, `--cfg job`, `--info`, ...) work as its users know them. In a sweep, each job's
    `run_dir` is a numbered folder below the one given.

    Returns:
        The largest of the exit codes that `task` returned; 0 if a flag only asked for information.

    Raises:
        ConfigError: an override that names no key, or gives it a bad value.
    """
    register()
    is_sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    read = [taken_as_text(argument, is_sweep) for argument in arguments]
    exit_codes = [0]
    failures: list[Exception] = []

    def job(composed: DictConfig) -> None:
        if failures or exit_codes[-1] == EXIT_STOPPED:
            return  # a sweep ends with the job that failed or was asked to stop
        try:
            exit_codes.append(task(_config_of_job(composed)))
        except Exception as error:  # Hydra would write a line of its own above our message
            failures.append(error)

    decorated = hydra.main(version_base="1.3", config_path="pkg://" + CONFIG_MODULE, config_name=CONFIG_NAME)(job)
    with _translated_errors(arguments), _arguments(prog, read):
        decorated()
        if failures:
            raise failures[0]
    return max(exit_codes)


def _config_of_job(composed: DictConfig) -> Config:
    """The configuration of this job; those of a sweep get folders of their own."""
    config = _without_passwords(to_config(composed))
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        config.run_dir = hydra_config.runtime.output_dir
        if config.checkpoint.dir is not None:
            config.checkpoint.dir = f"{config.checkpoint.dir}/{hydra_config.job.num}"
    return config


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `windlass train OVERRIDES` would use. For notebooks, tests and tools."""
    register()
    read = [taken_as_text(override) for override in overrides]
    with _translated_errors(overrides), hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return _without_passwords(to_config(hydra.compose(CONFIG_NAME, overrides=read)))


def _without_passwords(config: Config) -> Config:
    """Raises ConfigError if a URL has one: the configuration is written down, and others may read it."""

    def check(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                check(child, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list):
            for child in node:
                check(child, key)
        elif isinstance(node, str) and has_password(node):
            raise ConfigError(key, node, "has a password in it, which others could read", HOW_INSTEAD)

    check(to_plain(config), "")
    return config


@contextmanager
def _arguments(prog: str, arguments: Sequence[str]) -> Iterator[None]:
    """Lets Hydra, which reads `sys.argv`, see `arguments`, and pass on exceptions instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [prog, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _translated_errors(arguments: Sequence[str]) -> Iterator[None]:
    try:
        for argument in arguments:  # Hydra takes "=3" for a group without a name
            if argument.lstrip("+~").startswith("="):
                raise _malformed(argument)
        yield
    except MissingConfigException as error:
        raise _unknown_option(error) from None
    except OverrideParseException as error:
        raise _malformed(str(error.override)) from None
    except ConfigCompositionException as error:
        cause = error.__cause__
        if isinstance(cause, OmegaConfBaseException):
            raise _bad_key_or_value(cause, arguments) from None
        raise _composition_failed(str(error)) from None
    except OmegaConfBaseException as error:
        raise _bad_key_or_value(error, arguments) from None
    except HydraException as error:
        raise _composition_failed(str(error)) from None


def _malformed(override: str) -> ConfigError:
    key, equals, value = override.partition("=")
    if key and equals:
        rule = "is no value: Hydra reads numbers, true, false, null, names, and lists of them such as [0.9,0.95]"
        return ConfigError(key, value, rule, "`windlass train --cfg job` prints every key with its default")
    return ConfigError("override", override, "is not of the form key=value", "write e.g. train.steps=300")


def _unknown_option(error: MissingConfigException) -> ConfigError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or [] if not name.startswith("schema")]
    if not group:
        return _composition_failed(str(error))
    if not options:
        return ConfigError(group, option, "is no group of windlass", _nearest(group, _valid_keys()))
    return ConfigError(group, option, f"must be one of {', '.join(sorted(options))}", _nearest(option, options))


def _bad_key_or_value(error: OmegaConfBaseException, arguments: Sequence[str]) -> ConfigError:
    key = str(error.full_key or error.key or "?")
    overrides = [argument.lstrip("+~").partition("=") for argument in arguments]
    given = [value for name, _, value in overrides if name == key]
    value = given[-1] if given else "..."
    first_line = (error.msg or str(error)).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(key, "???", "must be given", f"add {key}=VALUE")
    if isinstance(error, GrammarParseError | InterpolationResolutionError | UnsupportedInterpolationType):
        fix = "name a key between ${ and }: `windlass train --cfg job` prints every key; the characters ${ are \\${"
        return ConfigError(key, value, first_line.rstrip("."), fix)
    if "not in struct" in first_line or "not in '" in first_line:
        return ConfigError(key, value, "is no key of this configuration", _nearest(key, _valid_keys()))
    return ConfigError(key, value, first_line.rstrip("."), f"give {key} a value of that type")


def _composition_failed(message: str) -> ConfigError:
    return ConfigError("config", "...", " ".join(message.split()), "see `windlass train --help`")


def _nearest(word: str, candidates: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if not matches:  # the leaf may be right and the group wrong or left out
        leaf = word.rpartition(".")[2]
        matches = [name for name in candidates if name.rpartition(".")[2] == leaf][:1]
    if matches:
        return f"did you mean {matches[0]}? `windlass train --cfg job` prints every key"
    return "`windlass train --cfg job` prints every key, `windlass train --help` every group"


def _valid_keys() -> list[str]:
    """Every key of the default configuration, dotted."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            name = f"{prefix}{key}"
            yield name
            if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
                continue
            if isinstance(node[key], DictConfig):
                yield from walk(node[key], f"{name}.")

    hydra.core.global_hydra.GlobalHydra.instance().clear()
    with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return list(walk(hydra.compose(CONFIG_NAME), ""))
