"""The examples of the guide run, its links lead somewhere, and docstrings say what things do or are."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from windlass import cli
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.conf.compose import compose
from windlass.conf.text_values import taken_as_text

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parts.md").read_text(), re.DOTALL)
NOT_A_SUBJECT = re.compile(r"(Of|What|Whether|Who|Whose)\b")
"""Docstrings begin with what a thing does or is."""
SCRIPTS = [example for example in EVERY_EXAMPLE if example.startswith("# torchrun ")]
EXAMPLES = [example for example in EVERY_EXAMPLE if example not in SCRIPTS]


def _commands() -> Iterator[tuple[str, str]]:
    """Page and words after `windlass` of each command that stands in a block of code."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                match = re.search(r"(?:^|^\$ |&& )windlass ([a-z].*)", line)
                if match is not None and page.name != "LOG.md":
                    yield page.name, match[1].split('" &')[0]  # of what ssh runs


COMMANDS = list(_commands())


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[example.split("\n", 1)[0] for example in EXAMPLES])
def test_an_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/parts.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.split("\n", 1)[0] for script in SCRIPTS])
def test_a_script_runs_as_its_first_line_says(script: str, tmp_path: Path) -> None:
    words = script.split("\n", 1)[0].split()[2:]
    (tmp_path / words[-1]).write_text(script)
    for _ in range(2):  # the second goes on from the first one's end
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert committed_steps(tmp_path / "checkpoints") == [20, 30]


def test_the_page_has_its_examples() -> None:
    assert (len(EXAMPLES), len(SCRIPTS)) == (8, 1)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=[f"{page}: {text[:50]}" for page, text in COMMANDS])
def test_a_command_can_be_typed_as_it_stands(page: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = shlex.split(text, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "train":
        words = [re.sub(r",.*", "", word) if "-m" in words else word for word in words[1:] if word != "-m"]
        if words != ["--help"]:
            assert compose(words)
        return
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if words[0] == "script":
            assert cli.main(words) == 0
            assert output.getvalue()
        else:
            options = cli._parser(words).parse_args(words)
            assert words[0] != "plan" or compose(options.overrides)


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings that stand alone: of modules, classes and functions, and after attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value


@pytest.mark.slow
def test_docstrings_begin_with_what_a_thing_does_or_is() -> None:
    found, num_docstrings = [], 0
    for path in sorted((ROOT / "windlass").rglob("*.py")):
        for constant in docstrings(ast.parse(path.read_text())):
            num_docstrings += 1
            text = str(constant.value).strip()
            if NOT_A_SUBJECT.match(text):
                found.append(f"{path.relative_to(ROOT)}:{constant.lineno}: {text.splitlines()[0]}")
    assert not found
    assert num_docstrings > 2000


def test_settings_in_prose_can_be_typed_as_they_stand() -> None:
    found = 0
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*=[^`\n]+)`", prose):
            for word in shlex.split(span):
                if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*=\S+", word) and "..." not in word:
                    OverridesParser.create().parse_override(taken_as_text(word))
                    found += 1
    assert found >= 100


def test_the_pages_have_their_commands() -> None:
    assert len(COMMANDS) >= 30
