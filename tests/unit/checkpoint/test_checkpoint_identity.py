"""A checkpoint says of which step and of which run it is, and is taken for no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.checkpoints import Training

from windlass.checkpoint import inspect
from windlass.checkpoint.durable.manifest import MANIFEST, Manifest, _digest, step_folder, step_of
from windlass.checkpoint.durable.store import JOB, DurableStore
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint
from windlass.parallel.mesh import Mesh


def saved(folder: Path, mesh: Mesh, steps: tuple[int, ...], seed: int = 0) -> Training:
    training = Training(seed)
    checkpointer = training.checkpointer(folder, mesh, keep=0)
    for step in steps:
        training.run(1)
        checkpointer.save(step)
    return training


def as_version_2(folder: Path) -> None:
    """What an older windlass would have written."""
    body = json.loads((folder / MANIFEST).read_bytes())["body"]
    del body["run"]
    document = {"format": "windlass-checkpoint", "version": 2, "sha256": _digest(2, body), "body": body}
    (folder / MANIFEST).write_text(json.dumps(document))


def test_all_checkpoints_of_a_run_say_the_same_of_it(tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path / "one", mesh, (1, 2))
    saved(tmp_path / "other", mesh, (1,))
    runs = [Manifest.read(tmp_path / name).run for name in ("one/step-00000001", "one/step-00000002")]
    assert runs == [(tmp_path / "one" / JOB).read_text()] * 2
    assert Manifest.read(tmp_path / "other/step-00000001").run not in ("", runs[0])


def test_a_renamed_folder_is_set_aside(tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path, mesh, (1, 2))
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000099")
    assert [result.is_sound for result in inspect.verify(tmp_path)] == [True, False]
    restored = Training(5).checkpointer(tmp_path, mesh).restore_latest()
    assert restored is not None
    assert (restored.step, [path.name for path in restored.set_aside]) == (2, ["step-00000099.damaged"])


def test_a_manifest_that_was_copied_over_another_is_damage(tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path, mesh, (1, 2, 3))
    shutil.copy(tmp_path / "step-00000001" / MANIFEST, tmp_path / "step-00000003" / MANIFEST)
    (problem,) = inspect.verify(tmp_path / "step-00000003")[0].problems
    assert "is that of step 1" in problem
    with pytest.raises(CorruptCheckpoint, match="is that of step 1"):
        Training(5).checkpointer(tmp_path, mesh).restore(tmp_path / "step-00000003")
    restored = Training(5).checkpointer(tmp_path, mesh).restore_latest()
    assert restored is not None and restored.step == 2


@pytest.mark.parametrize("is_named", [False, True])
def test_another_runs_checkpoint_among_ones_own_is_refused(is_named: bool, tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path / "own", mesh, (1,))
    saved(tmp_path / "other", mesh, (1, 2), seed=3)
    for name in ("step-00000002", "chunks"):
        shutil.copytree(tmp_path / "other" / name, tmp_path / "own" / name, dirs_exist_ok=True)
    folder = tmp_path / "own" / "step-00000002"
    assert [result.is_sound for result in inspect.verify(tmp_path / "own")] == [True, False]
    attempt = Training(5).checkpointer(tmp_path / "own", mesh)
    attempt.store.open_for_writing()
    with pytest.raises(IncompatibleCheckpoint, match=r"step-00000002: is a checkpoint of another run"):
        attempt.restore(folder) if is_named else attempt.restore_latest()
    assert attempt.store.latest_step() == 1, "the pointer does not go there"
    assert (folder / MANIFEST).exists(), "nothing is renamed: it is not damaged"


def test_a_run_may_begin_from_another_runs_checkpoint(tmp_path: Path, mesh: Mesh) -> None:
    before = saved(tmp_path / "other", mesh, (4,), seed=3)
    own = Training(5)
    checkpointer = own.checkpointer(tmp_path / "own", mesh)
    assert checkpointer.restore(tmp_path / "other" / "step-00000004") == 4
    assert own.bits() == before.bits()
    checkpointer.save(5)
    assert Manifest.read(tmp_path / "own/step-00000005").run == checkpointer.store.job_id()


def test_a_checkpoint_under_a_name_of_the_users_is_taken(tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path, mesh, (4,))
    (tmp_path / "step-00000004").rename(tmp_path / "best")
    assert Training(5).checkpointer(tmp_path, mesh).restore(tmp_path / "best") == 4


def test_checkpoints_of_version_2_go_on(tmp_path: Path, mesh: Mesh) -> None:
    training = saved(tmp_path, mesh, (1, 2))
    for step in (1, 2):
        as_version_2(step_folder(tmp_path, step))
    (tmp_path / JOB).unlink()
    assert all(result.is_sound for result in inspect.verify(tmp_path))
    attempt = Training(5)
    checkpointer = attempt.checkpointer(tmp_path, mesh, keep=0)
    restored = checkpointer.restore_latest()
    assert restored is not None and restored.step == 2
    assert attempt.bits() == training.bits()
    checkpointer.save(3)
    assert Manifest.read(step_folder(tmp_path, 3)).run == checkpointer.store.job_id()
    shutil.copy(tmp_path / "step-00000001" / MANIFEST, tmp_path / "step-00000002" / MANIFEST)
    assert [result.is_sound for result in inspect.verify(tmp_path)] == [True, False, True], "they prove their step"


@pytest.mark.parametrize("text", [None, "", "x", "0" * 17, "0123456789ABCDEF"])
def test_a_lost_identity_is_that_of_the_newest_checkpoint(text: str | None, tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path, mesh, (1, 2))
    before = (tmp_path / JOB).read_text()
    (tmp_path / JOB).unlink()
    if text is not None:
        (tmp_path / JOB).write_text(text)
    store = DurableStore(tmp_path)
    assert store.other_run(Manifest.read(step_folder(tmp_path, 2))) is None
    assert store.job_id() == before == (tmp_path / JOB).read_text()


@pytest.mark.parametrize(
    "name",
    [
        "step-000000010",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
        "step-" + "9" * 200,
        "step-1",
        "step-00000001 ",
    ],
)
def test_other_names_are_no_steps(name: str) -> None:
    assert step_of(name) is None


def test_a_pointer_to_what_is_gone_is_found_by_verify_as_by_a_load(tmp_path: Path, mesh: Mesh) -> None:
    saved(tmp_path, mesh, (1, 2))
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    assert [result.is_sound for result in inspect.verify(tmp_path)] == [True, False]
