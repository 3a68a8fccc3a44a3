"""Every block of docs/finetune.md runs as it stands, with a small model in place of the user's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.huggingface import write_folder

PAGE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FIRST = ["Train", "Ask it", "Take it with you"]
OTHERS = ["One GPU", "A few GPUs, or machines", "A laptop"]


def blocks(title: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", SECTIONS[title], re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    write_folder(tmp_path / "my-model", max_position_embeddings=1024)
    (formats,) = re.findall(r"```json\n(.*?)```", SECTIONS["The two things you bring"], re.DOTALL)
    rows = [formats]
    for number in range(60):
        turns = [("user", f"What is {number} and one?"), ("assistant", f"It is {number + 1}.")]
        rows.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (tmp_path / "questions.jsonl").write_text("".join(rows))
    return tmp_path


def run(folder: Path, block: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    ended = subprocess.run(
        ["bash", "-ec", block], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{block}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["val/loss"] for line in lines if line.get("val/loss") is not None]


@pytest.mark.full
def test_a_model_is_trained_asked_and_taken_along(folder: Path) -> None:
    said = {title: [run(folder, block) for block in blocks(title)] for title in FIRST}
    before, *_, after = losses(folder / "runs" / "mine")
    assert after < before
    assert len("".join(said["Ask it"]).splitlines()) >= 4
    tuned, brought = folder / "my-model-tuned", folder / "my-model"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tuned / name).read_bytes() == (brought / name).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("title", OTHERS)
def test_it_is_trained_everywhere(title: str, folder: Path) -> None:
    for block in blocks(title):
        run(folder, block)
    runs = sorted((folder / "runs").iterdir())
    assert runs
    for run_dir in runs:
        before, *_, after = losses(run_dir)
        assert after < before, run_dir


def test_every_block_is_run() -> None:
    named = [block for title in (*FIRST, *OTHERS) for block in blocks(title)]
    every = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert [block for block in every if block not in named] == ["pip install 'windlass[hf]'\n"]
