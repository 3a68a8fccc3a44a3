"""The lazy copy: no tensor is torn, however slow the copy and however soon the tensors change."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.agents import shared_memory, wait_until
from support.checkpoints import Training
from torch import nn

from windlass.checkpoint.agent.slots import SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.image import FragmentSpec, image_bytes, lay_out
from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.snapshot import lazy_copy
from windlass.checkpoint.snapshot.lazy_copy import Copy, CopyItem, copy_items
from windlass.checkpoint.snapshot.reader import CheckedBlocks, read_parts
from windlass.checksum import crc32c
from windlass.optim.in_backward import StepInBackward
from windlass.parallel.mesh import Mesh

SHAPES = [(700, 500), (3,), (1, 5), (0, 4), (300, 1000), (700_000,), (17, 19, 23)]


class Outcome:
    """What a copy says when it ends."""

    def __init__(self) -> None:
        self.checksums: np.ndarray | None = None
        self.error: Exception | None = None
        self.is_told = threading.Event()

    def __call__(self, checksums: np.ndarray, error: Exception | None) -> None:
        self.checksums, self.error = checksums, error
        self.is_told.set()


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}


def begin_copy(tensors: dict[str, torch.Tensor], head: bytes = b"") -> tuple[Copy, memoryview, dict[str, int], Outcome]:
    """A copy that is under way, its region, and where in that each tensor begins."""
    blocks = [
        FragmentSpec(name, "float32", tuple(t.shape), (0,) * t.ndim, tuple(t.shape)) for name, t in tensors.items()
    ]
    chunks = lay_out(blocks)
    region = memoryview(bytearray(-(-(len(head) + image_bytes(chunks)) // BLOCK_BYTES) * BLOCK_BYTES))
    begins = {entry.spec.name: len(head) + entry.begin for chunk in reversed(chunks) for entry in chunk.entries}
    owners = {id(tensors[entry.spec.name]): len(head) + entry.end for chunk in chunks for entry in chunk.entries}
    outcome = Outcome()
    return Copy(region, head, copy_items(chunks, len(head), tensors), owners, outcome), region, begins, outcome


def copied(region: memoryview, begin: int, like: torch.Tensor) -> torch.Tensor:
    data = bytearray(region[begin : begin + like.nbytes])
    return torch.frombuffer(data, dtype=like.dtype).reshape(like.shape) if data else torch.empty_like(like)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Has every move of memory in the copy take up to so many seconds longer."""

    def slow_down(seconds: float, seed: int) -> None:
        randomness, move = random.Random(seed), ctypes.memmove

        def memmove(target: int, source: int, count: int) -> int:
            half = count // 2
            move(target, source, half)
            time.sleep(randomness.uniform(0, seconds))  # in the middle of a tensor
            return move(target + half, source + half, count - half)

        monkeypatch.setattr(lazy_copy.ctypes, "memmove", memmove)

    return slow_down


def test_everything_is_copied_with_its_checksums() -> None:
    tensors = make_tensors()
    copy, region, begins, outcome = begin_copy(tensors, head=b"h" * 5000)
    copy.wait()
    assert copy.is_done and outcome.is_told.wait(30) and outcome.error is None
    assert bytes(region[:5000]) == b"h" * 5000
    assert all(torch.equal(copied(region, begins[name], tensor), tensor) for name, tensor in tensors.items())
    assert outcome.checksums is not None
    blocks = [region[at : at + BLOCK_BYTES] for at in range(0, len(region), BLOCK_BYTES)]
    assert outcome.checksums.tolist() == [crc32c(block) for block in blocks]


def test_the_checksums_cover_a_head_that_is_all_there_is() -> None:
    outcome = Outcome()
    region = memoryview(bytearray(2 * BLOCK_BYTES))
    Copy(region, b"x" * (BLOCK_BYTES + 1), [], {}, outcome).wait()
    assert outcome.is_told.wait(30)
    assert outcome.checksums is not None
    assert outcome.checksums.tolist() == [crc32c(region[:BLOCK_BYTES]), crc32c(region[BLOCK_BYTES:])]


