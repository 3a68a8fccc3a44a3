"""Updates that gather whole matrices run a bounded number at a time, and the ranks share the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from windlass.optim.base import MatrixOptimizer
from windlass.optim.lockstep import MAX_GATHERED_NUMEL, Gathered, Wave
from windlass.optim.matrix_stack import MatrixStack
from windlass.parallel.layout import Layout, Split

GROUPS: Any = ["one group", "another"]


def test_the_rank_with_the_least_to_do_owns_the_next_matrix() -> None:
    wave = Wave(3)
    assert wave.take(1, 50, Gathered(1)) == [0]
    assert wave.take(4, 20, Gathered(1)) == [1, 2, 1, 2]
    assert wave.take(2, 10, Gathered(1)) == [1, 2]
    assert wave.take(1, 10, Gathered(1)) == [0]


def test_a_wave_is_full_when_an_owner_is() -> None:
    wave = Wave(2)
    half = Gathered(at_owner=MAX_GATHERED_NUMEL // 2)
    assert wave.take(4, 1, half) == [0, 1, 0, 1]
    assert wave.take(1, 1, half) is None
    assert wave.take(1, 1, Gathered()) == [0], "a refusal leaves no trace"


def test_what_every_rank_receives_fills_a_wave_too() -> None:
    wave = Wave(2)
    third = Gathered(everywhere=MAX_GATHERED_NUMEL // 3)
    assert wave.take(3, 1, third) == [0, 1, 0]
    assert wave.take(1, 1, third) is None


def test_each_rank_may_have_one_matrix_above_the_limit() -> None:
    huge = Gathered(at_owner=2 * MAX_GATHERED_NUMEL, everywhere=1)
    wave = Wave(3)
    assert [wave.take(1, 1, huge) for _ in range(3)] == [[0], [1], [2]]
    assert wave.take(1, 1, huge) is None


class Gathering(MatrixOptimizer):
    def is_matrix_group(self, group: Any) -> bool:
        return True

    def gathered(self, stack: MatrixStack) -> Gathered | None:
        return None if stack.step > 1 else Gathered(at_owner=stack.layout.shape[0] * stack.layout.shape[1])


def stack_of(shape: tuple[int, int], group: Any, step: int = 1, num_matrices: int = 1) -> MatrixStack:
    layout = Layout(shape, () if group is None else (Split(0, group, 0, 2),))
    return MatrixStack({}, step, layout, [torch.empty(0)] * num_matrices, [{}] * num_matrices)


def test_costly_stacks_go_first_and_each_group_has_its_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.optim.lockstep.MAX_GATHERED_NUMEL", 32)
    stacks = {
        "small": stack_of((2, 8), GROUPS[0], num_matrices=2),
        "square": stack_of((4, 4), GROUPS[0]),
        "late": stack_of((9, 9), GROUPS[0], step=2),
        "other": stack_of((4, 4), GROUPS[1]),
        "large": stack_of((4, 8), GROUPS[0]),
        "alone": stack_of((9, 9), None),
    }
    name_of = {id(stack): name for name, stack in stacks.items()}
    waves = Gathering([torch.empty(2, 2)], {})._waves(list(stacks.values()))
    found = [{name_of[id(stack)]: stack.owners for stack in wave} for wave in waves]
    assert found == [{"late": [], "alone": []}, {"large": [0], "square": [1]}, {"small": [0, 1]}, {"other": [0]}]
