"""Text of strangers on a terminal and on a command line."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from windlass.data.config import EncodingErrors
from windlass.errors import ConfigError
from windlass.text import command, hydra_quoted, override, printable, shell_quoted
from windlass.train.config import DType

ODD = "ab1.e \\\"'${}~=,()[]#\n\t\x1b:%?!é✓|<>&*-+@_"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("runs/größe (2) ✓", "runs/größe (2) ✓"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\r\nwindlass: error: b", r"a\r\nwindlass: error: b"),
        ("evil\u202egpj.exe", r"evil\u202egpj.exe"),
        ("\udcff\u2028\x9b1m", r"\udcff\u2028\x9b1m"),
        ("a\\x1b", "a\\x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_escaped(text: str, shown: str) -> None:
    assert printable(text) == printable(shown) == shown
    assert str(ConfigError("path", text, text, text)) == f"path={shown}: {shown}. Fix: {shown}."


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(ODD), max_size=9) | st.text(max_size=9))
def test_any_text_on_a_command_line_is_that_text_again(text: str) -> None:
    if text == "???":  # with OmegaConf, a value that is missing
        return
    (word,) = shlex.split(override("key", text)) if text.isprintable() else [f"key={hydra_quoted(text)}"]
    value = OverridesParser.create().parse_override(word).value()
    assert isinstance(value, str)
    assert OmegaConf.create({"key": value})["key"] == text


def test_a_shell_takes_words_as_they_were() -> None:
    words = ["a b", "it's", "$HOME", "~", "*", "a\nb", "\x1b[31m", "\\", "é✓", "", os.fsdecode(b"\xff'")]
    line = " ".join(map(shell_quoted, words))
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "k=null"),
        (True, "k=true"),
        (3, "k=3"),
        (1e-05, "k=1e-05"),
        ((0.9, 0.95), "k='[0.9,0.95]'"),
        (DType.bfloat16, "k=bfloat16"),
        (EncodingErrors.replace, "k=replace"),
        (Path("runs/tiny"), "k=runs/tiny"),
        ("s3://bucket/run", "k=s3://bucket/run"),
        ("null", "k='\"null\"'"),
        ("1e3", "k='\"1e3\"'"),
        ("runs/lr=1", "k='\"runs/lr=1\"'"),
        ("it's", "k='\"it'\"'\"'s\"'"),
    ],
)
def test_values_are_written_as_they_are_typed(value: object, written: str) -> None:
    assert override("k", value) == written


def test_a_command_is_quoted_word_by_word() -> None:
    assert command("windlass", "report", Path("a b")) == "windlass report 'a b'"
