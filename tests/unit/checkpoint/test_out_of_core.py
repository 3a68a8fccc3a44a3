"""Checkpoints of optimizer state and weights that are not in memory, on one rank."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.agents import shared_memory
from support.files import flip
from support.offloaded import OPTIMIZERS, WIDTH, Offloaded, assert_same, is_pinned, net
from support.stored import are_sound

from windlass.checkpoint.durable.chunk_file import FILLER, chunk_name
from windlass.checkpoint.durable.manifest import Manifest, step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.checkpoint.durable.store import DurableStore
from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.pieces import put_groups
from windlass.errors import ConfigError, OffloadError, RunFolderError
from windlass.offload import offload_optimizer
from windlass.offload.arena import Arena
from windlass.offload.conveyor import Conveyor
from windlass.offload.direct_io import DirectFile, Engine
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFolder
from windlass.offload.weights import Weights
from windlass.parallel.mesh import Mesh


def tier_of(tmp_path: Path, is_offloaded: bool) -> Path | None:
    return tmp_path / "tier" if is_offloaded else None


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("saved", "restored"), [(True, True), (True, False), (False, True)])
def test_a_run_goes_on_bit_for_bit_whether_its_state_was_or_is_on_a_disk(
    kind: str, saved: bool, restored: bool, tmp_path: Path, mesh: Mesh
) -> None:
    calm = Offloaded(None, kind)
    calm.run(7)
    run = Offloaded(tier_of(tmp_path, saved), kind)
    run.run(3)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh)
    checkpointer.save(3)
    run.run(1)
    checkpointer.close()
    run.close()

    other = Offloaded(tier_of(tmp_path, restored), kind, seed=9)
    other.run(2)
    found = other.checkpointer(tmp_path / "checkpoints", mesh).restore_latest()
    assert found is not None and (found.step, found.set_aside) == (3, [])
    other.run(4)
    assert_same(other.bits(), calm.bits())
    other.close()


def test_a_checkpoint_says_the_same_with_and_without_offloading(tmp_path: Path, mesh: Mesh) -> None:
    contents = []
    for name, tier in (("memory", None), ("disk", tmp_path / "tier")):
        run = Offloaded(tier, "third_party")
        run.run(2)
        checkpointer = run.checkpointer(tmp_path / name, mesh)
        checkpointer.save(2)
        checkpointer.close()
        reader = open_checkpoint(step_folder(tmp_path / name, 2))
        tensors = {key: reader.read_whole(key) for key in reader.manifest.tensors if not key.startswith("rng.")}
        shapes = {key: (entry.shape, entry.dtype) for key, entry in reader.manifest.tensors.items()}
        contents.append((tensors, shapes, reader.manifest.objects))
        run.close()
    (tensors, *rest), (tensors_on_disk, *rest_on_disk) = contents
    assert rest == rest_on_disk
    assert_same(tensors, tensors_on_disk)


@pytest.mark.parametrize("kind", ["durable", "lazy"])
def test_state_that_is_restored_before_the_first_step_and_none_at_all(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, kind=kind)
    checkpointer.save(0)
    other = Offloaded(tmp_path / "tier", seed=4)
    other.run(2)
    assert other.checkpointer(tmp_path / "checkpoints", mesh).restore_latest() is not None
    assert_same(other.bits(), Offloaded(None).bits())
    checkpointer.close()


def chunk_files(checkpoints: Path, step: int) -> list[Path]:
    return [checkpoints / chunk_name(sha256) for sha256 in Manifest.read(step_folder(checkpoints, step)).chunks]


def test_the_tiers_files_become_chunks_without_a_copy(tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    run.run(2)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, keep=0)
    checkpointer.save(2)
    in_tier = {path.stat().st_ino for path in (tmp_path / "tier").rglob("*.tier")}
    linked = [path for path in chunk_files(tmp_path / "checkpoints", 2) if path.stat().st_ino in in_tier]
    assert len(linked) == len(in_tier) == 3
    for path in linked:
        assert path.stat().st_mode == (tmp_path / "checkpoints" / "latest.json").stat().st_mode
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(FILLER)]  # noqa: SIM118
            assert names and all(file.get_tensor(name).numel() == WIDTH * WIDTH for name in names)
    before = {path: path.read_bytes() for path in linked}
    for step in (3, 4):
        run.run(1)
        checkpointer.save(step)
    assert {path: path.read_bytes() for path in linked} == before, "steps write to other files"
    assert are_sound(tmp_path / "checkpoints")
    checkpointer.close()
    run.close()
    assert list((tmp_path / "tier").iterdir()) == [], "and the tier leaves nothing but its chunks"
    assert are_sound(tmp_path / "checkpoints")


def test_disk_space_is_given_back_with_the_checkpoint(tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, keep=1)
    sizes = []
    for step in range(1, 6):
        run.run(1)
        checkpointer.save(step)
        files = {path.stat().st_ino: path.stat().st_blocks for path in tmp_path.rglob("*") if path.is_file()}
        sizes.append(sum(files.values()))
    assert max(sizes[1:]) <= sizes[1] * 1.05
    checkpointer.close()
    run.close()


def test_no_file_is_read_twice_to_be_copied_or_written_twice_to_be_restored(tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    run.run(1)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh)
    checkpointer.save(1)
    assert isinstance(run.optimizer, OffloadedOptimizer) and run.optimizer.folder is not None
    state_bytes = sum(run.optimizer.state_bytes().values())
    assert state_bytes == 3 * 2 * 4 * WIDTH * WIDTH
    figures = run.optimizer.folder.engine.figures
    before = figures.read_bytes
    put_groups(checkpointer.store, [group for group in checkpointer.objects.groups() if group.load is not None])
    assert figures.read_bytes - before <= state_bytes + 3 * 4096  # or less: some may have been read ahead

    other = Offloaded(tmp_path / "tier", seed=5)
    assert isinstance(other.optimizer, OffloadedOptimizer) and other.optimizer.folder is not None
    other.checkpointer(tmp_path / "checkpoints", mesh).restore_latest()
    other.optimizer.state_at_rest()
    other.optimizer.state_dict()
    figures = other.optimizer.folder.engine.figures
    assert state_bytes <= figures.write_bytes <= state_bytes + 3 * 4096


@pytest.mark.parametrize("place", ["/dev/shm", "memory://"])
def test_where_files_cannot_be_linked_they_are_copied(place: str, tmp_path: Path, mesh: Mesh) -> None:
    name = uuid.uuid4().hex
    run = Offloaded(tmp_path / "tier")
    calm = Offloaded(None)
    calm.run(4)
    torch.manual_seed(0)
    with shared_memory() as shm:
        checkpoints = shm / name if place == "/dev/shm" else f"memory://{name}"
        run = Offloaded(tmp_path / "tier")
        checkpointer = run.checkpointer(checkpoints, mesh)
        for step in (1, 2, 3):
            run.run(1)
            checkpointer.snapshot(step)
        checkpointer.close()
        assert are_sound(checkpoints)
        other = Offloaded(tmp_path / "tier", seed=5)
        assert other.checkpointer(checkpoints, mesh).restore_latest() is not None
        other.run(1)
        assert_same(other.bits(), calm.bits())


@pytest.mark.slow
def test_names_that_do_not_fit_before_the_data_have_them_copied(tmp_path: Path, mesh: Mesh) -> None:
    def build() -> tuple[torch.nn.ParameterDict, torch.optim.Optimizer]:
        names = [f"{number}_{'long' * 30}" for number in range(400)]
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.full((8200,), 0.5)) for name in names})
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(model: torch.nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
        for number, parameter in enumerate(model.values()):
            parameter.grad = torch.full_like(parameter, float(number))
        optimizer.step()

    plain, plain_optimizer = build()
    model, inner = build()
    optimizer = offload_optimizer(inner, dir=tmp_path / "tier")
    step(plain, plain_optimizer)
    step(model, optimizer)
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, tmp_path / "checkpoints", mesh)
    checkpointer.save(1)
    checkpointer.close()
    assert not any(is_pinned(path) for path in chunk_files(tmp_path / "checkpoints", 1))
    other, other_inner = build()
    other_optimizer = offload_optimizer(other_inner, dir=tmp_path / "tier")
    Checkpointer({"model": other, "optimizer": other_optimizer}, tmp_path / "checkpoints", mesh).restore_latest()
    step(plain, plain_optimizer)
    step(other, other_optimizer)
    assert_same(dict(other.items()), dict(plain.items()))


def test_erasure_is_refused_where_state_is_on_a_disk(tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    with pytest.raises(ConfigError, match="set checkpoint=durable or lazy"):
        run.checkpointer(tmp_path / "checkpoints", mesh, kind="erasure")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["durable", "lazy", "erasure"])
def test_state_in_host_memory_is_saved_from_where_it_is(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    calm = Offloaded(None)
    calm.run(5)
    with shared_memory() as shm:
        run = Offloaded(None, in_host_memory=True)
        checkpointer = run.checkpointer(tmp_path, mesh, kind=kind, shm_dir=shm, persist_every=1)
        run.run(2)
        checkpointer.snapshot(2)
        checkpointer.wait_staged()
        run.run(1)
        checkpointer.save(3)
        checkpointer.close()
        other = Offloaded(None, in_host_memory=True, seed=8)
        other.checkpointer(tmp_path, mesh).restore_latest()
        other.run(2)
        assert_same(other.bits(), calm.bits())


@pytest.mark.parametrize("kind", ["durable", "lazy"])
@pytest.mark.parametrize("optimizer", ["adamw_fused", "third_party"])
def test_a_checkpoint_waits_for_updates_that_are_put_off_and_not_the_other_way_round(
    kind: str, optimizer: str, tmp_path: Path, mesh: Mesh
) -> None:
    calm = Offloaded(None, optimizer)
    calm.run(4)
    generator = torch.get_rng_state()
    calm.run(3)
    run = Offloaded(tmp_path / "tier", optimizer)
    assert isinstance(run.optimizer, OffloadedOptimizer)
    run.optimizer.is_deferring = True
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, kind=kind, keep=0)
    for step in range(1, 7):
        checkpointer.wait_staged()
        run.run(1)
        assert run.optimizer.has_pending
        if step in (2, 4, 6):
            assert checkpointer.snapshot(step)
            assert run.optimizer.has_pending, "the updates are still made when the next forward wants them"
            assert checkpointer.store.steps() == [done for done in (2, 4) if done < step]
        else:
            assert checkpointer.pinned_saver is not None
            while checkpointer.pinned_saver.is_busy:
                time.sleep(0.01)  # a lazy one would else be skipped
    checkpointer.save(6)
    assert checkpointer.store.steps() == [2, 4, 6] and are_sound(tmp_path / "checkpoints")
    run.run(1)  # its updates must not be made on what is restored
    assert run.optimizer.has_pending
    checkpointer.restore(step_folder(tmp_path / "checkpoints", 4))
    assert torch.equal(torch.get_rng_state(), generator), "and what is not the optimizer's is that of the snapshot"
    run.run(3)
    assert_same(run.bits(), calm.bits())
    checkpointer.close()
    run.close()


def test_a_step_that_nobody_announced_waits_as_well(tmp_path: Path, mesh: Mesh) -> None:
    """`wait_staged` is for loops that want to know how long it took."""
    run = Offloaded(tmp_path / "tier")
    assert isinstance(run.optimizer, OffloadedOptimizer)
    run.optimizer.is_deferring = True
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, kind="lazy")
    run.run(2)
    checkpointer.snapshot(2)
    expected = Offloaded(None)
    expected.run(2)
    run.run(3)
    checkpointer.close()
    other = Offloaded(None, seed=3)
    other.checkpointer(tmp_path / "checkpoints", mesh).restore_latest()
    assert_same(other.bits(), expected.bits())
    assert run.optimizer.before_step == []
    run.close()


class Live:
    """A `Stateful` that gives out what it changes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen[:] = state_dict["seen"]


