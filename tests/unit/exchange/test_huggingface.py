"""The format of Hugging Face's weight folders, in both directions. Whole models: test_convert.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import bits_of
from support.files import disk_full_after, snapshot_of

from windlass.errors import ConfigError, CorruptCheckpoint, RunFolderError
from windlass.exchange.folder import new_folder
from windlass.exchange.huggingface import Weight, cut_into_shards, write_weights
from windlass.models.huggingface_folder import CONFIG, DTYPE_CODES, INDEX, SINGLE, HuggingFaceFolder


def weights_of(tensors: dict[str, torch.Tensor]) -> list[Weight]:
    return [Weight(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]


def example(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 7), "b": (3,), "empty": (0, 4), "scalar": (), "c": (8, 2)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def ignore(_: int) -> None:
    pass


def written(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 1000) -> Path:
    with new_folder(folder) as writing:
        write_weights(writing, weights_of(tensors), {CONFIG: b'{"model_type": "x"}'}, max_shard_bytes, ignore)
    return folder


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_the_safetensors_library_reads_the_shards_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = example(dtype)
    folder = written(tmp_path / "out", tensors, max_shard_bytes=40)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    loaded = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert {name: bits_of(value) for name, value in loaded.items()} == {n: bits_of(v) for n, v in tensors.items()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = example()
    folder = HuggingFaceFolder(written(tmp_path / "out", tensors, max_shard_bytes=100))
    assert folder.config == {"model_type": "x"}
    assert folder.tensors == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert {name: bits_of(folder.read(name)) for name in tensors} == {n: bits_of(v) for n, v in tensors.items()}


def test_a_weight_is_cast_to_its_dtype_in_the_export(tmp_path: Path) -> None:
    tensor = torch.randn(4, 4)
    write_weights(tmp_path, [Weight("a", (4, 4), torch.bfloat16, lambda: tensor)], {CONFIG: b"{}"}, 1000, ignore)
    assert torch.equal(HuggingFaceFolder(tmp_path).read("a"), tensor.bfloat16())


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1000, [["a", "b", "c"]]), (24, [["a", "b"], ["c"]]), (12, [["a"], ["b"], ["c"]]), (1, [["a"], ["b"], ["c"]])],
)
def test_shards_hold_at_most_their_bytes(limit: int, expected: list[list[str]]) -> None:
    weights = weights_of({"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(3)})
    assert [[weight.name for weight in shard] for shard in cut_into_shards(weights, limit)] == expected


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def read() -> torch.Tensor:
        assert not [tensor for tensor in alive if tensor() is not None]
        tensor = torch.ones(100)
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path, [Weight(str(n), (100,), torch.float32, read) for n in range(5)], {}, 10_000, ignore)
    assert len(alive) == 5


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[int] = []
    write_weights(tmp_path, weights_of({"a": torch.zeros(3), "b": torch.zeros(5)}), {}, 12, told.append)
    assert told == [12, 32]


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from windlass.exchange.folder import new_folder\n"
        "from windlass.exchange.huggingface import Weight, write_weights\n"
        "weights = [Weight(str(n), (9,), torch.float32, lambda: torch.ones(9)) for n in range(4)]\n"
        "def report(done):\n"
        "    if done == 108: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with new_folder(Path(sys.argv[1])) as folder: write_weights(folder, weights, {}, 36, report)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.") and left.name.endswith(".writing")
    with pytest.raises(ConfigError, match=CONFIG):
        HuggingFaceFolder(left)
    assert HuggingFaceFolder(written(tmp_path / "out", example())).tensors


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"), disk_full_after(1 << 10):
        written(tmp_path / "out", {"a": torch.zeros(1 << 10)}, 1 << 20)
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot_of(tmp_path)
    for name, rule in (("full", "holds files"), ("file", "is not a folder")):
        with pytest.raises(RunFolderError, match=rule):
            written(tmp_path / name, example())
    assert snapshot_of(tmp_path) == before


def test_an_empty_output_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert HuggingFaceFolder(written(tmp_path / "out", example())).tensors


def test_one_file_without_an_index_is_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    save_file({"a": torch.arange(3.0)}, tmp_path / SINGLE)
    assert torch.equal(HuggingFaceFolder(tmp_path).read("a"), torch.arange(3.0))


def without_file(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()


def truncated_file(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def with_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_file, "names model-00001-of-00002.safetensors, which is missing"),
        (truncated_file, "model-00001-of-00002.safetensors cannot be used"),
        (with_index(lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors")), "it has not"),
        (with_index(lambda index: index["weight_map"].update(a="../secret.safetensors")), "does not map names"),
        (with_index(lambda index: index["weight_map"].update(a=7)), "does not map names"),
        (with_index(lambda index: index.pop("weight_map")), "does not map names"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} cannot be used"),
        (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG} is not a JSON object"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "secret.safetensors")
    folder = written(tmp_path / "out", {"a": torch.zeros(3), "b": torch.zeros(3)}, max_shard_bytes=12)
    damage(folder)
    with pytest.raises(CorruptCheckpoint, match=says):
        HuggingFaceFolder(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickles, which are not read"):
        HuggingFaceFolder(tmp_path)


def test_a_dtype_that_is_no_weight_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    save_file({"a": torch.zeros(3, dtype=torch.int64)}, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="has a as I64"):
        HuggingFaceFolder(tmp_path)


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FILES: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x05\x00",
    "header beyond the end": (1 << 20).to_bytes(8, "little") + b"{}",
    "header of exabytes": (1 << 62).to_bytes(8, "little") + b"{}",
    "no JSON": header()[:8] + b"[]",
    "deep": (20_000).to_bytes(8, "little") + b"[" * 20_000,
    "digits": (5002).to_bytes(8, "little") + b"[" + b"1" * 5000 + b"]",
    "beyond the end": header(a=entry([3], 0, 12)),
    "before the start": header(a=entry([3], -12, 0)) + bytes(12),
    "backwards": header(a=entry([3], 12, 0)) + bytes(12),
    "overlap": header(a=entry([3], 0, 12), b=entry([3], 0, 12)) + bytes(12),
    "gap": header(a=entry([3], 4, 16)) + bytes(16),
    "more": header(a=entry([3], 0, 12)) + bytes(16),
    "other length": header(a=entry([4], 0, 12)) + bytes(12),
    "giant": header(a=entry([1 << 62], 0, 12)) + bytes(12),
    "negative": header(a=entry([-3], 0, 12)) + bytes(12),
    "overflow": header(a=entry([1 << 32, 1 << 32], 0, 0)),
    "dims": header(a=entry([1] * 100, 0, 4)) + bytes(4),
    "float": header(a=entry([3.0], 0, 12)) + bytes(12),
    "text": header(a=entry(["3"], 0, 12)) + bytes(12),
    "three offsets": header(a={**entry([3], 0, 12), "data_offsets": [0, 12, 12]}) + bytes(12),
    "unknown key": header(a={**entry([3], 0, 12), "x": 1}) + bytes(12),
    "number for a dtype": header(a=entry([3], 0, 12, 7)) + bytes(12),
    "escape in a name": header(**{"a\x1b[2J": entry([3], 0, 12)}) + bytes(12),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_header_that_a_stranger_wrote_is_one_message(kind: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / SINGLE).write_bytes(FILES[kind])
    with pytest.raises(CorruptCheckpoint) as caught:
        HuggingFaceFolder(tmp_path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("file", [CONFIG, INDEX, SINGLE])
@pytest.mark.parametrize("kind", ["pipe", "giant", "deep"])
def test_other_files_are_not_waited_for(kind: str, file: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    save_file({"a": torch.zeros(3)}, tmp_path / SINGLE)
    path = tmp_path / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "deep":
        path.write_text("[" * 100_000)
    else:
        path.touch()
        os.truncate(path, 1 << 42)
    if (kind, file) == ("pipe", INDEX):
        assert list(HuggingFaceFolder(tmp_path).tensors) == ["a"], "it is no file, so there is no index"
        return
    with pytest.raises((ConfigError, CorruptCheckpoint)):
        HuggingFaceFolder(tmp_path)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_file_says_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / CONFIG).write_text("{}")
    text = bytearray(header(a=entry([3], 0, 12), b=entry([2, 1], 12, 20)) + bytes(20))
    for _ in range(data.draw(st.integers(1, 3))):
        position, num_removed = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 2))
        text[position : position + num_removed] = data.draw(st.binary(max_size=3))
    (folder / SINGLE).write_bytes(text)
    with contextlib.suppress(ConfigError, CorruptCheckpoint):
        found = HuggingFaceFolder(folder)
        for name in found.tensors:
            assert found.read(name).shape == found.tensors[name][0]
