"""What becomes of a parameter does not depend, to the bit, on which others step at the same time.

That is what lets state that does not fit be updated a few parameters at a time (`windlass.offload`, `StepInBackward`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.optimizers import CASES, gradient, make, parameters_of
from torch import Tensor

NUM_STEPS = 4  # beyond an update interval
SHAPES: list[tuple[int, ...]] = [
    *[(48, 64)] * 3,
    *[(17, 19)] * 3,  # matrices whose elements do not fill whole vector registers
    *[(50, 49)] * 2,
    *[(65, 129)] * 2,
    *[(53,)] * 2,
]
LARGE: list[tuple[int, ...]] = [*[(257, 385)] * 2, *[(512, 256)] * 2, *[(40_001,)] * 2]
"""Sums over more than 32,768 elements are divided among threads, and products too."""
RANKS = {"odd": 5, "one": 1, "large": 37}
"""Each changes which of MKL's kernels runs, and where a state lies beside others."""


def setup(
    name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, options: dict[str, Any], keys: dict[str, Any]
) -> tuple[list, torch.optim.Optimizer]:
    parameters = parameters_of(shapes, dtype)
    if name == "adamw":
        return parameters, torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    optimizer = make(name, matrices, vectors, weight_decay=0.1, **options)
    for key, value in keys.items():
        if key in optimizer.param_groups[0]:
            optimizer.param_groups[0][key] = value
    return parameters, optimizer


Parts = Callable[[int, int], Iterator[list[int]]]
"""(number of parameters, step) -> the parameters that step together, by their index."""


def by(size: int, is_reversed: bool = False) -> Parts:
    def parts(count: int, _: int) -> Iterator[list[int]]:
        indexes = list(range(count))[:: -1 if is_reversed else 1]
        for start in range(0, count, size):
            yield indexes[start : start + size]

    return parts


def at_random(count: int, step: int) -> Iterator[list[int]]:
    draw = random.Random(step)
    indexes = draw.sample(range(count), count)
    while indexes:
        size = draw.randint(1, 6)
        yield indexes[:size]
        indexes = indexes[size:]


PARTS: dict[str, Parts] = {"by one": by(1), "by two": by(2), "reversed": by(3, is_reversed=True), "random": at_random}


def elsewhere(tensor: Tensor, draw: random.Random) -> Tensor:
    """A copy of `tensor` at an address that is a multiple of its elements' size and of nothing else."""
    offset = draw.randint(0, 17)
    copy = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape)
    return copy.copy_(tensor)


def train(parameters: list, optimizer: torch.optim.Optimizer, parts: Parts, moves: bool = False) -> None:
    """Steps in parts; with `moves`, whatever a part uses is somewhere else in memory each time."""
    draw = random.Random(0)
    for step in range(NUM_STEPS):
        for part in parts(len(parameters), step):
            for index in part:
                parameter = parameters[index]
                parameter.grad = gradient(tuple(parameter.shape), step, index).to(parameter.dtype)
                if moves:
                    parameter.grad, parameter.data = elsewhere(parameter.grad, draw), elsewhere(parameter.data, draw)
                    state = optimizer.state[parameter]
                    state.update({key: elsewhere(value, draw) for key, value in state.items()})
            optimizer.step()
            optimizer.zero_grad()


def differing(ours: tuple[list, torch.optim.Optimizer], theirs: tuple[list, torch.optim.Optimizer]) -> list[str]:
    """Names of weights and state that are not bit-equal."""
    found = []
    for index, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
        state, expected = ours[1].state[mine], theirs[1].state[other]
        assert state.keys() == expected.keys() and "step" in state
        pairs = {"weight": (mine, other), **{key: (state[key], expected[key]) for key in state}}
        found += [f"{index} {tuple(mine.shape)} {key}" for key, pair in pairs.items() if not torch.equal(*pair)]
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(
    name: str,
    shapes: list[tuple[int, ...]],
    ways: list[str],
    *,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
    **keys: Any,
) -> None:
    together = setup(name, shapes, dtype, options or {}, keys)
    train(*together, by(len(shapes)))
    for way in ways:
        for moves in (False, True):
            apart = setup(name, shapes, dtype, options or {}, keys)
            train(*apart, PARTS[way], moves)
            assert differing(apart, together) == [], f"{way}{', moved' if moves else ''}"


every_optimizer = pytest.mark.parametrize("name", ["adamw", *CASES])


@pytest.mark.slow
@every_optimizer
def test_parts_of_any_kind_give_the_same_bits(name: str) -> None:
    check(name, SHAPES, list(PARTS), update_interval=3)


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "galore", "natural_galore", "cosmos"])
def test_any_rank_gives_the_same_bits(name: str, rank: int) -> None:
    shapes = [shape for shape in SHAPES if min(shape) >= rank]
    check(name, shapes, ["random"], update_interval=3, rank=rank)


@pytest.mark.slow
@every_optimizer
def test_large_tensors_get_the_same_bits(name: str) -> None:
    check(name, LARGE, ["random"], update_interval=3, rank=37)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        *(name if name in ("apollo", "cosmos") else pytest.param(name, marks=pytest.mark.full) for name in CASES),
    ],
)
def test_two_threads_give_the_same_bits(name: str) -> None:
    check(name, LARGE, ["by one"], update_interval=3, rank=129)


@pytest.mark.slow
@every_optimizer
def test_bfloat16_weights_get_the_same_bits(name: str) -> None:
    check(name, SHAPES, ["by one", "random"], dtype=torch.bfloat16, update_interval=3)


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("apollo", {"compat": True}, {}),
        ("galore", {"compat": True}, {}),
        ("galore", {}, {"shard_projector": True}),
        ("cosmos", {"compat": True}, {}),
        ("muon", {"nesterov": False}, {}),
    ],
)
def test_every_mode_gives_the_same_bits(name: str, options: dict[str, Any], keys: dict[str, Any]) -> None:
    check(name, SHAPES, ["by one", "random"], options=options, update_interval=3, **keys)
