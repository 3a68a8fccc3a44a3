"""Whatever happens to the bytes of a checkpoint, it is noticed, and an older one is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import Training, chunks_of, own_chunk
from support.files import flip, snapshot_of
from torch import nn

from windlass.checkpoint import inspect
from windlass.checkpoint.durable.locate import checkpoints_of, find_checkpoint
from windlass.checkpoint.durable.manifest import Manifest, committed_steps, step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.checkpoint.manager import Checkpointer
from windlass.errors import ConfigError, CorruptCheckpoint
from windlass.parallel.fragment import Fragment
from windlass.parallel.mesh import Mesh


@pytest.mark.slow
def test_every_changed_byte_of_a_small_checkpoint_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    """`verify` and, as a checkpoint's own ranks read all of it, `restore` as well."""
    checkpointer = Checkpointer({"model": nn.Linear(3, 2)}, tmp_path, mesh)
    folder = checkpointer.save(1)
    manifest = Manifest.read(folder)
    for path in chunks_of(folder):
        begins = [
            part.begin for tensor in manifest.tensors.values() for part in tensor.fragments if part.chunk in path.name
        ]
        size = path.stat().st_size
        # The start of the header and of each block byte by byte; padding and the generators' thousands at a stride.
        positions = {*range(0, size, 997), *range(400), *(begin + i for begin in begins for i in range(24)), size - 1}
        for position in sorted(positions):
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
    path = chunks_of(checkpointer.save(1))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert not inspect.verify(tmp_path)[0].is_sound
    with pytest.raises(CorruptCheckpoint, match=path.name):
        checkpointer.restore_latest()


def test_an_appended_byte_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    with chunks_of(checkpointer.save(1))[0].open("ab") as file:
        file.write(b"x")
    assert not inspect.verify(tmp_path)[0].is_sound
    with pytest.raises(CorruptCheckpoint, match="bytes where"):
        checkpointer.restore_latest()


def test_a_missing_chunk_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    path = chunks_of(checkpointer.save(1))[0]
    path.unlink()
    (result,) = inspect.verify(tmp_path)
    assert result.problems == [f"chunks/{path.name}: is not there"]
    with pytest.raises(CorruptCheckpoint, match=path.name):
        checkpointer.restore_latest()


def test_a_missing_manifest_is_noticed(tmp_path: Path, mesh: Mesh) -> None:
    """The pointer says that there was one: a run must not begin afresh where its checkpoint is lost."""
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    checkpointer.save(1)
    (checkpointer.save(2) / "manifest.json").unlink()
    restored = checkpointer.restore_latest()
    assert restored is not None
    assert (restored.step, restored.set_aside) == (1, [tmp_path / "step-00000002"])
    (tmp_path / "latest.json").write_text(json.dumps({"step": 1, "folder": "step-00000001", "sha256": ""}))
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json"):
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
    chunks = {step: own_chunk(step_folder(tmp_path, step)) for step in bits}
    for step in range(3, 3 - num_damaged, -1):
        flip(chunks[step], chunks[step].stat().st_size - 1)
    other = Training(seed=8)
    restored = other.checkpointer(tmp_path, mesh).restore_latest()
    sound = 3 - num_damaged
    assert restored is not None
    assert restored.step == sound
    assert other.bits() == bits[sound]
    assert [path.name for path in restored.set_aside] == [f"step-0000000{step}.damaged" for step in range(3, sound, -1)]
    assert committed_steps(tmp_path) == list(range(1, sound + 1))
    for step, path in chunks.items():
        assert path.exists() == (step <= sound), "a damaged chunk would be taken for written by the next save"
        assert path.with_name(path.name + ".damaged").exists() == (step > sound)


