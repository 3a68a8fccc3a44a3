"""Folders of torch.distributed.checkpoint: what torch reads of ours, what we read of torch's, what is never run."""

from __future__ import annotations

import os
import pickle
import shutil
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import MakeOptimizer, Training, bits_of
from support.files import disk_full_after
from torch import nn
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from windlass.checkpoint.durable.manifest import step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.checkpoint.manager import Checkpointer
from windlass.errors import ConfigError, CorruptCheckpoint, RunFolderError
from windlass.exchange.dcp import DcpFolder, write_folder
from windlass.exchange.dcp_metadata import METADATA, read_contents
from windlass.exchange.dcp_state import read_state, state_dict_layout
from windlass.exchange.folder import new_folder
from windlass.exchange.imported import write_checkpoint
from windlass.parallel.mesh import Mesh

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.9)),
    "adamw_fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "sgd_momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "two_groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.ndim != 2], "lr": 3e-3},
        ],
        lr=1e-2,
    ),
}


def ignore(_: int) -> None:
    pass


def export(checkpoint: Path, output: Path) -> Path:
    with closing(open_checkpoint(checkpoint)) as reader, new_folder(output) as folder:
        write_folder(folder, reader, *state_dict_layout(reader.manifest), ignore)
    return output


def restore(folder: Path, checkpoints: Path, optimizer_class: str | None = None) -> Path:
    """The checkpoint that `folder` becomes."""
    source = DcpFolder(folder)
    state = read_state(source, optimizer_class)
    tensors = {
        name: (source.contents.tensors[flat].shape, source.contents.tensors[flat].dtype)
        for name, flat in state.tensors.items()
    }
    objects = {**state.objects, **({"info": {"partial": True}} if state.is_partial else {})}
    write_checkpoint(
        checkpoints,
        state.step,
        state.world_size,
        objects,
        tensors,
        lambda n: source.read_tensor(state.tensors[n]),
        ignore,
    )
    return step_folder(checkpoints, state.step)


def saved(tmp_path: Path, mesh: Mesh, training: Training, step: int = 4) -> Path:
    training.run(step)
    training.checkpointer(tmp_path / "checkpoints", mesh).save(step)
    return step_folder(tmp_path / "checkpoints", step)


def state_dicts(training: Training) -> dict[str, Any]:
    """As one who uses torch alone has them."""
    return {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer),
    }


