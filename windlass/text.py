"""Shows text that somebody else chose on a terminal, and puts it on a command line. Torch-free."""

from __future__ import annotations

import enum
import os
import re
import shlex
from collections.abc import Iterable

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./:@%+-]*")
"""Text that Hydra takes as it is, unless it is one of"""
_WORDS = re.compile(r"null|true|false|nan|inf", re.IGNORECASE)


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey, or not show, as Python escapes it: `\\x1b`, `\\u202e`."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def override(key: str, value: object) -> str:
    """`KEY=VALUE` as a user types it after `windlass train`, quoted for Hydra and for the shell where that is needed.

    Args:
        value: as the configuration has it: text, a number, a truth value, None, an enum, or several of these.
    """
    return f"{key}={shell_quoted(_hydra_value(value))}"


def hydra_quoted(text: str) -> str:
    """`text` as a quoted value of an override, from which Hydra and OmegaConf make that text."""
    return in_hydra_quotes(without_interpolation(text))


def in_hydra_quotes(text: str) -> str:
    """`text` as a quoted value of an override, in which OmegaConf still reads `${KEY}`."""
    return '"' + re.sub(r'(\\*)"', r"\1\1\"", text) + _backslashes_at_end(text) + '"'


def without_interpolation(text: str) -> str:
    """`text` so that OmegaConf reads no `${KEY}` in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def shell_quoted(text: str) -> str:
    """`text` as one word of a shell. Bash and zsh know the form that control characters need."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(_shell_escaped(c) for c in text) + "'"


def command(*words: str | os.PathLike[str]) -> str:
    """A command line of these words, each quoted for the shell where that is needed."""
    return " ".join(shell_quoted(os.fspath(word)) for word in words)


def _backslashes_at_end(text: str) -> str:
    return text[len(text.rstrip("\\")) :]


def _hydra_value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return text if _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text) else hydra_quoted(text)
    if isinstance(value, Iterable):
        return "[" + ",".join(_hydra_value(item) for item in value) + "]"
    raise TypeError(f"{value!r} is no value of a configuration")


def _shell_escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
