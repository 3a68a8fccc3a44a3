"""A run's folder from a stranger has links under the names that a run writes: no file outside of it changes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from windlass.checkpoint.config import CheckpointKind
from windlass.checkpoint.durable.local_storage import LocalStorage
from windlass.conf.compose import compose
from windlass.conf.store import save_config
from windlass.data.manifest import LOCK, MANIFEST, SPLITS, UNITS
from windlass.data.prepare import prepare
from windlass.data.sources import text_source
from windlass.data.tokenizer import ByteTokenizer
from windlass.errors import ConfigError, RunFolderError
from windlass.launch import worker
from windlass.observe.metrics import EVENTS_FILE, METRICS_FILE, JsonLines, _wandb_id
from windlass.offload.config import OffloadKind
from windlass.parallel.mesh import Mesh
from windlass.train import session
from windlass.train.run_folder import LOCK_FILE, RunFolder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    (folder / "mine.tmp").write_text("precious")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def nothing_outside_changes(outside: Path):
    yield
    assert {path.name: path.read_text() for path in outside.iterdir()} == {
        "precious": "precious",
        "mine.tmp": "precious",
    }


@pytest.mark.parametrize(("name", "target"), [(LOCK_FILE, "precious"), ("logs", "")])
def test_the_lock_and_the_logs_are_not_followed(name: str, target: str, run_dir: Path, outside: Path) -> None:
    (run_dir / name).symlink_to(outside / target)
    with pytest.raises(RunFolderError, match=rf"{name} is a symbolic link.*Fix: remove that link"):
        RunFolder(run_dir)


def test_a_run_dir_that_is_a_link_itself_is_the_users_choice(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run_dir)
    with RunFolder(tmp_path / "link"):
        assert (run_dir / "logs").is_dir()


def test_the_log_of_a_rank_is_not_followed(run_dir: Path, outside: Path) -> None:
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank1.log").symlink_to(outside / "precious")
    with (
        pytest.raises(RunFolderError, match=r"rank1\.log is a symbolic link"),
        session._logging_to(run_dir / "logs" / "rank1.log"),
    ):
        pass
    worker._redirect_output(run_dir / "logs" / "rank1.log")


@pytest.mark.parametrize("name", [METRICS_FILE, EVENTS_FILE])
def test_metrics_and_events_are_not_followed(name: str, run_dir: Path, outside: Path) -> None:
    (run_dir / name).symlink_to(outside / "precious")
    with pytest.raises(RunFolderError, match=r"is a symbolic link.*Fix: remove that link"):
        JsonLines(run_dir / name)


def test_the_configuration_takes_the_place_of_a_link(run_dir: Path, outside: Path) -> None:
    (run_dir / "config.yaml").symlink_to(outside / "precious")
    save_config(compose(), run_dir / "config.yaml")
    assert not (run_dir / "config.yaml").is_symlink()


def test_the_id_for_wandb_is_no_other_file(run_dir: Path, outside: Path) -> None:
    """It is sent away."""
    (run_dir / "wandb_run_id").symlink_to(outside / "precious")
    with pytest.raises(RunFolderError, match="wandb_run_id is a symbolic link"):
        _wandb_id(run_dir)
    (run_dir / "wandb_run_id").unlink()
    (run_dir / "wandb_run_id").write_text("secret words\n")
    with pytest.raises(RunFolderError, match="holds no id of a wandb run"):
        _wandb_id(run_dir)
    (run_dir / "wandb_run_id").unlink()
    assert _wandb_id(run_dir) == _wandb_id(run_dir)
    (run_dir / "wandb").symlink_to(outside)
    with pytest.raises(RunFolderError, match="wandb is a symbolic link"):
        _wandb_id(run_dir)


@pytest.mark.parametrize(("name", "key"), [("checkpoints", "checkpoint.dir"), ("offload", "offload.dir")])
def test_folders_elsewhere_are_named_by_their_keys(
    name: str, key: str, run_dir: Path, outside: Path, mesh: Mesh
) -> None:
    config = compose()
    config.run_dir, config.offload.name = str(run_dir), OffloadKind.ssd
    (run_dir / name).symlink_to(os.path.relpath(outside, run_dir))
    with ExitStack() as stack, pytest.raises(RunFolderError, match=rf"{name} is a symbolic link") as raised:
        session._open_folder(config, mesh, stack, is_restart=False)
    assert f"set {key}={outside.resolve()} if that is where they belong, or remove the link" in raised.value.fix
    (config.checkpoint if name == "checkpoints" else config.offload).dir = str(run_dir / "own")
    with ExitStack() as stack:
        session._open_folder(config, mesh, stack, is_restart=False)


def test_what_is_not_used_is_not_looked_at(run_dir: Path, outside: Path, mesh: Mesh) -> None:
    config = compose()
    config.run_dir, config.checkpoint.name = str(run_dir), CheckpointKind.none
    for name in ("checkpoints", "offload"):
        (run_dir / name).symlink_to(outside)
    with ExitStack() as stack:
        session._open_folder(config, mesh, stack, is_restart=False)


def test_checkpoints_are_not_written_or_deleted_through_links(run_dir: Path, outside: Path) -> None:
    storage = LocalStorage(run_dir)
    storage.make()
    (run_dir / "chunks").symlink_to(outside)
    storage.make()  # which removes what killed writers have left, in folders of its own
    with pytest.raises(OSError, match="chunks is a symbolic link"):
        storage.write("chunks/precious", [b"new"])
    with pytest.raises(OSError, match="chunks is a symbolic link"):
        storage.adopt("chunks/precious", outside / "mine.tmp")
    with pytest.raises(OSError, match="chunks is a symbolic link"):
        storage.delete(["chunks/precious"])
    (run_dir / "latest.json").symlink_to(outside / "precious")
    storage.write("latest.json", [b"{}"])
    assert (run_dir / "latest.json").read_bytes() == b"{}"


@pytest.mark.slow
def test_text_is_not_prepared_through_links(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text("words")
    out, source = tmp_path / "out", text_source([tmp_path / "text"])
    prepare(source, ByteTokenizer(), out, validation_fraction=0.3, num_workers=1, progress=False)
    (out / MANIFEST).unlink()  # as if it had been interrupted
    for name in (*SPLITS, UNITS, LOCK):
        (out / name).rename(out / "kept.tmp")
        (out / name).symlink_to(outside / "precious" if name == LOCK else outside)
        with pytest.raises(ConfigError, match=r"is a symbolic link.*Fix: remove that link"):
            prepare(source, ByteTokenizer(), out, validation_fraction=0.3, num_workers=1, progress=False)
        (out / name).unlink()
        (out / "kept.tmp").rename(out / name)
