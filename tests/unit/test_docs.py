"""The examples of the guide run, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from windlass.checkpoint.durable.manifest import committed_steps

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parts.md").read_text(), re.DOTALL)
SCRIPTS = [example for example in EVERY_EXAMPLE if example.startswith("# torchrun ")]
EXAMPLES = [example for example in EVERY_EXAMPLE if example not in SCRIPTS]


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
