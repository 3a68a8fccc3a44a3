"""Reads JSON and YAML that somebody else may have written: run folders, checkpoints and prepared data travel.

A document is read within a size and a depth, from a regular file, and its values are checked against the types of a
dataclass before any is used. Whoever calls adds what a message needs: the key and the fix. Torch-free.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

MAX_BYTES = 256 << 20
"""The most of a document: the manifest of a checkpoint of 100,000 fragments has 50 MB."""
MAX_DEPTH = 64
"""Lists and objects in each other. Ours nest less than ten times; Python's own limit is met at about 1,000."""
MAX_INTEGER = 2**63
"""Integers are in [-MAX_INTEGER, MAX_INTEGER): what counts bytes, steps and elements fits, and 5,000 digits do not."""

T = TypeVar("T")

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Both are safe; the first is there where PyYAML was built with libyaml."""


class Malformed(ValueError):
    """A document that is not what it should be; the text says where and how, as a clause: "`step` is no integer"."""


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file; a pipe or a device is not waited for.

    Raises:
        Malformed: it is no regular file, or larger than `max_bytes`.
        OSError: the system does not give it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Malformed("it is no regular file")
        if status.st_size > max_bytes:
            raise Malformed(f"it has {status.st_size:,} bytes, and at most {max_bytes:,} are read")
        return stream.read(max_bytes)


def parse_json(text: bytes | str, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON document.

    Raises:
        Malformed: it is no JSON, has over `max_bytes`, nests over `MAX_DEPTH` times or has an integer beyond 64 bits.
    """
    try:
        if isinstance(text, bytes):
            text = text[: max_bytes + 1].decode()
        if len(text) > max_bytes:
            raise Malformed(f"it has more than {max_bytes:,} bytes")
        value = json.loads(text, parse_int=_integer)
        _check_depth(value)
        return value
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it is not JSON: {error}") from None


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """`parse_json` of a regular file. Raises Malformed and OSError."""
    return parse_json(read_bytes(path, max_bytes), max_bytes)