@pytest.mark.parametrize("is_deferring", [False, True])
def test_what_goes_on_changing_is_saved_as_it_was_at_the_snapshot(
    is_deferring: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, live = Offloaded(tmp_path / "tier"), Live()
    assert isinstance(run.optimizer, OffloadedOptimizer)
    run.optimizer.is_deferring = is_deferring
    commit = DurableStore.commit
    monkeypatch.setattr(DurableStore, "commit", lambda *args: (time.sleep(0.2), commit(*args))[1])
    objects = {"model": run.model, "optimizer": run.optimizer, "live": live}
    checkpointer = Checkpointer(objects, tmp_path / "checkpoints", mesh)
    run.run(1)
    live.seen.append(1)
    checkpointer.snapshot(1)
    live.seen.append(2)
    means = run.model[-1].running_mean.clone()
    run.run(1)
    checkpointer.close()
    reader = open_checkpoint(step_folder(tmp_path / "checkpoints", 1))
    assert reader.manifest.objects["live"] == {"seen": [1]}
    assert torch.equal(reader.read_whole("model.4.running_mean"), means)
    run.close()


def test_a_damaged_tier_fails_the_checkpoint_and_not_the_one_before(tmp_path: Path, mesh: Mesh) -> None:
    """Its checksums are compared with what is read for a name: damage does not get the name of a sound chunk."""
    run = Offloaded(tmp_path / "tier")
    run.run(1)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh)
    checkpointer.save(1)
    run.run(1)
    run.optimizer.state_dict()  # all is written
    flip(next((tmp_path / "tier").rglob("*.tier")), (64 << 10) + 4097)
    checkpointer.snapshot(2)
    with pytest.raises(OffloadError, match="are not those that were written"):
        checkpointer.save(3)
    assert checkpointer.store.steps() == [1] and are_sound(tmp_path / "checkpoints")
    assert [event["kind"] for event in checkpointer.poll()] == ["persisted", "persist_failed"]
    checkpointer.close()