def test_views_and_tensors_with_gaps_are_copied_as_they_look() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    copy, region, begins, _ = begin_copy({"turned": whole.T, "column": whole[:, 2:3], "rows": whole[1:3]})
    copy.wait()
    assert torch.equal(copied(region, begins["turned"], whole.T), whole.T)
    assert torch.equal(copied(region, begins["column"], whole[:, 2:3]), whole[:, 2:3])
    assert torch.equal(copied(region, begins["rows"], whole[1:3]), whole[1:3])


def change_after_waiting(copy: Copy, tensors: dict[str, torch.Tensor], randomness: random.Random) -> None:
    """As an optimizer in the backward pass does: in some order, a few at a time, each right after its fence."""
    left = list(tensors.values())
    randomness.shuffle(left)
    while left:
        count = randomness.randint(1, 3)
        bucket, left = left[:count], left[count:]
        copy.wait(bucket)
        for tensor in bucket:
            tensor.fill_(float("nan"))


@pytest.mark.full
@pytest.mark.slow
def test_no_tensor_is_torn_in_two_hundred_snapshots(slow: Callable[[float, int], None]) -> None:
    slow(0.0005, 1)
    randomness = random.Random(2)
    for number in range(200):
        tensors = make_tensors(number)
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        copy, region, begins, outcome = begin_copy(tensors, head=b"h" * randomness.randrange(0, 4096, 64))
        changing = threading.Thread(target=change_after_waiting, args=(copy, tensors, randomness))
        changing.start()
        changing.join()
        copy.wait()
        assert outcome.is_told.wait(30) and outcome.error is None
        for name, tensor in expected.items():
            assert torch.equal(copied(region, begins[name], tensor), tensor), f"{name} of snapshot {number} is torn"
        assert all(tensor.isnan().all() for tensor in tensors.values())


def test_without_fences_tensors_are_torn(slow: Callable[[float, int], None]) -> None:
    """So the test above can fail."""
    slow(0.02, 1)
    tensors = make_tensors()
    expected = tensors["w5"].clone()
    copy, region, begins, _ = begin_copy(tensors)
    tensors["w5"].zero_()
    copy.wait()
    assert not torch.equal(copied(region, begins["w5"], expected), expected)