def parse_yaml(text: bytes | str) -> Any:
    """The value of a YAML document of plain data: without aliases, which a few lines of make gigabytes, and tags.

    Raises:
        Malformed: it is no such document, nests over `MAX_DEPTH` times or has an integer beyond 64 bits.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_YAML_LOADER):  # the parser keeps a stack of its own: it cannot overflow
            if isinstance(event, yaml.AliasEvent):
                raise Malformed("it holds a YAML alias (`*name`)")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise Malformed(f"it nests more than {MAX_DEPTH} times")
        value = yaml.load(text, Loader=_YAML_LOADER)
        _check_integers(value)
        return value
    except Malformed:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise Malformed(f"it is not YAML: {error.problem}" + (f" in line {mark.line + 1}" if mark else "")) from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise Malformed(f"it is not YAML: {said[0]}") from None


def read_yaml(path: Path, max_bytes: int = 16 << 20) -> Any:
    """`parse_yaml` of a regular file. Raises Malformed and OSError."""
    return parse_yaml(read_bytes(path, max_bytes))


def convert(value: Any, kind: type[T], where: str = "", *, from_yaml: bool = False) -> T:
    """`value`, as JSON gives it, as the dataclass or other type `kind`, with the types of all fields checked.

    Integers are no floats, booleans or text; floats may be integers, and are finite; lists become tuples where those
    are asked for, and names members of enums. Fields without a default must be there, and no others. Knows dataclasses,
    `int`, `float`, `bool`, `str`, `None`, enums, `list`, `tuple[X, ...]`, `tuple[X, Y]`, named tuples, `dict[str, X]`,
    unions, `Literal` and `Any`.

    Args:
        where: the name of `value` in messages, e.g. `body`.
        from_yaml: floats may be infinite or NaN, or text such as `1e-3`, which PyYAML takes for no number.

    Raises:
        Malformed: it is another thing; the message names the field.
    """
    return typing.cast("T", _convert(value, kind, where, from_yaml))


def _convert(value: Any, kind: Any, where: str, from_yaml: bool) -> Any:
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where, from_yaml)
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise _wrong(value, where, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple):
        items = _expect(value, list, where, "a list")
        is_uniform = origin is list or arguments[1:] == (...,)
        if not is_uniform and len(items) != len(arguments):
            raise _wrong(value, where, f"a list of {len(arguments)}")
        kinds = itertools.repeat(arguments[0]) if is_uniform else arguments
        pairs = enumerate(zip(items, kinds, strict=False))
        return origin(_convert(item, inner, f"{where}[{i}]", from_yaml) for i, (item, inner) in pairs)
    if origin in (dict, Mapping) or kind is dict:
        fields = _expect(value, dict, where, "an object")
        inner = arguments[1] if arguments else Any
        if odd := [key for key in fields if not isinstance(key, str)]:
            raise Malformed(f"{_quoted(_join(where, str(odd[0])))} is a key that is not text")
        return {key: _convert(item, inner, _join(where, key), from_yaml) for key, item in fields.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, kind, where, from_yaml)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if not isinstance(value, str) or value not in kind.__members__:
            raise _wrong(value, where, "one of " + ", ".join(kind.__members__))
        return kind[value]
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints, items = list(_hints(kind).values()), _expect(value, list, where, "a list")
        if len(items) != len(hints):
            raise _wrong(value, where, f"a list of {len(hints)}")
        return kind(*(_convert(item, hints[i], f"{where}[{i}]", from_yaml) for i, item in enumerate(items)))
    if kind is float:
        if from_yaml and isinstance(value, str) and _EXPONENT.fullmatch(value):
            return float(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (from_yaml or abs(value) < math.inf):
            raise _wrong(value, where, "a finite number")
        return float(value)
    if kind is int and isinstance(value, bool):
        raise _wrong(value, where, "an integer")
    return _expect(value, type(None) if kind is None else kind, where, _NAMES.get(kind, "of another type"))


_NAMES: dict[Any, str] = {int: "an integer", str: "text", bool: "true or false", list: "a list", type(None): "null"}
_EXPONENT = re.compile(r"[+-]?\d{1,20}(\.\d{0,20})?[eE][+-]?\d{1,3}")


def _convert_union(value: Any, kinds: tuple[Any, ...], where: str, from_yaml: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    for kind in rest[:-1]:
        try:
            return _convert(value, kind, where, from_yaml)
        except Malformed:
            continue
    return _convert(value, rest[-1], where, from_yaml)


def _convert_dataclass(value: Any, kind: Any, where: str, from_yaml: bool) -> Any:
    given = _expect(value, dict, where, "an object")
    hints, fields = _hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(map(str, given.keys() - fields.keys()))  # YAML has keys of other types
    if unknown:
        raise Malformed(f"{_quoted(_join(where, unknown[0]))} is not known")
    missing = [
        name
        for name, field in fields.items()
        if name not in given and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise Malformed(f"{_quoted(_join(where, missing[0]))} is missing")
    return kind(**{name: _convert(item, hints[name], _join(where, name), from_yaml) for name, item in given.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(value: Any, kind: type, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(value, where, name)
    return value


def _wrong(value: object, where: str, expected: str) -> Malformed:
    shown = repr(value)
    return Malformed(f"{_quoted(where) or 'it'} is {shown[:40] + '...' if len(shown) > 40 else shown}, not {expected}")


def _quoted(where: str) -> str:
    return f"`{where[:200]}`" if where else ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -MAX_INTEGER <= (number := int(digits)) < MAX_INTEGER:
        raise Malformed(f"it holds an integer beyond 64 bits ({digits[:20]}...)")
    return number


def _check_integers(value: Any) -> None:
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        raise Malformed("it holds an integer beyond 64 bits")
    for child in _children(value):
        _check_integers(child)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [child for node in level for child in _children(node) if isinstance(child, dict | list)]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise Malformed(f"it nests more than {MAX_DEPTH} times")


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