def test_a_lazy_checkpoint_that_fails_is_told_and_training_goes_on(tmp_path: Path, mesh: Mesh) -> None:
    run = Offloaded(tmp_path / "tier")
    run.run(1)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, kind="lazy")
    checkpointer.snapshot(1)
    while not checkpointer.poll():
        time.sleep(0.01)
    (tmp_path / "checkpoints" / "chunks").rename(tmp_path / "aside")
    (tmp_path / "checkpoints" / "chunks").write_text("in the way")
    assert checkpointer.snapshot(2)
    checkpointer.wait_staged()
    run.run(1)
    checkpointer.close()
    (event,) = checkpointer.poll()
    assert (event["kind"], event["step"]) == ("persist_failed", 2)
    (tmp_path / "checkpoints" / "chunks").unlink()
    (tmp_path / "aside").rename(tmp_path / "checkpoints" / "chunks")
    assert checkpointer.store.steps() == [1]
    checkpointer.save(2)
    assert checkpointer.store.steps() == [1, 2] and are_sound(tmp_path / "checkpoints")
    run.close()


def test_who_hears_of_a_lazy_checkpoint_may_take_the_next(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Offloaded(tmp_path / "tier")
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh, kind="lazy")
    retain = checkpointer.store.retain

    def retain_slowly(keep: int) -> None:
        time.sleep(0.1)
        retain(keep)

    monkeypatch.setattr(checkpointer.store, "retain", retain_slowly)
    for step in (1, 2, 3):
        run.run(1)
        assert checkpointer.snapshot(step)
        checkpointer.wait_staged()
        while not (events := checkpointer.poll()):
            time.sleep(0.001)
        assert [(event["kind"], event["step"]) for event in events] == [("persisted", step)]
    checkpointer.close()
    run.close()


