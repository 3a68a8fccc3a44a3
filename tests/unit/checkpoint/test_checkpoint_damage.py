"""Whatever happens to the bytes of a checkpoint, it is noticed, and an older one is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import Training, flip, snapshot_of
from torch import nn

from windlass.checkpoint import inspect
from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.manifest import Manifest, committed_steps
from windlass.errors import ConfigError, CorruptCheckpoint
from windlass.parallel.mesh import Mesh

RANK_FILE = "rank-00000.safetensors"


def test_every_changed_byte_of_a_small_checkpoint_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    """`verify` and, as a checkpoint's own ranks read all of it, `restore` as well."""
    model = nn.Linear(3, 2)
    checkpointer = Checkpointer({"model": model}, tmp_path, mesh)
    folder = checkpointer.save(1)
    path = folder / RANK_FILE
    manifest = Manifest.read(folder)
    first_rng = min(tensor.fragments[0].begin for name, tensor in manifest.tensors.items() if name.startswith("rng"))
    size = path.stat().st_size
    # Header and weights byte by byte; the generators' thousands of bytes at a stride.
    positions = [*range(0, first_rng + 16), *range(first_rng + 16, size, 997), size - 1]
    for position in positions:
        flip(path, position, mask=1 << position % 8)
        assert not inspect.verify(folder)[0].is_sound, position
        with pytest.raises(CorruptCheckpoint):
            checkpointer.restore(folder)
        flip(path, position, mask=1 << position % 8)
    assert inspect.verify(folder)[0].is_sound
    assert checkpointer.restore(folder) == 1


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_noticed(size: int, tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    path = checkpointer.save(1) / RANK_FILE
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert not inspect.verify(tmp_path)[0].is_sound
    with pytest.raises(CorruptCheckpoint, match=RANK_FILE):
        checkpointer.restore_latest()


def test_an_appended_byte_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    with (checkpointer.save(1) / RANK_FILE).open("ab") as file:
        file.write(b"x")
    assert not inspect.verify(tmp_path)[0].is_sound
    with pytest.raises(CorruptCheckpoint, match="bytes where"):
        checkpointer.restore_latest()


@pytest.mark.parametrize("name", [RANK_FILE, "manifest.json"])
def test_a_missing_file_is_noticed(name: str, tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    (checkpointer.save(1) / name).unlink()
    assert not inspect.verify(tmp_path)[0].is_sound
    with pytest.raises(CorruptCheckpoint, match=name):
        checkpointer.restore_latest()


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_restore_falls_back_to_the_newest_that_is_sound(num_damaged: int, tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    checkpointer = training.checkpointer(tmp_path, mesh, keep=0)
    bits = {}
    for step in (1, 2, 3):
        training.run(1)
        checkpointer.save(step)
        bits[step] = training.bits()
    for step in range(3, 3 - num_damaged, -1):
        flip(tmp_path / f"step-0000000{step}" / RANK_FILE, -1 + (tmp_path / "step-00000003" / RANK_FILE).stat().st_size)
    other = Training(seed=8)
    restored = other.checkpointer(tmp_path, mesh).restore_latest()
    sound = 3 - num_damaged
    assert restored is not None
    assert restored.step == sound
    assert other.bits() == bits[sound]
    assert [path.name for path in restored.set_aside] == [f"step-0000000{step}.damaged" for step in range(3, sound, -1)]
    assert all((path / RANK_FILE).is_file() for path in restored.set_aside)
    assert committed_steps(tmp_path) == list(range(1, sound + 1))


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    checkpointer.save(1)
    for expected in ("step-00000002.damaged", "step-00000002.damaged2", "step-00000002.damaged3"):
        (checkpointer.save(2) / "manifest.json").write_text("{}")
        restored = checkpointer.restore_latest()
        assert restored is not None
        assert [path.name for path in restored.set_aside] == [expected]


def test_where_all_are_damaged_nothing_is_lost(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    for step in (1, 2):
        flip(checkpointer.save(step) / RANK_FILE, 3000)
    before = sorted(snapshot_of(tmp_path).values())
    with pytest.raises(CorruptCheckpoint, match=r"step-00000001.*is damaged"):
        checkpointer.restore_latest()
    assert sorted(snapshot_of(tmp_path).values()) == before


def test_a_checkpoint_that_lacks_a_block_is_corrupt(tmp_path: Path, mesh: Mesh) -> None:
    """The manifest is sound by its own checksum, but what it lists does not cover the tensor."""
    checkpointer = Checkpointer({"model": nn.Linear(3, 2)}, tmp_path, mesh)
    folder = checkpointer.save(1)
    manifest = Manifest.read(folder)
    manifest.tensors["model.weight"].fragments.clear()
    (folder / "manifest.json").unlink()
    manifest.write(folder)
    with pytest.raises(CorruptCheckpoint, match=r"model\.weight lacks 6 of its elements"):
        checkpointer.restore_latest()
    assert inspect.verify(folder)[0].problems == ["model.weight: its fragments do not cover it"]


def test_list_tells_of_sound_and_damaged_ones(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path / "checkpoints", mesh, keep=0)
    checkpointer.save(1)
    (checkpointer.save(2) / "manifest.json").write_text("{}")
    rows = inspect.list_checkpoints(tmp_path)
    assert [(row.step, row.problem is None) for row in rows] == [(1, True), (-1, False)]
    assert rows[0].num_bytes == (Path(rows[0].path) / RANK_FILE).stat().st_size
    table = inspect.render_list(rows, as_json=False).splitlines()
    assert len(table) == 3
    assert "step-00000001" in table[1]
    assert "manifest.json cannot be used" in table[2]
    assert [row["step"] for row in json.loads(inspect.render_list(rows, as_json=True))] == [1, -1]


def test_verify_names_what_is_damaged(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Checkpointer({"model": nn.Linear(3, 2)}, tmp_path, mesh, keep=0)
    checkpointer.save(1)
    folder = checkpointer.save(2)
    begin = Manifest.read(folder).tensors["model.bias"].fragments[0].begin
    flip(folder / RANK_FILE, begin)
    sound, damaged = inspect.verify(tmp_path)
    assert sound.is_sound
    assert damaged.problems == [f"{RANK_FILE}: the bytes of model.bias have changed"]
    text = inspect.render_verification([sound, damaged], as_json=False)
    assert text.startswith("sound ")
    assert "\nDAMAGED " in text
    assert "model.bias" in text
    assert [row["is_sound"] for row in json.loads(inspect.render_verification([sound, damaged], True))] == [True, False]


def test_one_checkpoint_can_be_named(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    older, _ = checkpointer.save(1), checkpointer.save(2)
    assert inspect.checkpoints_of(older) == [older]
    assert len(inspect.checkpoints_of(tmp_path)) == 2
    with pytest.raises(ConfigError):
        inspect.checkpoints_of(tmp_path / "missing")


def test_a_read_block_may_be_any_part(tmp_path: Path, mesh: Mesh) -> None:
    from windlass.checkpoint.durable import CheckpointReader
    from windlass.parallel.fragment import Fragment

    model = nn.Linear(5, 4)
    folder = Checkpointer({"model": model}, tmp_path, mesh).save(1)
    block = Fragment("model.weight", (4, 5), (1, 2), (2, 3), torch.float32)
    into = torch.empty(2, 3)
    reader = CheckpointReader(folder)
    reader.read(block, into)
    reader.close()
    assert torch.equal(into, model.weight[1:3, 2:5])
