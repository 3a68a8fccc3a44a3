"""Weights that come for a pass or an update and go, as they are or in halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from windlass.offload.arena import Arena
from windlass.offload.buckets import RESIDENT_NUMEL
from windlass.offload.conveyor import Conveyor
from windlass.offload.direct_io import Engine, round_to_pages
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFile, TierFolder
from windlass.offload.weights import Weights, most_bytes

SHAPES = [(120, 80), (80, 120), (9000,)]
SMALL = [(RESIDENT_NUMEL // 64, 64), (7,)]
MakeHome = Callable[[int], TierFile | Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TierFolder]:
    engine = Engine(num_threads=2)
    folder = TierFolder(tmp_path / "tier", engine, "rank0")
    yield folder
    folder.close()
    engine.close()


def layers(count: int = 3) -> list[list[nn.Parameter]]:
    """Of several shapes, with ties among the weights."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        layer = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (*SHAPES, *SMALL)]
        with torch.no_grad():
            for parameter in layer:
                parameter.view(torch.int32).view(-1)[::7] &= ~0xFFFF
                parameter.view(torch.int32).view(-1)[::7] |= 0x8000
        found.append(layer)
    return found


def stream(runs: list[list[nn.Parameter]], make_home: MakeHome, in_halves: bool) -> Weights:
    """Weights of `runs`, in as little room as they must have."""
    weights = Weights(Conveyor(Arena(most_bytes(runs)), Staging(torch.device("cpu"))), make_home, in_halves)
    for run in runs:
        weights.add(run)
    return weights


def host_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def is_gone(parameter: Tensor) -> bool:
    return parameter.untyped_storage().size() == 0


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(mine.view(torch.int32), its.view(torch.int32)) for mine, its in zip(one, other, strict=True))


def copies(run: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run]


@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_weights_go_and_come_back(in_halves: bool, in_memory: bool, folder: TierFolder) -> None:
    runs = layers()
    before = [copies(run) for run in runs]
    weights = stream(runs, host_memory if in_memory else folder.create, in_halves)
    for run, expected in zip(runs, before, strict=True):
        assert [is_gone(parameter) for parameter in run] == [True] * len(SHAPES) + [False] * len(SMALL)
        assert [weights.is_elsewhere(parameter) for parameter in run] == [is_gone(parameter) for parameter in run]
        for _ in range(2):
            with weights.loaded(run):
                assert same(copies(run), expected)
                assert not any(weights.is_elsewhere(parameter) for parameter in run)
            assert is_gone(run[0]) and weights.is_elsewhere(run[0])
    weights.close()


@pytest.mark.parametrize("in_halves", [False, True])
def test_a_pass_gets_what_it_computes_with(in_halves: bool, folder: TierFolder) -> None:
    (run,) = layers(1)
    before = copies(run)
    weights = stream([run], folder.create, in_halves)
    folder.engine.figures.read_bytes = 0
    weights.acquire(run[:1])  # those that are moved with it come, too
    numel = sum(torch.Size(shape).numel() for shape in SHAPES)
    assert folder.engine.figures.read_bytes == round_to_pages((2 if in_halves else 4) * numel)
    for parameter, expected in zip(run[: len(SHAPES)], before, strict=False):
        assert torch.equal(parameter, expected.to(torch.bfloat16).float() if in_halves else expected)
        assert weights.is_elsewhere(parameter) == in_halves, "rounded weights are not the weights"
    weights.release(run[:1])
    assert all(is_gone(parameter) for parameter in run[: len(SHAPES)])
    weights.close()


@pytest.mark.parametrize("in_halves", [False, True])
def test_what_is_written_while_loaded_is_kept_and_what_is_not_is_not(in_halves: bool, folder: TierFolder) -> None:
    runs = layers()
    weights = stream(runs, folder.create, in_halves)
    for step in range(3):
        for run in runs:
            with torch.no_grad(), weights.loaded(run, write=True):
                for parameter in run:
                    parameter.mul_(1.1).add_(step)
                expected = copies(run)
            with torch.no_grad(), weights.loaded(run):
                assert same(copies(run), expected)
                run[0].zero_()
            with weights.loaded(run):
                assert same(copies(run), expected)
    weights.drain()
    weights.close()


