"""Where a path leads: to checkpoints of this machine, and not where a found config.yaml would have it go."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from support.checkpoints import Training

from windlass.checkpoint import inspect
from windlass.checkpoint.durable.locate import checkpoints_of, find_checkpoint
from windlass.cli import main
from windlass.errors import EXIT_USER_ERROR, ConfigError
from windlass.parallel.mesh import Mesh


def run_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(text)
    return path


@pytest.mark.parametrize(
    "directory",
    [
        *("s3://bucket/x", "ftp://127.0.0.1:9/x", "memory://x", "reference::file:///x/refs.json", "http://host/x"),
        "simplecache::ftp://host/x",
    ],
)
def test_a_found_configuration_leads_to_no_url(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("url_to_fs", "open", "filesystem"):
        monkeypatch.setattr(fsspec, name, lambda *_, **__: pytest.fail("fsspec was asked"))
    path = run_folder(tmp_path / "run", f"checkpoint:\n  dir: '{directory}'\n")
    for command in (["list"], ["verify"], ["export", "--format", "dcp", "--output", str(tmp_path / "out")]):
        assert main(["ckpt", command[0], str(path), *command[1:]]) == EXIT_USER_ERROR
        said = capsys.readouterr().err
        assert "error: resume=" in said and "which is not followed" in said


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_found_configuration_leads_to_a_local_folder(scheme: str, tmp_path: Path, mesh: Mesh) -> None:
    newest = Training().checkpointer(tmp_path / "elsewhere", mesh).save(3)
    path = run_folder(tmp_path / "run", f"checkpoint:\n  dir: {scheme}{tmp_path}/elsewhere\n")
    assert find_checkpoint(path) == newest
    assert [row.step for row in inspect.list_checkpoints(path)] == [3]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "3",
            "checkpoint: 3",
            "checkpoint:\n  dir: [1]",
            "checkpoint:\n  dir: 7",
            "checkpoint: {dir: null}",
        ),
        *("a: &a [x]\nb: *a", "x: !!python/object/apply:os.system [true]", "[" * 5000, 'checkpoint: {dir: "a\\0b"}'),
    ],
)
def test_other_configurations_lead_nowhere(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        checkpoints_of(run_folder(tmp_path / "run", text))
