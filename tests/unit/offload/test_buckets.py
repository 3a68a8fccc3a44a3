"""Where state tensors lie in the bytes of a bucket, and which parameters share one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from windlass.offload.buckets import SlotTable, divide, is_elsewhere, is_stowed, on_meta, spread
from windlass.parallel.fragment import SMALL_BYTES

State = list[tuple[Tensor, dict[str, Any]]]
KEYS = ["exp_avg", "exp_avg_sq", "count"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.uint8]
LARGE = SMALL_BYTES + 8


def parameters(*numels: int) -> list[Tensor]:
    return [torch.empty(numel, device="meta") for numel in numels]


def state_of(kinds: list[dict[str, tuple[int, torch.dtype]]]) -> State:
    return [
        (torch.empty(1), {key: torch.zeros(numel, dtype=dtype) for key, (numel, dtype) in kind.items()})
        for kind in kinds
    ]


tensors = st.tuples(st.integers(1, 3 * SMALL_BYTES), st.sampled_from(DTYPES))


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), tensors), max_size=6))
def test_large_tensors_lie_back_to_back_and_aligned(kinds: list[dict[str, tuple[int, torch.dtype]]]) -> None:
    state = state_of(kinds)
    table = SlotTable(state)
    stowed = [value for _, values in state for value in values.values() if value.nbytes > SMALL_BYTES]
    assert len(table.slots) == len(stowed)
    assert table.num_bytes == sum(value.nbytes for value in stowed)
    end = 0
    for slot in table.slots:
        assert slot.begin == end and slot.begin % slot.like.element_size() == 0
        end = slot.end
    order = [(-slot.like.element_size(), slot.key) for slot in table.slots]
    assert [size for size, _ in order] == sorted(size for size, _ in order), "wide ones first"
    runs = [kind for number, kind in enumerate(order) if number == 0 or order[number - 1] != kind]
    assert len(runs) == len(set(runs)), "those of a kind are one piece"


def test_a_slot_is_a_view_of_the_bytes() -> None:
    state: State = [(torch.empty(1), {"wide": torch.zeros(30, 40), "half": torch.zeros(50, 60, dtype=torch.bfloat16)})]
    table = SlotTable(state)
    data = torch.zeros(table.num_bytes, dtype=torch.uint8)
    for number, slot in enumerate(table.slots):
        slot.tensor(data).fill_(number + 1)
    assert torch.equal(data[:4800].view(torch.float32), torch.ones(1200))
    assert torch.equal(data[4800:].view(torch.bfloat16), torch.full((3000,), 2.0, dtype=torch.bfloat16))
    (parameter, _), key = state[0], "half"
    assert (found := table.slot(parameter, key)) is not None and found.tensor(data).shape == (50, 60)
    assert table.slot(parameter, "other") is None and table.slot(torch.empty(1), key) is None


def test_numbers_and_small_tensors_stay() -> None:
    values = {"step": torch.tensor(3.0), "count": 7, "small": torch.zeros(SMALL_BYTES, dtype=torch.uint8)}
    assert not any(is_stowed(value) for value in values.values())
    table = SlotTable([(torch.empty(1), values)])
    assert (table.num_bytes, str(table)) == (0, "nothing")
    assert is_stowed(torch.zeros(SMALL_BYTES + 1, dtype=torch.uint8))


def test_a_table_says_what_it_holds() -> None:
    state = state_of([{"a": (LARGE, torch.float32), "b": (LARGE, torch.int16)}])
    parameter, values = state[0]
    table = SlotTable(state)
    assert str(table) == f"a [{LARGE}] torch.float32, b [{LARGE}] torch.int16"
    assert table.holds(state) and table.holds([]) and table.holds([(parameter, {"a": values["a"]})])
    assert table.holds([(parameter, values | {"step": torch.tensor(1.0), "name": "x"})]), "these are not its business"
    assert table.holds([(parameter, {key: on_meta(value) for key, value in values.items()})])
    for key, other in {
        "a": torch.zeros(LARGE + 1),
        "b": torch.zeros(LARGE, dtype=torch.float32),
        "c": torch.zeros(LARGE),
    }.items():
        assert not table.holds([(parameter, values | {key: other})])
    assert not table.holds([(torch.empty(1), values)]), "of another parameter"


def test_a_tensor_on_the_meta_device_is_elsewhere() -> None:
    here = torch.zeros(3, 4, dtype=torch.bfloat16)
    there = on_meta(here)
    assert (there.shape, there.dtype, is_elsewhere(there), is_elsewhere(here)) == (here.shape, here.dtype, True, False)
    assert not is_elsewhere(3)


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 40))
def test_runs_keep_the_order_and_are_as_long_as_they_may(numels: list[int], limit: int) -> None:
    members = parameters(*numels)
    runs = divide(members, limit)
    assert [id(member) for run in runs for member in run] == [id(member) for member in members]
    sizes = [sum(member.numel() for member in run) for run in runs]
    for number, (run, size) in enumerate(zip(runs, sizes, strict=True)):
        assert len(run) == 1 or size <= limit
        if number:
            assert sizes[number - 1] + run[0].numel() > limit


@pytest.mark.parametrize(("numels", "lengths"), [([], []), ([1 << 24], [1]), ([1 << 22] * 5, [2, 2, 1])])
def test_a_bucket_has_eight_million_weights_unless_one_parameter_has_more(
    numels: list[int], lengths: list[int]
) -> None:
    assert [len(run) for run in divide(parameters(*numels))] == lengths


@pytest.mark.parametrize(
    ("budgets", "places"),
    [
        ([0, 0], [2, 2, 2, 2, 2, 2]),
        ([0, None], [1, 1, 1, 1, 1, 1]),
        ([None, 0], [0, 0, 0, 0, 0, 0]),
        ([60, 0], [0, 0, 0, 0, 0, 0]),
        ([0, 30], [2, 1, 2, 1, 2, 1]),
        ([20, 0], [2, 2, 0, 2, 2, 0]),
        ([20, 20], [1, 2, 0, 1, 2, 0]),
        ([20, 40], [1, 1, 0, 1, 1, 0]),
        ([9, 0], [2, 2, 2, 2, 2, 2]),
    ],
)
def test_each_place_gets_its_share_all_through_a_step(budgets: list[int | None], places: list[int]) -> None:
    assert spread([10] * 6, budgets) == places


@given(st.lists(st.integers(0, 50), max_size=20), st.lists(st.none() | st.integers(0, 300), min_size=2, max_size=2))
def test_no_place_gets_more_than_its_budget_and_none_less_than_it_can_hold(
    sizes: list[int], budgets: list[int | None]
) -> None:
    places = spread(sizes, budgets)
    assert len(places) == len(sizes) and all(0 <= place <= 2 for place in places)
    on_disk = [size for size, place in zip(sizes, places, strict=True) if place == 2]
    for number, budget in enumerate(budgets):
        used = sum(size for size, place in zip(sizes, places, strict=True) if place == number)
        if budget is None:
            assert not on_disk
        else:
            assert used <= budget and all(used + size > budget for size in on_disk), "nor leaves room unused"
