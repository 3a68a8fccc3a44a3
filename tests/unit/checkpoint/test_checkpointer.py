"""`Checkpointer` over plain torch modules, on one rank."""

from __future__ import annotations

import pickle
import random
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import Counter, MakeOptimizer, Training
from support.files import disk_full_after, snapshot_of
from torch import nn

from windlass.checkpoint.durable.local_storage import LocalStorage
from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.manifest import committed_steps, step_folder
from windlass.checkpoint.manager import Checkpointer
from windlass.errors import ConfigError, IncompatibleCheckpoint, RunFolderError
from windlass.optim.config import Schedule
from windlass.optim.scheduler import WarmupScheduler
from windlass.parallel.mesh import Mesh

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.9)),
    "adamw_fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "adam_amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
    "sgd_momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "two_groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.ndim != 2], "lr": 3e-3},
        ],
        lr=1e-2,
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    training = Training(make_optimizer=OPTIMIZERS[kind])
    training.run(4)
    training.checkpointer(tmp_path, mesh).save(4)
    training.run(5)

    other = Training(seed=99, make_optimizer=OPTIMIZERS[kind])
    other.run(2)
    restored = other.checkpointer(tmp_path, mesh).restore_latest()
    assert restored is not None
    assert (restored.step, restored.origin, restored.set_aside) == (4, step_folder(tmp_path, 4), [])
    other.run(5)
    assert other.bits() == training.bits()


