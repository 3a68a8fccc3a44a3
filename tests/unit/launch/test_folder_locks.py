"""Folders that a run writes to are locked in themselves, whatever path or key leads to them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.errors import RunFolderError
from windlass.parallel.mesh import Mesh
from windlass.train import run_folder, session
from windlass.train.session import _open_folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.0)
    monkeypatch.setattr(session, "CHECKPOINTS_PATIENCE_S", 0.0)


@pytest.mark.slow
def test_each_folder_of_a_run_that_lives_is_refused_to_another(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "link").symlink_to("A")
    alone = compose([f"run_dir={tmp_path}/A"])
    taken = {
        "run_dir": (f"run_dir={tmp_path}/A",),
        "by a link": (f"run_dir={tmp_path}/link",),
        "its checkpoints": (f"run_dir={tmp_path}/B", f"checkpoint.dir={tmp_path}/A/checkpoints"),
        "its checkpoints by a link": (f"run_dir={tmp_path}/B", f"checkpoint.dir={tmp_path}/link/checkpoints"),
        "its run_dir as checkpoints": (f"run_dir={tmp_path}/B", f"checkpoint.dir={tmp_path}/A"),
        "its checkpoints as run_dir": (f"run_dir={tmp_path}/A/checkpoints",),
        "lazy": (f"run_dir={tmp_path}/B", f"checkpoint.dir={tmp_path}/A/checkpoints", "checkpoint=lazy"),
    }
    configs: dict[str, Config] = {kind: compose(list(overrides)) for kind, overrides in taken.items()}
    with ExitStack() as first:
        _open_folder(alone, mesh, first, is_restart=False)
        for kind, config in configs.items():
            with ExitStack() as second, pytest.raises(RunFolderError, match="is in use by process"):
                _open_folder(config, mesh, second, is_restart=False)
                pytest.fail(kind)
    for config in configs.values():
        with ExitStack() as later:
            _open_folder(config, mesh, later, is_restart=False)


@pytest.mark.slow
def test_one_folder_for_all_is_locked_once(tmp_path: Path, mesh: Mesh) -> None:
    config = compose([f"run_dir={tmp_path}/A", f"checkpoint.dir={tmp_path}/A"])
    with ExitStack() as stack:
        _open_folder(config, mesh, stack, is_restart=False)