def test_a_save_of_the_same_bytes_does_not_use_a_damaged_chunk(tmp_path: Path, mesh: Mesh) -> None:
    """As when a run goes on from the checkpoint before, and comes to the same bits once more."""
    training = Training()
    checkpointer = training.checkpointer(tmp_path, mesh, keep=0)
    checkpointer.save(1)
    training.run(1)
    folder = checkpointer.save(2)
    bits = training.bits()
    flip(own_chunk(folder), -1 + own_chunk(folder).stat().st_size)
    restored = checkpointer.restore_latest()
    assert restored is not None and restored.step == 1
    training.run(1)
    assert training.bits() == bits
    checkpointer.save(2)
    assert [result.is_sound for result in inspect.verify(tmp_path)] == [True, True]
    other = Training(seed=7)
    other.checkpointer(tmp_path, mesh).restore_latest()
    assert other.bits() == bits


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
        checkpointer.save(step)
    for path in chunks_of(tmp_path / "step-00000001"):  # the second save shares them: nothing was trained
        flip(path, 3000)

    def bytes_of_all() -> list[bytes]:
        return sorted(data for name, data in snapshot_of(tmp_path).items() if name != "latest.json")

    before = bytes_of_all()
    with pytest.raises(CorruptCheckpoint, match=r"step-00000001.*is damaged"):
        checkpointer.restore_latest()
    assert bytes_of_all() == before


def test_a_checkpoint_that_lacks_a_block_is_corrupt(tmp_path: Path, mesh: Mesh) -> None:
    """The manifest is sound by its own checksum, but what it lists does not cover the tensor."""
    checkpointer = Checkpointer({"model": nn.Linear(3, 2)}, tmp_path, mesh)
    folder = checkpointer.save(1)
    manifest = Manifest.read(folder)
    manifest.tensors["model.weight"].fragments.clear()
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"model\.weight lacks 6 of its 6 elements"):
        checkpointer.restore_latest()
    (problem,) = inspect.verify(folder)[0].problems
    assert "model.weight lacks 6 of its 6 elements" in problem


def test_list_tells_of_sound_and_damaged_ones(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path / "checkpoints", mesh, keep=0)
    checkpointer.save(1)
    (checkpointer.save(2) / "manifest.json").write_text("{}")
    rows = inspect.list_checkpoints(tmp_path)
    assert [(row.step, row.problem is None) for row in rows] == [(1, True), (-1, False)]
    assert rows[0].num_bytes == sum(path.stat().st_size for path in chunks_of(Path(rows[0].path)))
    table = inspect.render_list(rows, as_json=False).splitlines()
    assert len(table) == 3
    assert "step-00000001" in table[1]
    assert "manifest.json cannot be used" in table[2]
    assert [row["step"] for row in json.loads(inspect.render_list(rows, as_json=True))] == [1, -1]


def test_verify_names_what_is_damaged(tmp_path: Path, mesh: Mesh) -> None:
    model = nn.Linear(3, 2)
    checkpointer = Checkpointer({"model": model}, tmp_path, mesh, keep=0)
    checkpointer.save(1)
    nn.init.zeros_(model.bias)
    path = own_chunk(checkpointer.save(2))
    flip(path, Manifest.read(tmp_path / "step-00000002").tensors["model.bias"].fragments[0].begin)
    sound, damaged = inspect.verify(tmp_path)
    assert sound.is_sound
    assert damaged.problems == [f"chunks/{path.name}: its bytes have changed"]
    text = inspect.render_verification([sound, damaged], as_json=False)
    assert text.startswith("sound ")
    assert "\nDAMAGED " in text
    assert path.name in text
    assert [row["is_sound"] for row in json.loads(inspect.render_verification([sound, damaged], True))] == [True, False]


def test_one_checkpoint_can_be_named(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    older, _ = checkpointer.save(1), checkpointer.save(2)
    assert checkpoints_of(older) == [older]
    assert len(checkpoints_of(tmp_path)) == 2
    with pytest.raises(ConfigError):
        find_checkpoint(tmp_path / "missing")


def test_a_read_block_may_be_any_part(tmp_path: Path, mesh: Mesh) -> None:
    model = nn.Linear(5, 4)
    folder = Checkpointer({"model": model}, tmp_path, mesh).save(1)
    block = Fragment("model.weight", (4, 5), (1, 2), (2, 3), torch.float32)
    into = torch.empty(2, 3)
    reader = open_checkpoint(folder)
    reader.read(block, into)
    reader.close()
    assert torch.equal(into, model.weight[1:3, 2:5])