def test_a_run_saved_before_its_first_step_restores(tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    training.checkpointer(tmp_path, mesh).save(0)
    other = Training(seed=5)
    other.run(3)
    other.checkpointer(tmp_path, mesh).restore_latest()
    assert other.bits() == Training().bits()


class Odd(torch.optim.Optimizer):
    """Keeps state of other dtypes and shapes than its parameters', and numbers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.parameters(), {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["wide"] = torch.full(parameter.shape, 1 / 3, dtype=torch.float64)
                state["seed"] = torch.tensor([2**40 + 1, 3])
                state["flags"] = torch.ones(parameter.shape, dtype=torch.uint8)
                state["count"] = state.get("count", 0) + 1


def test_optimizer_state_keeps_its_dtypes(tmp_path: Path, mesh: Mesh) -> None:
    """torch's own `load_state_dict` would cast all of it to the parameter's dtype."""
    training = Training(make_optimizer=Odd)
    training.run(2)
    training.checkpointer(tmp_path, mesh).save(2)
    other = Training(make_optimizer=Odd)
    other.checkpointer(tmp_path, mesh).restore_latest()
    assert other.bits() == training.bits()


def test_generators_of_torch_python_and_numpy_are_restored(tmp_path: Path, mesh: Mesh) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), float(np.random.random())  # noqa: NPY002

    checkpointer = Training().checkpointer(tmp_path, mesh)
    checkpointer.save(1)
    expected = draw()
    draw()
    checkpointer.restore_latest()
    assert draw() == expected


def test_nothing_is_restored_from_an_empty_or_missing_folder(tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    before = training.bits()
    checkpointer = training.checkpointer(tmp_path / "missing", mesh)
    assert checkpointer.restore_latest() is None
    assert not checkpointer.has_any()
    assert training.bits() == before


def test_hyperparameters_are_restored_with_their_types(tmp_path: Path, mesh: Mesh) -> None:
    Training(make_optimizer=OPTIMIZERS["adamw"]).checkpointer(tmp_path, mesh).save(1)
    other = Training(make_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=7.0, betas=(0.1, 0.2)))
    other.checkpointer(tmp_path, mesh).restore_latest()
    assert other.optimizer.param_groups[0]["lr"] == 1e-2
    assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.9)  # a tuple, though JSON has none


def test_hyperparameters_stay_where_the_caller_wants_that(tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    training.run(2)
    training.checkpointer(tmp_path, mesh).save(2)
    other = Training(make_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=7.0, fused=True))
    other.checkpointer(tmp_path, mesh, restore_hyperparameters=False).restore_latest()
    assert other.optimizer.param_groups[0]["lr"] == 7.0
    parameter = next(other.model.parameters())
    assert torch.equal(
        other.optimizer.state[parameter]["exp_avg"],
        training.optimizer.state[next(training.model.parameters())]["exp_avg"],
    )


def test_the_rate_of_a_restored_run_is_that_of_its_next_step(tmp_path: Path, mesh: Mesh) -> None:
    """As a run resumes: hyperparameters come from the configuration, the step from the checkpoint."""

    def start() -> tuple[Training, WarmupScheduler, Checkpointer]:
        training = Training()
        scheduler = WarmupScheduler(training.optimizer, schedule=Schedule.cosine, num_steps=20, warmup_steps=4)
        objects = {"model": training.model, "optimizer": training.optimizer, "scheduler": scheduler}
        return training, scheduler, Checkpointer(objects, tmp_path, mesh, restore_hyperparameters=False)

    training, scheduler, checkpointer = start()
    for _ in range(9):
        training.run(1)
        scheduler.step()
    checkpointer.save(9)
    other, other_scheduler, other_checkpointer = start()
    other_checkpointer.restore_latest()
    for _ in range(5):
        assert other.optimizer.param_groups[0]["lr"] == training.optimizer.param_groups[0]["lr"]
        for run, schedule in ((training, scheduler), (other, other_scheduler)):
            run.run(1)
            schedule.step()


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        (lambda: Training(width=7), r"model\.0\.weight is \[6, 4\] there and \[7, 4\] here"),
        (lambda: Training(make_optimizer=OPTIMIZERS["sgd"]), "optimizer is AdamW there and SGD here"),
        (lambda: Training(make_optimizer=OPTIMIZERS["two_groups"]), "has other param groups there than here"),
        (
            lambda: Training(make_optimizer=lambda m: torch.optim.AdamW(m[0].parameters())),
            "has 6 parameters there and 2 here",
        ),
    ],
    ids=["shape", "optimizer class", "param groups", "parameters of the optimizer"],
)
def test_another_model_or_optimizer_is_refused_and_left_as_it_was(
    make: Any, difference: str, tmp_path: Path, mesh: Mesh
) -> None:
    Training().checkpointer(tmp_path, mesh).save(1)
    other = make()
    other.run(1)
    before = other.bits()
    with pytest.raises(IncompatibleCheckpoint, match=difference):
        other.checkpointer(tmp_path, mesh).restore_latest()
    assert other.bits() == before
    assert committed_steps(tmp_path) == [1], "an incompatible checkpoint is not a damaged one"


@pytest.mark.parametrize(
    ("saved", "wanted", "difference"),
    [
        (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "it has no model.1.weight"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), "it has model.1.weight too"),
        (nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), "model.weight is float32 there and torch.bfloat16 here"),
    ],
    ids=["missing", "extra", "dtype"],
)
def test_other_names_and_dtypes_are_refused(
    saved: nn.Module, wanted: nn.Module, difference: str, tmp_path: Path, mesh: Mesh
) -> None:
    Checkpointer({"model": saved}, tmp_path, mesh).save(1)
    before = {name: value.clone() for name, value in wanted.state_dict().items()}
    with pytest.raises(IncompatibleCheckpoint, match=difference):
        Checkpointer({"model": wanted}, tmp_path, mesh).restore_latest()
    assert all(torch.equal(before[name], value) for name, value in wanted.state_dict().items())


def test_state_that_the_checkpoint_lacks_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    Checkpointer({"model": nn.Linear(2, 2)}, tmp_path, mesh).save(1)
    with pytest.raises(IncompatibleCheckpoint, match="it has no state of counter"):
        Checkpointer({"model": nn.Linear(2, 2), "counter": Counter()}, tmp_path, mesh).restore_latest()


def test_an_optimizer_of_other_parameters_is_a_programming_error(tmp_path: Path, mesh: Mesh) -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 3).parameters())
    with pytest.raises(ValueError, match="2 parameters of no module that is checkpointed"):
        Checkpointer({"model": nn.Linear(3, 3), "optimizer": optimizer}, tmp_path, mesh)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_retention_keeps_the_newest(keep: int, left: list[int], tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=keep)
    for step in range(1, 6):
        checkpointer.save(step)
    assert committed_steps(tmp_path) == left
    assert {path.name for path in tmp_path.iterdir()} == {f"step-0000000{n}" for n in left} | {
        "chunks",
        "latest.json",
        "generation",
        "job",
    }


def test_a_step_that_is_saved_is_not_written_again(tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    checkpointer = training.checkpointer(tmp_path, mesh)
    folder = checkpointer.save(1)
    before = snapshot_of(tmp_path)
    training.run(1)
    assert checkpointer.save(1) == folder
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize(("step", "due"), [(0, True), (1, False), (9, False), (10, True), (11, False), (20, True)])
def test_due_is_every_so_many_steps(step: int, due: bool, tmp_path: Path, mesh: Mesh) -> None:
    assert Training().checkpointer(tmp_path, mesh, persist_every=10).due(step) == due


def test_leftovers_of_killed_writers_go_with_the_next_save_and_nothing_else(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh)
    checkpointer.save(1)
    orphan = f"chunks/{'ab' * 32}.safetensors"
    leftovers = [orphan, "chunks/x.safetensors.77-ab.tmp", "latest.json.77-ab.tmp", "step-00000002/manifest.json.1.tmp"]
    others = ["mine/file", "step-00000003.damaged/file", orphan + ".damaged"]
    for name in (*leftovers, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    checkpointer.store.open_for_writing()
    assert [name for name in leftovers if (tmp_path / name).exists()] == [orphan]
    checkpointer.save(3)
    assert not any((tmp_path / name).exists() for name in leftovers)
    assert not (tmp_path / "step-00000002").exists()
    assert all((tmp_path / name).read_text() == "x" for name in others)
    assert checkpointer.restore_latest() is not None


@pytest.mark.parametrize("room", [0, 100, 3000], ids=["no byte", "in the header", "in the data or the manifest"])
def test_a_full_disk_leaves_earlier_checkpoints_and_no_leftovers(room: int, tmp_path: Path, mesh: Mesh) -> None:
    training = Training()
    training.run(1)
    checkpointer = training.checkpointer(tmp_path, mesh, keep=1)
    checkpointer.save(1)
    before = snapshot_of(tmp_path)
    with pytest.raises(RunFolderError, match="make room") as raised, disk_full_after(room):
        checkpointer.save(2)
    assert str(tmp_path) in str(raised.value)
    assert snapshot_of(tmp_path) == before
    assert committed_steps(tmp_path) == [1]
    checkpointer.save(2)  # room again
    assert committed_steps(tmp_path) == [2]


def test_a_manifest_that_does_not_fit_commits_nothing(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalStorage.write

    def full(storage: LocalStorage, name: str, *others: Any, **more: Any) -> None:
        if name.endswith("manifest.json"):
            raise OSError(28, "No space left on device")
        write(storage, name, *others, **more)

    monkeypatch.setattr(LocalStorage, "write", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        Training().checkpointer(tmp_path, mesh).save(1)
    assert {path.name for path in tmp_path.iterdir()} <= {"generation", "job"}


def test_state_that_cannot_be_written_leaves_no_leftovers(tmp_path: Path, mesh: Mesh) -> None:
    counter = Counter()
    counter.value = object()  # type: ignore[assignment]  # JSON cannot hold it
    with pytest.raises(Exception, match="not JSON serializable"):
        Checkpointer({"counter": counter}, tmp_path, mesh).save(1)
    assert {path.name for path in tmp_path.iterdir()} <= {"generation", "job"}


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "file").write_text("")
    checkpointer = Training().checkpointer(tmp_path / "file" / "checkpoints", mesh)
    with pytest.raises(RunFolderError, match=r"checkpoint\.dir"):
        checkpointer.store.open_for_writing()
    with pytest.raises(RunFolderError, match=r"checkpoint\.dir"):
        checkpointer.save(1)


def test_no_pickle_on_the_way_in(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.run(2)
    training.checkpointer(tmp_path, mesh).save(2)
    other = Training(seed=3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled something")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    other.checkpointer(tmp_path, mesh).restore_latest()
    monkeypatch.undo()
    assert other.bits() == training.bits()


def test_newer_checkpoints_are_set_aside(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    for step in (1, 2, 3):
        checkpointer.save(step)
    assert [path.name for path in checkpointer.set_newer_aside(1)] == [
        "step-00000002.superseded",
        "step-00000003.superseded",
    ]
    assert committed_steps(tmp_path) == [1]
    checkpointer.save(2)
    assert [path.name for path in checkpointer.set_newer_aside(1)] == ["step-00000002.superseded2"]
    assert (tmp_path / "step-00000002.superseded" / "manifest.json").is_file()


def test_a_path_names_a_checkpoint_a_folder_of_them_or_a_run(tmp_path: Path, mesh: Mesh) -> None:
    checkpointer = Training().checkpointer(tmp_path / "checkpoints", mesh, keep=0)
    older, newest = checkpointer.save(1), checkpointer.save(10)
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(tmp_path / "checkpoints") == newest
    assert find_checkpoint(older) == older


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_path_without_checkpoints_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor a folder that holds some"):
        find_checkpoint(tmp_path / path)


@pytest.mark.slow
def test_a_checkpoint_of_a_mostly_frozen_model_writes_little(tmp_path: Path, mesh: Mesh) -> None:
    """One of 29 layers is trained; with its two moments that is 3 of 31 parts of the state."""
    model = nn.Sequential(*(nn.Linear(1100, 1100) for _ in range(29)))
    model.requires_grad_(False)
    model[11].requires_grad_(True)
    optimizer = torch.optim.AdamW(model[11].parameters())
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, tmp_path, mesh, keep=0)
    sizes = []
    seen: set[Path] = set()
    for step in (1, 2):
        model(torch.randn(2, 1100)).square().sum().backward()
        optimizer.step()
        checkpointer.save(step)
        new = set(tmp_path.glob("chunks/*")) - seen
        sizes.append(sum(path.stat().st_size for path in new))
        seen |= new
    assert sizes[0] > 31 * 1100 * 1100 * 4
    assert 3 / 31 * sizes[0] * 0.9 <= sizes[1] <= 0.12 * sizes[0]


def test_an_object_store_serves_as_a_folder_does(mesh: Mesh) -> None:
    location = f"memory://{uuid.uuid4().hex}/run/checkpoints"
    training = Training()
    checkpointer = training.checkpointer(location, mesh, keep=0)
    bits = {}
    for step in (1, 2, 3):
        training.run(1)
        assert checkpointer.save(step) == f"{location}/step-0000000{step}"
        bits[step] = training.bits()
    storage = checkpointer.store.storage
    storage.write("step-00000003/manifest.json", [b"{}"])

    other = Training(seed=8)
    restored = other.checkpointer(location, mesh).restore_latest()
    assert restored is not None
    assert (restored.step, restored.set_aside) == (2, [f"{location}/step-00000003.damaged"])
    assert other.bits() == bits[2]
    older = find_checkpoint(f"{location}/step-00000001")
    assert checkpointer.owns(older)
    assert checkpointer.restore(older) == 1
    assert training.bits() == bits[1]
    assert checkpointer.set_newer_aside(1) == [f"{location}/step-00000002.superseded"]