def test_a_fence_waits_for_its_tensors_and_not_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tensor cannot be copied yet; the fences of the others pass all the same."""
    may_go_on, move = threading.Event(), ctypes.memmove
    tensors = make_tensors()
    last = tensors["w6"].data_ptr()

    def memmove(target: int, source: int, count: int) -> int:
        if source == last:
            assert may_go_on.wait(30)
        return move(target, source, count)

    monkeypatch.setattr(lazy_copy.ctypes, "memmove", memmove)
    copy, _, _, outcome = begin_copy(tensors)
    copy.wait([tensor for name, tensor in tensors.items() if name != "w6"])
    assert not copy.is_done
    passed = threading.Event()
    waiting = threading.Thread(target=lambda: (copy.wait([tensors["w6"]]), passed.set()))
    waiting.start()
    assert not passed.wait(0.1)
    may_go_on.set()
    assert passed.wait(30)
    copy.wait()
    assert outcome.is_told.wait(30) and outcome.error is None


def test_a_tensor_that_is_not_copied_has_no_fence() -> None:
    tensors = make_tensors()
    copy, _, _, _ = begin_copy(tensors)
    copy.wait([torch.zeros(3)])
    copy.wait([])
    copy.wait()
    copy.wait(tensors.values())


def test_an_error_in_the_copy_is_told_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def memmove(target: int, source: int, count: int) -> int:
        raise MemoryError("the region is gone")

    monkeypatch.setattr(lazy_copy.ctypes, "memmove", memmove)
    tensors = make_tensors()
    copy, _, _, outcome = begin_copy(tensors)
    copy.wait(tensors.values())
    copy.wait()
    assert copy.is_done and outcome.is_told.wait(30)
    assert isinstance(outcome.error, MemoryError)


def test_parts_of_a_large_block_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.checkpoint.image.MAX_CHUNK_BYTES", 1000)
    tensors = {"w": torch.arange(3000.0).reshape(100, 30)}
    blocks = [FragmentSpec("w", "float32", (100, 30), (0, 0), (100, 30))]
    chunks = lay_out(blocks)
    pieces = copy_items(chunks, 64, tensors)
    assert len(pieces) > 10
    assert all(isinstance(piece, CopyItem) and piece.begin % 4 == 0 for piece in pieces)
    assert torch.equal(torch.cat([piece.source for piece in pieces]), tensors["w"].flatten())


# --- With a Checkpointer. ---


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


def opened(training: Training, tmp_path: Path, shm: Path, mesh: Mesh) -> Checkpointer:
    more = {"kind": "erasure", "shm_dir": shm, "snapshot_every": 1, "persist_every": 1000}
    return training.checkpointer(tmp_path / "checkpoints", mesh, **more)


def wait_for(checkpointer: Checkpointer, kind: str) -> dict:
    """The next event of a kind."""

    def look() -> dict | None:
        return next((event for event in checkpointer.poll() if event["kind"] == kind), None)

    return wait_until(look, kind)


def named_state(training: Training) -> dict[str, torch.Tensor]:
    """All tensors that a step changes, by their names in a snapshot."""
    found = {f"model.{name}": value for name, value in training.model.state_dict().items()}
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    for parameter, state in training.optimizer.state.items():
        found |= {
            f"optimizer.state.model.{names[parameter]}.{key}": v for key, v in state.items() if v.is_floating_point()
        }
    return {name: value.detach().clone() for name, value in found.items()}


def snapshot_content(checkpointer: Checkpointer, step: int) -> dict[str, torch.Tensor]:
    """What the slot of a committed step holds, its checksums compared."""
    assert checkpointer.snapshots is not None
    folder = checkpointer.snapshots.coordinator.agents.folder.path
    for path in sorted(folder.glob("*.head")):
        files = SlotFiles(folder, int(path.stem))
        files.open()
        assert files.header is not None and files.data is not None
        if files.header.step != step:
            continue
        assert list(files.memory.damaged_blocks()) == []
        (part,) = read_parts(files.memory)
        CheckedBlocks(files.memory).check(0, files.data.size)
        found = {}
        for entry in [entry for chunk in part.chunks for entry in chunk.entries]:
            data = bytearray(files.data.view[part.begin + entry.begin : part.begin + entry.end])
            dtype = getattr(torch, entry.spec.dtype)
            found[entry.spec.name] = torch.frombuffer(data, dtype=dtype).reshape(entry.spec.shape)
        return found
    raise AssertionError(f"no slot holds step {step}")


def differences(content: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in expected.items() if name in content and not torch.equal(content[name], value)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_backward", "num_snapshots"), [(False, 50), (True, 200)], ids=["after the backward", "in the backward"]
)
def test_the_snapshots_of_a_training_are_whole(
    in_backward: bool, num_snapshots: int, tmp_path: Path, shm: Path, mesh: Mesh, slow: Callable[[float, int], None]
) -> None:
    """Each is of the moment it was asked for, while the next step already changes what it is of."""
    training = Training(width=64)
    stepper = StepInBackward(training.optimizer, bucket_numel=1) if in_backward else None
    checkpointer = opened(training, tmp_path, shm, mesh)
    if stepper is not None:
        stepper.before_update = checkpointer.wait_staged
    slow(0.0003, 3)
    inputs = torch.randn(8, 4)
    try:
        for step in range(1, num_snapshots + 1):  # step 0 would be made durable as well
            expected = named_state(training)
            # An agent that does not answer at once, on a busy machine, has it skipped.
            wait_until(lambda step=step: checkpointer.snapshot(step), "the agent's attention")
            training.counter.value += 1
            if stepper is not None:
                stepper.begin_micro_step(is_last=True)
                training.model(inputs).square().mean().backward()
                stepper.finish()
            else:
                training.model(inputs).square().mean().backward()
                checkpointer.wait_staged()
                training.optimizer.step()
                training.optimizer.zero_grad(set_to_none=True)
            assert wait_for(checkpointer, "snapshot_committed")["step"] == step
            content = snapshot_content(checkpointer, step)
            assert expected.keys() <= content.keys()
            assert differences(content, expected) == [], f"torn in step {step}"
    finally:
        checkpointer.close()
    wait_until(lambda: not list(shm.iterdir()), "the agent's leaving")


@pytest.mark.slow
def test_without_its_fence_the_backward_tears_snapshots(
    tmp_path: Path, shm: Path, mesh: Mesh, slow: Callable[[float, int], None]
) -> None:
    """So the test above can fail."""
    training = Training(width=64)
    stepper = StepInBackward(training.optimizer, bucket_numel=1)
    checkpointer = opened(training, tmp_path, shm, mesh)
    slow(0.2, 4)
    try:
        expected = named_state(training)
        assert checkpointer.snapshot(0)
        stepper.begin_micro_step(is_last=True)
        training.model(torch.randn(8, 4)).square().mean().backward()
        stepper.finish()
        wait_for(checkpointer, "snapshot_committed")
        assert differences(snapshot_content(checkpointer, 0), expected) != []
    finally:
        checkpointer.close()


@pytest.mark.slow
def test_an_error_in_the_copy_gives_the_snapshot_up_and_training_goes_on(
    tmp_path: Path, shm: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    checkpointer = opened(training, tmp_path, shm, mesh)

    def memmove(target: int, source: int, count: int) -> int:
        raise MemoryError("the region is gone")

    try:
        with monkeypatch.context() as patched:
            patched.setattr(lazy_copy.ctypes, "memmove", memmove)
            assert checkpointer.snapshot(1)
            checkpointer.wait_staged()
        assert "the region is gone" in wait_for(checkpointer, "snapshot_given_up")["reason"]
        training.run(1)
        expected = named_state(training)
        assert checkpointer.snapshot(2)
        wait_for(checkpointer, "snapshot_committed")
        assert differences(snapshot_content(checkpointer, 2), expected) == []
    finally:
        checkpointer.close()


def test_what_anything_may_change_is_copied_at_once(tmp_path: Path, shm: Path, mesh: Mesh) -> None:
    """Buffers, which a forward changes, and the generators of random numbers."""
    training = Training()
    checkpointer = opened(training, tmp_path, shm, mesh)
    try:
        buffers = {f"model.{name}": value.clone() for name, value in training.model.named_buffers()}
        generator = torch.get_rng_state()
        assert checkpointer.snapshot(1)
        for module in training.model:
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
                assert module.running_mean is not None
                module.running_mean.fill_(7.0)
        torch.randn(1000)
        wait_for(checkpointer, "snapshot_committed")
        content = snapshot_content(checkpointer, 1)
        assert differences(content, buffers) == []
        assert any(torch.equal(value, generator) for name, value in content.items() if name.startswith("rng.0."))
    finally:
        checkpointer.close()


@pytest.mark.slow
def test_whoever_opens_a_checkpointer_just_after_the_last_one_is_closed_finds_an_agent(
    tmp_path: Path, shm: Path, mesh: Mesh
) -> None:
    """The agent of the last one answers while it ends."""
    for step in range(1, 6):
        checkpointer = opened(Training(width=8), tmp_path, shm, mesh)
        restored = checkpointer.restore_latest()
        assert (0 if restored is None else restored.step) == step - 1
        checkpointer.save(step)
        checkpointer.close()
