"""Reading blocks of tensors, from chunks and from other sources."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.files import flip

from windlass.checkpoint import image, inspect
from windlass.checkpoint.durable import chunk_file, reader
from windlass.checkpoint.durable.chunk_file import chunk_name
from windlass.checkpoint.durable.locate import checkpoints_of, find_checkpoint
from windlass.checkpoint.durable.manifest import Manifest, StoredFragment
from windlass.checkpoint.durable.reader import CheckpointReader, ChunkSource, open_checkpoint
from windlass.checkpoint.durable.stage import stage_chunks
from windlass.checkpoint.durable.storage import Location, join
from windlass.checkpoint.durable.store import DurableStore
from windlass.errors import ConfigError, CorruptCheckpoint, RunFolderError
from windlass.parallel.fragment import Fragment


@pytest.fixture(params=["folder", "store"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "checkpoints" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/checkpoints"


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """State that takes several chunks, one of them with a cut block."""
    monkeypatch.setattr(image, "CHUNK_BYTES", 300)
    monkeypatch.setattr(image, "MAX_CHUNK_BYTES", 1000)
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(40, 10, generator=generator),
        "half": torch.randn(7, 3, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
    }


def whole(name: str, tensor: torch.Tensor) -> Fragment:
    return Fragment(name, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), tensor.dtype)


def save(location: Location, step: int, tensors: dict[str, torch.Tensor]) -> Location:
    store = DurableStore(location)
    staged = stage_chunks((whole(name, tensor), tensor) for name, tensor in tensors.items())
    store.commit(step, 0, 1, {}, [store.put_chunk(chunk, data) for chunk, data in staged])
    return join(location, f"step-{step:08d}")


def test_whole_tensors_are_read_to_the_bit(location: Location, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(save(location, 1, tensors))
    assert len(checkpoint.manifest.chunks) > 3
    for name, tensor in tensors.items():
        found = checkpoint.read_whole(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    checkpoint.close()


def test_any_block_is_read_into_any_tensor(location: Location, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(save(location, 1, tensors))
    block = Fragment("matrix", (40, 10), (20, 3), (15, 4), torch.float32)
    into = torch.zeros(4, 15).t()
    checkpoint.read(block, into)
    assert torch.equal(into, tensors["matrix"][20:35, 3:7])
    as_double = torch.zeros(15, 4, dtype=torch.float64)
    checkpoint.read(block, as_double)
    assert torch.equal(as_double.float(), into)


def test_each_chunk_is_opened_and_checked_once(
    location: Location, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    del tensors["none"]  # of which nothing is read
    opened: list[str] = []

    def counted(storage: object, sha256: str, *more: object) -> memoryview:
        opened.append(sha256)
        return chunk_file.open_chunk(storage, sha256, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "open_chunk", counted)
    checkpoint = open_checkpoint(save(location, 1, tensors))
    for name in tensors:
        checkpoint.read_whole(name)
    assert sorted(opened) == sorted(checkpoint.manifest.chunks)
    assert isinstance(checkpoint.source, ChunkSource) and not checkpoint.source._open, "what was read through is closed"

    monkeypatch.setattr(reader, "OPEN_BYTES", 1)
    opened.clear()
    small = open_checkpoint(save(location, 2, tensors))
    for _ in range(2):
        assert torch.equal(small.read_whole("matrix"), tensors["matrix"])
    assert len(opened) == 2 * len(small.manifest.tensors["matrix"].fragments), "one at a time is kept"


def test_what_was_read_outlives_the_reader(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1, tensors))
    (stored, *_) = checkpoint.manifest.tensors["matrix"].fragments
    data = checkpoint.source.read(stored)
    checkpoint.close()
    assert torch.equal(torch.frombuffer(data, dtype=torch.float32), tensors["matrix"].flatten()[: len(data) // 4])


def test_damage_names_the_chunk(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = save(tmp_path, 1, tensors)
    (stored, *_) = Manifest.read(folder).tensors["half"].fragments
    flip(tmp_path / chunk_name(stored.chunk), stored.begin)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(
        CorruptCheckpoint, match=rf"step-00000001: is damaged: chunks/{stored.chunk}.*bytes have changed"
    ):
        checkpoint.read_whole("half")
    (tmp_path / chunk_name(stored.chunk)).unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{stored.chunk}\.safetensors cannot be used: No such file"):
        checkpoint.read_whole("half")


class Remembered:
    """The bytes of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor], error: Exception | None = None) -> None:
        self.tensors, self.error, self.is_closed = tensors, error, False

    def read(self, stored: StoredFragment) -> memoryview:
        if self.error is not None:
            raise self.error
        rows = slice(stored.offset[0], stored.offset[0] + stored.shape[0]) if stored.shape else ...
        return memoryview(self.tensors[stored.key][rows].contiguous().reshape(-1).view(torch.uint8).numpy())

    def describe(self) -> Location:
        return "the memory of node 3"

    def close(self) -> None:
        self.is_closed = True


def test_bytes_may_come_from_another_source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    manifest = Manifest.read(save(tmp_path, 1, tensors))
    source = Remembered(tensors)
    checkpoint = CheckpointReader(manifest, source)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read_whole(name), tensor), name
    checkpoint.close()
    assert source.is_closed


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ValueError("its CRC has changed"), CorruptCheckpoint, "memory of node 3: is damaged: .*its CRC has changed"),
        (PermissionError(13, "Permission denied"), RunFolderError, "cannot be read: Permission denied"),
    ],
)
def test_errors_of_a_source_name_it(
    error: Exception, raised: type[Exception], message: str, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    checkpoint = CheckpointReader(Manifest.read(save(tmp_path, 1, tensors)), Remembered(tensors, error))
    with pytest.raises(raised, match=message):
        checkpoint.read_whole("matrix")


def test_a_source_that_gives_too_little_is_damaged(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    short = {**tensors, "half": tensors["half"][:, :2]}
    checkpoint = CheckpointReader(Manifest.read(save(tmp_path, 1, tensors)), Remembered(short))
    with pytest.raises(CorruptCheckpoint, match="half has 28 bytes"):
        checkpoint.read_whole("half")


def test_paths_and_urls_name_checkpoints(location: Location, tensors: dict[str, torch.Tensor]) -> None:
    older, newest = save(location, 1, tensors), save(location, 10, tensors)
    run = str(location).removesuffix("/checkpoints")
    assert find_checkpoint(run) == find_checkpoint(location) == newest
    assert find_checkpoint(str(older)) == older
    assert checkpoints_of(location) == checkpoints_of(run) == [older, newest]
    assert checkpoints_of(older) == [older]
    assert [row.path for row in inspect.list_checkpoints(str(location))] == [str(older), str(newest)]
    assert all(result.is_sound for result in inspect.verify(str(location)))
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        find_checkpoint(f"{location}/missing")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("kind", ["relative", "link"])
def test_a_checkpoint_finds_its_chunks_from_anywhere(
    kind: str, in_folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    folder = save(in_folder / "deeper", 1, tensors)
    (in_folder / "link").symlink_to(folder)
    checkpoint = open_checkpoint(Path("link" if kind == "link" else "deeper/step-00000001"))
    assert torch.equal(checkpoint.read_whole("matrix"), tensors["matrix"])


def test_looking_at_checkpoints_needs_no_torch() -> None:
    """Snapshot agents write them, and a command line should answer at once."""
    code = (
        "import sys\n"
        "import windlass.checkpoint.durable.store, windlass.checkpoint.durable.locate, windlass.checkpoint.inspect\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