def test_room_for_the_next_step_is_asked_for_before_files_are_pinned(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Offloaded(tmp_path / "tier")
    run.run(1)
    checkpointer = run.checkpointer(tmp_path / "checkpoints", mesh)
    really = os.statvfs

    class Full:
        f_frsize, f_bavail = 4096, 3

    monkeypatch.setattr(os, "statvfs", lambda path: Full if "tier" in str(path) else really(path))
    with pytest.raises(RunFolderError, match=r"the next step needs .* 12,288 are free"):
        checkpointer.save(1)
    monkeypatch.setattr(os, "statvfs", really)
    inodes = {path.stat().st_ino for path in (tmp_path / "tier").rglob("*.tier")}
    run.run(1)
    assert {path.stat().st_ino for path in (tmp_path / "tier").rglob("*.tier")} == inodes, "nothing is pinned"
    checkpointer.close()
    run.close()


def streamed(tier: Path, in_halves: bool, seed: int = 0) -> tuple[torch.nn.Module, OffloadedOptimizer]:
    """A model whose weights are on a disk, too."""
    model = net(seed)
    folder = TierFolder(tier, Engine(), "rank0")
    weights = Weights(Conveyor(Arena(1 << 20), Staging(torch.device("cpu"))), folder.create, in_halves)
    optimizer = OffloadedOptimizer(torch.optim.AdamW(model.parameters()), folder, max_host_bytes=0, weights=weights)
    for layer in model:
        weights.add(list(layer.parameters()))
    return model, optimizer


def step_streamed(model: torch.nn.Module, optimizer: OffloadedOptimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full(parameter.shape, 0.1 * (number + 1))
    optimizer.step()


@pytest.mark.parametrize("in_halves", [False, True])
def test_weights_that_are_elsewhere_are_saved_and_restored(in_halves: bool, tmp_path: Path, mesh: Mesh) -> None:
    model, optimizer = streamed(tmp_path / "tier", in_halves)
    plain = net()
    plain_optimizer = torch.optim.AdamW(plain.parameters())
    for _ in range(3):
        step_streamed(model, optimizer)
        step_streamed(plain, plain_optimizer)  # type: ignore[arg-type]
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, tmp_path / "checkpoints", mesh)
    checkpointer.save(3)
    checkpointer.close()

    other = net(7)
    other_optimizer = torch.optim.AdamW(other.parameters())
    Checkpointer({"model": other, "optimizer": other_optimizer}, tmp_path / "checkpoints", mesh).restore_latest()
    assert_same(dict(other.state_dict()), dict(plain.state_dict()))

    again, again_optimizer = streamed(tmp_path / "tier", in_halves, seed=3)
    Checkpointer({"model": again, "optimizer": again_optimizer}, tmp_path / "checkpoints", mesh).restore_latest()
    assert again_optimizer.has_weights_elsewhere(again[0].weight)
    step_streamed(again, again_optimizer)
    step_streamed(plain, plain_optimizer)  # type: ignore[arg-type]
    with again_optimizer.weights_loaded(list(again.parameters())):
        assert_same(dict(again.state_dict()), dict(plain.state_dict()))


MEMORY_SCRIPT = """
import sys, threading, time
from pathlib import Path
import psutil, torch
from windlass.checkpoint import Checkpointer
from windlass.offload import offload_optimizer

root = Path(sys.argv[1])
model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1 << 21)) for _ in range(25)])
optimizer = offload_optimizer(torch.optim.AdamW(model.parameters()), dir=root / "tier", buffer_bytes=160 << 20)
if sys.argv[2] == "save":
    for parameter in model:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
optimizer.reserve()
torch.empty(160 << 20, dtype=torch.uint8).fill_(1)  # what it frees is there for the rest
checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, root / "checkpoints")
process, peak, done = psutil.Process(), [0], threading.Event()
before = process.memory_info().rss
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], process.memory_info().rss)
thread = threading.Thread(target=watch)
thread.start()
checkpointer.save(1) if sys.argv[2] == "save" else checkpointer.restore_latest()
checkpointer.close()
done.set()
thread.join()
assert sys.argv[2] == "save" or float(optimizer.state_dict()["state"][24]["exp_avg"][-1]) > 0
print(peak[0] - before)
"""


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("is_on_another_disk", [pytest.param(False, marks=pytest.mark.full), True])
def test_memory_is_that_of_chunks_and_not_of_the_state(is_on_another_disk: bool, tmp_path: Path) -> None:
    """400 MiB of state."""
    with shared_memory() as shm:
        root = tmp_path
        if is_on_another_disk:
            (shm / "checkpoints").mkdir()
            (root / "checkpoints").symlink_to(shm / "checkpoints")
        allowed = {"save": 110 << 20, "restore": (160 + 110) << 20}  # the second begins before the buffers are used
        for what in ["save"] if is_on_another_disk else allowed:
            command = [sys.executable, "-c", MEMORY_SCRIPT, str(root), what]
            # What is freed goes back to the system at once: else what malloc keeps of it is measured.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert output.returncode == 0, output.stderr
            assert int(output.stdout.split()[-1]) < allowed[what]


class Counting(torch.optim.Optimizer):
    """Every element of weights and state is the number of steps: a torn tensor has two of them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                for key in ("first", "second"):
                    state.setdefault(key, torch.zeros_like(parameter)).add_(1)
                parameter.add_(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_deferring"),
    [
        ("durable", True),
        ("lazy", False),
        pytest.param("durable", False, marks=pytest.mark.full),
        pytest.param("lazy", True, marks=pytest.mark.full),
    ],
)
def test_no_tensor_is_torn_however_slow_disk_and_hash(
    kind: str, is_deferring: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 checkpoints each, training goes on at once."""
    randomness = random.Random(kind)
    delay_s = [0.0, 0.0, 0.0, 0.0005, 0.002, 0.01]

    def slow(function: Any) -> Any:
        def slowed(*args: Any) -> Any:
            time.sleep(randomness.choice(delay_s))
            return function(*args)

        return slowed

    monkeypatch.setattr(DirectFile, "write_from", slow(DirectFile.write_from))
    monkeypatch.setattr(DirectFile, "read_into", slow(DirectFile.read_into))
    monkeypatch.setattr(DurableStore, "put_chunk", slow(DurableStore.put_chunk))
    monkeypatch.setattr(DurableStore, "commit", slow(DurableStore.commit))
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(10_000 + number)) for number in range(4)])
    folder = TierFolder(tmp_path / "tier", Engine(), "optimizer")
    order = [[parameter] for parameter in model]
    optimizer = OffloadedOptimizer(
        Counting(model.parameters()), folder, order=order, buffer_bytes=1 << 20, max_host_bytes=0
    )
    optimizer.is_deferring = is_deferring
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, tmp_path / "c", mesh, kind=kind, keep=0)
    taken, step = [], 0
    while len(taken) < 50:
        for _ in range(randomness.randrange(1, 3)):
            step += 1
            for parameter in model:
                optimizer.update([parameter])
                parameter.grad = torch.ones_like(parameter)
            checkpointer.wait_staged()
            optimizer.step()
        if checkpointer.snapshot(step):
            taken.append(step)
    checkpointer.close()
    assert checkpointer.store.steps() == taken
    for step in taken:
        reader = open_checkpoint(step_folder(tmp_path / "c", step))
        for name in reader.manifest.tensors:
            if not name.startswith("rng."):
                assert (reader.read_whole(name) == step).all(), (step, name)
    optimizer.close()


def test_the_public_call_is_enough(tmp_path: Path) -> None:
    """As the documentation has it: no mesh, no folder made by hand, one call after the other."""
    model = net()
    optimizer = offload_optimizer(torch.optim.AdamW(model.parameters()), dir=tmp_path / "tier")
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, tmp_path / "checkpoints")
    model(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    assert checkpointer.snapshot(1)
    checkpointer.close()
    assert checkpointer.store.steps() == [1]
    optimizer.close()