@pytest.mark.parametrize("in_halves", [False, True])
def test_an_update_in_the_middle_of_a_pass(in_halves: bool, folder: TierFolder) -> None:
    """It leaves the pass with the weights that it made, as just before a forward."""
    (run,) = layers(1)
    weights = stream([run], folder.create, in_halves)
    weights.acquire(run)
    with torch.no_grad(), weights.loaded(run, write=True):
        run[0].add_(1.0)
        expected = copies(run)
    assert not is_gone(run[0]), "the pass still has it"
    assert torch.equal(run[0].bfloat16(), expected[0].bfloat16()), "it computes in bfloat16 with either"
    weights.release(run)
    assert is_gone(run[0])
    with weights.loaded(run):
        assert same(copies(run), expected)
    weights.close()


def test_an_update_that_fails_keeps_nothing(folder: TierFolder) -> None:
    (run,) = layers(1)
    before = copies(run)
    weights = stream([run], folder.create, True)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), weights.loaded(run, write=True):
        run[0].zero_()
        _ = 1 / 0
    assert is_gone(run[0])
    with weights.loaded(run):
        assert same(copies(run), before)
    weights.close()


@pytest.mark.parametrize("in_halves", [False, True])
def test_looking_ahead_reads_nothing_twice(in_halves: bool, folder: TierFolder) -> None:
    runs = layers(2)
    before = copies(runs[1])
    arena = Arena(4 * most_bytes(runs))
    weights = Weights(Conveyor(arena, Staging(torch.device("cpu"))), folder.create, in_halves)
    for run in runs:
        weights.add(run)
    weights.drain()
    folder.engine.figures.read_bytes = 0
    weights.look_ahead(runs[1], with_rest=True)
    weights.look_ahead(runs[1], with_rest=True)
    with weights.loaded(runs[1]):
        assert same(copies(runs[1]), before)
    numel = sum(torch.Size(shape).numel() for shape in SHAPES)
    assert folder.engine.figures.read_bytes == (
        2 * round_to_pages(2 * numel) if in_halves else round_to_pages(4 * numel)
    )
    weights.look_ahead(runs[0], with_rest=False)
    weights.acquire(runs[0])
    weights.look_ahead(runs[0], with_rest=False)  # it is there
    weights.release(runs[0])
    weights.close()
    assert arena.free_bytes == arena.num_bytes


@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("room", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_looking_ahead_leaves_room_for_what_updates_make(room: float, in_halves: bool, folder: TierFolder) -> None:
    """What was let go for them would be read again."""
    runs = layers(4)
    weights = Weights(
        Conveyor(Arena(int(room * most_bytes(runs))), Staging(torch.device("cpu"))), folder.create, in_halves
    )
    for run in runs:
        weights.add(run)
    weights.drain()
    folder.engine.figures.read_bytes = 0
    for number, run in enumerate(runs):
        weights.acquire(run)
        weights.drain()  # writing is over: there is the most room to read ahead into
        weights.look_ahead([p for near in runs[number : number + 3] for p in near], with_rest=True)
        with weights.loaded(run, write=True):
            pass
        weights.release(run)
    weights.drain()
    numel = sum(torch.Size(shape).numel() for shape in SHAPES)
    once = 2 * round_to_pages(2 * numel) if in_halves else round_to_pages(4 * numel)
    assert folder.engine.figures.read_bytes == len(runs) * once
    weights.close()


def test_autograd_finds_what_it_saved(folder: TierFolder) -> None:
    """Memory that was given back and taken again is the same tensor to it, and holds what it held."""
    runs = layers(2)
    (first, second), inputs = (run[:2] for run in runs), torch.randn(3, 120)
    expected = torch.autograd.grad((inputs @ first[0] @ first[1] @ second[0]).sum(), [first[0], first[1], second[0]])
    weights = stream(runs, folder.create, False)
    outputs = inputs
    for run, used in ((runs[0], first), (runs[1], second[:1])):
        weights.acquire(run)
        for parameter in used:
            outputs = outputs @ parameter
        weights.release(run)
    assert is_gone(first[0])
    for run in runs:
        weights.acquire(run)
    found = torch.autograd.grad(outputs.sum(), [first[0], first[1], second[0]])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    weights.close()


def test_the_least_room_is_for_the_largest_that_move_together() -> None:
    runs = layers(2)
    numel = sum(torch.Size(shape).numel() for shape in (*SHAPES, *SMALL))
    assert most_bytes(runs) == round_to_pages(4 * numel) + round_to_pages(1)
    assert most_bytes([]) == round_to_pages(1)