def save_with_torch(training: Training, folder: Path, **more: Any) -> Path:
    dcp.save({**state_dicts(training), **more}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_torch_loads_an_export_and_trains_on_bit_for_bit(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    training = Training(make_optimizer=OPTIMIZERS[kind])
    folder = export(saved(tmp_path, mesh, training), tmp_path / "out")

    other = Training(seed=9, make_optimizer=OPTIMIZERS[kind])
    other.run(1)
    state = state_dicts(other)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(other.model, state["model"])
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    other.counter.value = 4
    assert other.bits() == training.bits()
    for one in (training, other):
        torch.manual_seed(3)
        one.run(3)
    assert other.bits() == training.bits()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_export_comes_back_as_the_checkpoint_that_it_was(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    training = Training(make_optimizer=OPTIMIZERS[kind])
    folder = export(saved(tmp_path, mesh, training), tmp_path / "out")
    imported = restore(folder, tmp_path / "imported")
    training.run(5)

    other = Training(seed=9, make_optimizer=OPTIMIZERS[kind])
    assert other.checkpointer(tmp_path / "other", mesh).restore(imported) == 4
    other.run(5)  # with the generators that were saved, so with the same dropout
    assert other.bits() == training.bits()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_folder_of_torch_gives_weights_and_optimizer_state(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    training = Training(make_optimizer=OPTIMIZERS[kind])
    training.run(4)
    save_with_torch(training, tmp_path / "dcp")
    imported = restore(tmp_path / "dcp", tmp_path / "imported", type(training.optimizer).__name__)

    other = Training(seed=9, make_optimizer=OPTIMIZERS[kind])
    other.counter.value = 4
    other.checkpointer(tmp_path / "other", mesh).restore(imported)
    assert other.bits() == training.bits()


def test_without_the_optimizers_class_its_state_is_left_out(tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    training.run(2)
    save_with_torch(training, tmp_path / "dcp", epoch=3)
    assert read_state(DcpFolder(tmp_path / "dcp"), None).left_out == ["optimizer", "epoch"]

    other = Training(seed=9)
    other.checkpointer(tmp_path / "other", mesh).restore(restore(tmp_path / "dcp", tmp_path / "imported"))
    ours, theirs = other.model.state_dict(), training.model.state_dict()
    assert {name: bits_of(value) for name, value in ours.items()} == {n: bits_of(v) for n, v in theirs.items()}
    assert not other.optimizer.state
    assert other.counter.value == 0


class TwoParts(Training):
    """Two modules and one optimizer of both."""

    def checkpointer(self, directory: Path, mesh: Mesh, **settings: Any) -> Checkpointer:
        objects = {"first": self.model[:2], "second": self.model[2:], "opt": self.optimizer, "counter": self.counter}
        return Checkpointer(objects, directory, mesh, **settings)


def test_several_modules_come_back(tmp_path: Path, mesh: Mesh) -> None:
    training = TwoParts()
    folder = export(saved(tmp_path, mesh, training), tmp_path / "out")
    assert ("opt", "state", "first.0.weight", "exp_avg") in read_contents(folder).paths
    other = TwoParts(seed=9)
    other.checkpointer(tmp_path / "other", mesh).restore(restore(folder, tmp_path / "imported"))
    assert other.bits() == training.bits()


def test_a_part_of_the_tensors_is_in_memory_at_a_time(tmp_path: Path, mesh: Mesh) -> None:
    checkpoint = saved(tmp_path, mesh, Training())
    alive: list[weakref.ref[torch.Tensor]] = []
    with closing(open_checkpoint(checkpoint)) as reader:
        read_whole = reader.read_whole

        def watched(name: str) -> torch.Tensor:
            assert sum(tensor() is not None for tensor in alive) <= 1
            tensor = read_whole(name)
            alive.append(weakref.ref(tensor))
            return tensor

        reader.read_whole = watched  # type: ignore[method-assign]
        with new_folder(tmp_path / "out") as folder:
            write_folder(folder, reader, *state_dict_layout(reader.manifest), ignore)
    assert len(alive) == len(reader.manifest.tensors)


def test_a_full_disk_leaves_nothing(tmp_path: Path, mesh: Mesh) -> None:
    checkpoint = saved(tmp_path, mesh, Training(width=400))
    with pytest.raises(RunFolderError, match="cannot be written"), disk_full_after(1 << 12):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("properties", [TensorProperties(), OldTensorProperties()], ids=["now", "of_older_torch"])
def test_a_tensor_in_parts_is_put_together(properties: Any, tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    places, chunks = {}, []
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for row in range(0, 4, 2):
            begin = file.tell()
            torch.save(whole[row : row + 2].clone(), file)
            offset, size = torch.Size((row, 0)), torch.Size((2, 3))
            chunks.append(ChunkStorageMetadata(offset, size))
            places[MetadataIndex("w", offset)] = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
    entry = TensorStorageMetadata(properties, whole.shape, chunks)
    (tmp_path / METADATA).write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))
    assert torch.equal(DcpFolder(tmp_path).read_tensor("w"), whole)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("place", ["whole", "planner_data", "state_dict_metadata", "storage_meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_that_metadata_names_is_run(place: str, protocol: int, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "ran")
    metadata = Metadata({"w": BytesStorageMetadata()}, None, {})
    if place != "whole":
        setattr(metadata, place, {"w": bomb})
    data = pickle.dumps(bomb if place == "whole" else metadata, protocol=protocol)
    (tmp_path / METADATA).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"names \S+, which no table of contents needs"):
        DcpFolder(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)
    assert (tmp_path / "ran").exists()  # so the bomb is one


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\n_get_layout.__globals__\n.",
        b"\x80\x04\x8c\x05torch\x94\x8c\x0fSize.__reduce__\x94\x93.",
        b"ctorch.distributed.checkpoint.filesystem\nFileSystemReader\n(S'x'\ntR.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
    ],
)
def test_other_ways_to_name_what_could_be_run_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="is refused"):
        DcpFolder(tmp_path)


def test_a_record_cannot_change_what_it_was_made_from(tmp_path: Path) -> None:
    """BUILD on a class, which would set attributes of the class itself."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (tmp_path / METADATA).write_bytes(name + b"}S'field'\nI1\nsb.")
    with pytest.raises(CorruptCheckpoint):
        DcpFolder(tmp_path)
    (tmp_path / METADATA).write_bytes(name + b"(N}S'field'\nI1\nstb.")
    with pytest.raises(CorruptCheckpoint):
        DcpFolder(tmp_path)
    shutil.rmtree(tmp_path)
    folder = save_with_torch(Training(), tmp_path)
    assert DcpFolder(folder).contents.tensors


def test_an_entry_that_only_unpickling_would_give_is_refused(tmp_path: Path) -> None:
    folder = save_with_torch(Training(), tmp_path / "dcp", bomb=Bomb(tmp_path / "ran"))
    with pytest.raises(CorruptCheckpoint, match="bomb cannot be read"):
        DcpFolder(folder).read_value("bomb")
    assert not (tmp_path / "ran").exists()


def rewritten(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def place_of(metadata: Metadata, name: str) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def lead_elsewhere(metadata: Metadata) -> None:
    place_of(metadata, "model.0.weight").relative_path = "../elsewhere/__0_0.distcp"


def transform(metadata: Metadata) -> None:
    place_of(metadata, "model.0.weight").transform_descriptors = ["stream.zstd"]


def forget_place(metadata: Metadata) -> None:
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != "model.0.weight"}


def move_part(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["model.0.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks[0].offsets = torch.Size((1, 0))


def forget_part(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["model.0.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks = []


def forget_all(metadata: Metadata) -> None:
    metadata.storage_data = None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lead_elsewhere, "is no file of the folder"),
        (transform, "transformed"),
        (forget_place, "does not say where model.0.weight is"),
        (move_part, "lies outside of"),
        (forget_part, "lacks 24 of its 24 elements"),
        (forget_all, "is not a table of contents"),
    ],
)
def test_a_table_of_contents_that_is_wrong_is_refused(
    change: Callable[[Metadata], None], says: str, tmp_path: Path
) -> None:
    folder = save_with_torch(Training(), tmp_path / "dcp")
    rewritten(folder, change)
    with pytest.raises(CorruptCheckpoint, match=says):
        DcpFolder(folder)


def test_a_part_that_is_not_what_the_table_says_is_refused(tmp_path: Path) -> None:
    folder = save_with_torch(Training(), tmp_path / "dcp")
    rewritten(folder, lambda metadata: setattr(place_of(metadata, "model.0.bias"), "offset", 0))
    with pytest.raises(CorruptCheckpoint, match=r"model\.0\.bias"):
        DcpFolder(folder).read_tensor("model.0.bias")


@pytest.mark.parametrize("how", ["missing", "short", "damaged"])
def test_a_damaged_file_is_refused(how: str, tmp_path: Path) -> None:
    folder = save_with_torch(Training(), tmp_path / "dcp")
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:100] if how == "short" else bytes(len(data)))
    names = [name for name in DcpFolder(folder).contents.tensors if name.startswith("model.")]
    with pytest.raises(CorruptCheckpoint, match=r"cannot be read from __0_0\.distcp"):
        for name in names:
            DcpFolder(folder).read_tensor(name)


def test_what_is_no_folder_of_dcp_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"it has no \.metadata"):
            DcpFolder(path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    dcp.save({"net": nn.Linear(2, 2).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ConfigError, match="has no tensors under 'model', but 'net'"):
        read_state(DcpFolder(tmp_path), None)


def test_optimizer_state_by_number_is_refused(tmp_path: Path) -> None:
    """As `optimizer.state_dict()` has it, which does not say whose it is."""
    training = Training()
    training.run(1)
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ConfigError, match="not named as the model's parameters are"):
        read_state(DcpFolder(tmp_path), "AdamW")


def test_a_dtype_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.zeros(2, dtype=torch.complex64)}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ConfigError, match=r"has model\.w as complex64"):
        read_state(DcpFolder(tmp_path), None)
