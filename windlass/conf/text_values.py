"""Overrides of keys that hold text: the text is what the user typed, where Hydra would read its grammar into it."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, OverrideParseException

from windlass.conf.schema import PATH_KEYS, text_keys
from windlass.errors import ConfigError
from windlass.text import in_hydra_quotes, override, without_interpolation

_OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_CHOICE = re.compile(rf"(?:^|(?<=,))(?:{_QUOTED}(?=,|$)|[^,]*)")


def taken_as_text(argument: str, is_sweep: bool = False) -> str:
    """`argument` so that Hydra takes the value of a key that holds text as this text.

    `run_dir=1e3`, `data.path=~/books` and `data.separator=<|x|>` mean what they say. What Hydra reads as text stays as
    it is, with its quotes and escapes; so does null where a key may be null.

    Args:
        is_sweep: whether commas and Hydra's functions (`choice`, `range`, `glob`) stand for several values.

    Raises:
        ConfigError: null, for a key that may not be null; or bytes that are not UTF-8.
    """
    match = _OVERRIDE.fullmatch(argument)
    if match is None or match[2] not in text_keys():
        return argument
    prefix, key, text = match.groups()
    if re.search("[\ud800-\udfff]", text):
        raise ConfigError(key, text, "has bytes that are not UTF-8, in which configurations are kept", "rename it")
    try:
        parsed = OverridesParser.create().parse_override(argument)
        if is_sweep and parsed.is_sweep_override():
            return argument
        value = parsed.value()
    except (HydraException, OverrideParseException, RecursionError):
        choices = _CHOICE.findall(text) if is_sweep else [text]
        return f"{prefix}{key}=" + ",".join(_quoted(key, choice) for choice in choices)
    if isinstance(value, QuotedString):
        value = value.text
    if isinstance(value, str):
        expanded = _with_home(key, value)
        return argument if expanded == value else f"{prefix}{key}={in_hydra_quotes(expanded)}"
    if value is None:
        if text_keys()[key]:
            return argument
        rule, fix = "is text, and null is none", f"leave it out for its default, or set {key}='\"null\"' for that word"
        raise ConfigError(key, text, rule, fix)
    return f"{prefix}{key}={_quoted(key, text)}"


def _quoted(key: str, text: str) -> str:
    if re.fullmatch(_QUOTED, text, re.DOTALL):
        return text
    return in_hydra_quotes(_with_home(key, text))


def _with_home(key: str, text: str) -> str:
    """`text` with the home folder for `~`, if `key` names a path; `${KEY}` stays what it is."""
    if key not in PATH_KEYS or not text.startswith("~"):
        return text
    head, slash, rest = text.partition("/")
    return without_interpolation(home_expanded(key, text, head)) + slash + rest


def home_expanded(key: str, path: str, part: str | None = None) -> str:
    """`path`, or the `part` that it begins with, with the home folder that a `~` or a `~USER` there stands for.

    Raises:
        ConfigError: there is no such home folder.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path if part is None else part).expanduser())
    except RuntimeError:
        fix = f"give its whole path, or {override(key, './' + path)} if that is its name"
        raise ConfigError(key, path, "begins with `~`, and there is no such user's home folder", fix) from None
