from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.files import flip

from windlass.checkpoint.durable.manifest import (
    MANIFEST,
    Manifest,
    StoredFragment,
    StoredTensor,
    _digest,
    committed_steps,
    step_folder,
)
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint


def example() -> Manifest:
    fragments = [
        StoredFragment("ab" * 32, "w", 64, 88, (0, 0), (2, 3)),
        StoredFragment("cd" * 32, "w", 64, 76, (2, 0), (1, 3)),
    ]
    return Manifest(
        step=7,
        generation=3,
        world_size=2,
        time=1234567890.123456,
        objects={"train": {"step": 7, "loss": 0.1 + 0.2, "none": None, "text": "naïve ✓"}},
        tensors={
            "w": StoredTensor((3, 3), "float32", fragments),
            "s": StoredTensor((), "int64", [StoredFragment("ab" * 32, "s", 88, 96, (), ())]),
        },
        chunks={"ab" * 32: 96, "cd" * 32: 76},
        run="0123456789abcdef",
    )


def write(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(example().to_bytes())


def test_a_manifest_reads_back_equal(tmp_path: Path) -> None:
    write(tmp_path)
    assert Manifest.read(tmp_path) == example()


def test_its_size_is_that_of_its_chunks() -> None:
    assert example().num_bytes == 96 + 76


def test_tensors_that_are_not_whole_are_named() -> None:
    manifest = example()
    assert list(manifest.problems()) == []
    manifest.tensors["s"].fragments.pop()
    manifest.tensors["w"].fragments.pop()
    assert list(manifest.problems()) == ["w lacks 3 of its 9 elements", "s lacks 1 of its 1 elements"]


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Also those that JSON does not care about, such as a space that becomes a newline."""
    write(tmp_path)
    path = tmp_path / MANIFEST
    for position in range(path.stat().st_size):
        for mask in (0x01, 0x20, 0x2A, 0x80):  # 0x2A makes a newline of a space
            flip(path, position, mask)
            with pytest.raises(CorruptCheckpoint):
                Manifest.read(tmp_path)
            flip(path, position, mask)
    assert Manifest.read(tmp_path) == example()


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"format": "windlass-checkpoint"}', "\x00\xff"])
def test_what_is_no_manifest_is_a_corrupt_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json cannot be used"):
        Manifest.read(tmp_path)


def test_a_missing_manifest_is_a_corrupt_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="No such file"):
        Manifest.read(tmp_path)


def test_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_text())
    document["version"] = 99
    document["sha256"] = _digest(99, document["body"])
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(IncompatibleCheckpoint, match="version 99"):
        Manifest.read(tmp_path)


def test_only_whole_step_folders_count(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-00000002", "step-123456789", "step-00000003.damaged", "step-4", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / "step-00000005").mkdir()
    assert committed_steps(tmp_path) == [2, 10, 123456789]
    assert step_folder(tmp_path, 10) == tmp_path / "step-00000010"
    assert committed_steps(tmp_path / "missing") == []
