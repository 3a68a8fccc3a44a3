"""Documents of strangers: read within limits, and checked before a value is used."""

from __future__ import annotations

import enum
import json
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from windlass import untrusted
from windlass.untrusted import Malformed, convert, parse_json, parse_yaml, read_bytes, read_json, read_yaml


@dataclass(frozen=True)
class Block:
    name: str
    shape: tuple[int, ...]
    scale: float = 1.0


class Kind(StrEnum):
    old = "old"
    new = "new"


class Pair(NamedTuple):
    first: int
    second: str


@dataclass
class Document:
    step: int
    blocks: dict[str, list[Block]]
    note: str | None = None
    kind: Literal["a", "b"] = "a"
    extra: dict[str, Any] = field(default_factory=dict)


SOUND: dict[str, Any] = {"step": 3, "blocks": {"x": [{"name": "w", "shape": [2, 3]}]}, "extra": {"any": [1, None]}}


def test_enums_and_named_tuples_are_made_of_their_values() -> None:
    assert convert(["new", "old"], list[Kind]) == [Kind.new, Kind.old]
    assert convert([3, "x"], Pair) == Pair(3, "x")
    with pytest.raises(Malformed, match="'newer', not one of old, new"):
        convert("newer", Kind)
    for wrong in ([3], [3, "x", 1], ["3", "x"], {"first": 3}, None, [True, "x"]):
        with pytest.raises(Malformed):
            convert(wrong, Pair)


def test_a_document_becomes_its_dataclass() -> None:
    document = convert(parse_json(json.dumps(SOUND)), Document)
    assert document == Document(3, {"x": [Block("w", (2, 3))]}, extra={"any": [1, None]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "`body.step` is '3', not an integer"),
        ({"step": True}, "`body.step` is True, not an integer"),
        ({"step": 3.0}, "`body.step` is 3.0, not an integer"),
        ({"blocks": []}, "`body.blocks` is [], not an object"),
        ({"blocks": {"x": {}}}, "`body.blocks.x` is {}, not a list"),
        ({"blocks": {"x": [{"name": "w", "shape": [1, None]}]}}, "`body.blocks.x[0].shape[1]` is None, not an integer"),
        ({"blocks": {"x": [{"name": "w"}]}}, "`body.blocks.x[0].shape` is missing"),
        ({"blocks": {"x": [{"name": "w", "shape": [], "scale": float("nan")}]}}, "not a finite number"),
        ({"note": 7}, "`body.note` is 7, not text"),
        ({"kind": "c"}, "`body.kind` is 'c', not one of 'a', 'b'"),
        ({"more": 1}, "`body.more` is not known"),
    ],
)
def test_another_type_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed) as caught:
        convert(SOUND | change, Document, "body")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "it is not JSON: maximum recursion depth"),
        ("[" * 65 + "]" * 65, "nests more than 64 times"),
        ('{"step": ' + "9" * 5000 + "}", "beyond 64 bits"),
        ('{"step": 9223372036854775808}', "beyond 64 bits"),
        ("", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        ("{'step': 1}", "it is not JSON"),
    ],
)
def test_json_that_python_chokes_on_is_malformed(text: str | bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_json(text)


def test_the_deepest_and_the_largest_that_are_read() -> None:
    value = parse_json("[" * 64 + "]" * 64)
    for _ in range(63):
        (value,) = value
    assert value == []
    assert parse_json("[9223372036854775807, -9223372036854775808]") == [2**63 - 1, -(2**63)]


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "alias"),
        ("a: " + "[" * 5000, "nests more than 64 times"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [1", "it is not YAML: .* in line"),
        ("a: " + "9" * 5000, "it is not YAML"),
        ("a: 2020-99-99", "it is not YAML"),
        (b"\x00\x01\x02", "it is not YAML"),
        ("? [a, b]\n: 1\n? {c: d}\n: 2", "it is not YAML"),
    ],
)
def test_yaml_that_is_no_plain_data_is_malformed(text: str | bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_yaml(text)


def test_yaml_of_plain_data_is_read_and_nothing_in_it_is_resolved() -> None:
    read = parse_yaml("a: [1, 2.5, null, text]\nb: ${oc.env:HOME}")
    assert read == {
        "a": [1, 2.5, None, "text"],
        "b": "${oc.env:HOME}",
    }


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Malformed, match="no regular file"):
            read_bytes(path)
    (tmp_path / "big").write_bytes(b"[1, 2]")
    with pytest.raises(Malformed, match="has 6 bytes, and at most 5"):
        read_bytes(tmp_path / "big", 5)
    assert read_json(tmp_path / "big") == read_yaml(tmp_path / "big") == [1, 2]
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none")
    monkeypatch.setattr(untrusted, "MAX_DEPTH", 1)
    assert read_json(tmp_path / "big") == [1, 2]


class Colour(enum.Enum):
    red = 1


@dataclass
class Setting:
    pair: tuple[float, int]
    colour: Colour = Colour.red


def test_enums_are_named_and_tuples_have_their_length() -> None:
    assert convert({"pair": [1, 2], "colour": "red"}, Setting) == Setting((1.0, 2), Colour.red)
    for change, message in (
        ({"pair": [1]}, "not a list of 2"),
        ({"pair": [1, 2, 3]}, "not a list of 2"),
        ({"pair": [1, 2.5]}, "`pair[1]` is 2.5, not an integer"),
        ({"colour": "blue"}, "`colour` is 'blue', not one of red"),
        ({"colour": 1}, "not one of red"),
        ({"colour": ["red"]}, "not one of red"),
    ):
        with pytest.raises(Malformed) as caught:
            convert({"pair": [1, 2]} | change, Setting)
        assert message in str(caught.value)


def test_numbers_of_yaml_may_be_written_and_valued_so() -> None:
    values = parse_yaml("[.inf, -.inf, 1e-3, 2E+5, -1.5e3]")
    assert convert(values, list[float], from_yaml=True) == [math.inf, -math.inf, 1e-3, 2e5, -1.5e3]
    for text in ("1e9999", "e5", "1e-3 ", "0x1e3", "a"):
        with pytest.raises(Malformed):
            convert([text], list[float], from_yaml=True)
    for value in (math.inf, "1e-3"):
        with pytest.raises(Malformed):
            convert(value, float)


@pytest.mark.parametrize("text", ["1: 2", "{2020-01-01: 1, a: 2}", "null: 1", "{1: a, b: c}"])
def test_keys_of_yaml_that_are_no_text_are_malformed(text: str) -> None:
    for kind in (dict[str, Any], Setting):
        with pytest.raises(Malformed, match=r"is a key that is not text|is not known"):
            convert(parse_yaml(text), kind)


@pytest.mark.parametrize("text", ["a: 9223372036854775808", "- [{b: -9223372036854775809}]", "1" * 400])
def test_integers_of_yaml_are_bounded(text: str) -> None:
    with pytest.raises(Malformed, match="integer beyond 64 bits"):
        parse_yaml(text)
