from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.errors import DoesNotFit
from windlass.offload.saved_fraction import (
    NUM_PARTS,
    TOLERANCE,
    Activations,
    Choice,
    LayerCosts,
    Rates,
    choose_activations,
)

GIB = 1 << 30
COSTS = LayerCosts(
    input_bytes=8 << 20, attention_bytes=9 << 20, rest_bytes=100 << 20, forward_flops=1e12, rest_flops=0.6e12
)
LAYERS = 24
GPU = Rates(flops_per_s=50e12, write_bytes_per_s=2e9, read_bytes_per_s=2e9, host_bytes_per_s=20e9)


def choose(rates: Rates, near_bytes: int = 0, host_bytes: int = 0) -> Choice:
    return choose_activations(COSTS, LAYERS, rates, near_bytes, host_bytes)


def test_what_has_room_is_kept() -> None:
    choice = choose(GPU, near_bytes=4 * GIB)
    assert (choice.activations, choice.saved_fraction) == (Activations.keep, None)
    assert choice.host_bytes == choice.disk_bytes == 0
    assert choice.pass_s == pytest.approx(3 * LAYERS * 1e12 / 50e12)


def test_a_disk_that_is_never_waited_for_gets_everything() -> None:
    choice = choose(Rates(1e12, 2e9, 2e9), near_bytes=GIB)
    assert choice.activations == Activations.swap
    assert choice.disk_bytes == choice.saved_bytes - GIB
    assert choice.pass_s == pytest.approx(3 * LAYERS)


def test_a_disk_that_is_hardly_there_gets_only_inputs() -> None:
    choice = choose(Rates(1e12, 1e6, 1e6))
    assert choice.activations == Activations.recompute
    assert choice.disk_bytes == LAYERS * COSTS.input_bytes


def test_in_between_the_disk_is_as_busy_as_the_processor() -> None:
    choice = choose(GPU, near_bytes=GIB // 4, host_bytes=GIB)
    assert choice.activations == Activations.fraction
    assert choice.saved_fraction is not None and 0 < choice.saved_fraction < 1
    forward_s = LAYERS * COSTS.forward_flops / GPU.flops_per_s
    again_s = (1 - choice.saved_fraction) * LAYERS * COSTS.rest_flops / GPU.flops_per_s
    part_s = LAYERS * COSTS.rest_bytes / NUM_PARTS / 2e9
    # In the forward pass the disk has just become the slowest, or is about to.
    assert choice.disk_bytes / 2e9 == pytest.approx(forward_s, abs=part_s)
    assert choice.pass_s == pytest.approx(max(forward_s, choice.disk_bytes / 2e9) + 2 * forward_s + again_s)


def test_what_else_uses_the_disk_leaves_less_for_activations() -> None:
    alone = choose(GPU, host_bytes=GIB)
    shared = choose(dataclasses.replace(GPU, disk_busy_s=(0.3, 0.3)), host_bytes=GIB)
    assert alone.saved_fraction is not None and shared.saved_fraction is not None
    assert shared.saved_fraction < alone.saved_fraction


def test_without_a_disk_the_host_has_to_hold_it() -> None:
    rates = Rates(400e12, host_bytes_per_s=50e9)
    choice = choose(rates, near_bytes=GIB // 4, host_bytes=GIB // 2)
    assert choice.disk_bytes == 0
    assert choice.saved_bytes <= GIB // 4 + GIB // 2
    assert choice.activations == Activations.fraction
    with pytest.raises(DoesNotFit, match="choose offload=ssd"):
        choose(rates, near_bytes=1 << 20, host_bytes=1 << 20)


def test_copies_that_the_processor_makes_count_against_moving() -> None:
    free = choose(Rates(1e12, 2e9, 2e9))
    costly = choose(Rates(1e12, 2e9, 2e9, copy_bytes_per_s=1e8))
    assert free.activations == Activations.swap
    assert costly.disk_bytes < free.disk_bytes


def test_the_reasons_name_the_choice_and_what_it_was_held_against() -> None:
    choice = choose(GPU, near_bytes=GIB // 4, host_bytes=GIB)
    what, _, times = choice.reasons[2].partition(": ")
    assert what == "modelled, forward and backward"
    names = [time.split(" ")[0] for time in times.split(", ")]
    assert names == [f"fraction={choice.saved_fraction:.3g}", "recompute", "fraction=0", "swap"]


def test_kernels_that_go_through_memory_take_time_too() -> None:
    rates = Rates(1e12, memory_bytes_per_s=1e9)
    costs = dataclasses.replace(COSTS, forward_touched_bytes=2_000_000_000, rest_touched_bytes=1_000_000_000)
    kept = choose_activations(costs, LAYERS, rates, near_bytes=4 * GIB)
    assert kept.pass_s == pytest.approx(3 * LAYERS * (1 + 2))
    inputs_only = choose_activations(
        costs, LAYERS, rates, near_bytes=LAYERS * (costs.input_bytes + costs.attention_bytes)
    )
    assert (inputs_only.activations, inputs_only.saved_fraction) == (Activations.fraction, 0)
    assert inputs_only.pass_s == pytest.approx(LAYERS * (3 * (1 + 2) + 0.6 + 1))


rates_of_all_kinds = st.builds(
    Rates,
    flops_per_s=st.floats(1e11, 1e15),
    write_bytes_per_s=st.floats(1e8, 1e10),
    read_bytes_per_s=st.floats(1e8, 1e10),
    host_bytes_per_s=st.none() | st.floats(1e9, 1e11),
    copy_bytes_per_s=st.none() | st.floats(1e9, 1e10),
)


@given(rates_of_all_kinds, st.integers(0, 4 * GIB), st.integers(0, 4 * GIB))
def test_more_room_and_faster_links_are_never_slower(rates: Rates, near_bytes: int, host_bytes: int) -> None:
    assert rates.write_bytes_per_s is not None
    pass_s = choose(rates, near_bytes, host_bytes).pass_s * (1 + TOLERANCE)
    faster = dataclasses.replace(rates, write_bytes_per_s=2 * rates.write_bytes_per_s)
    assert choose(faster, near_bytes, host_bytes).pass_s <= pass_s
    assert choose(rates, 2 * near_bytes, host_bytes).pass_s <= pass_s
    assert choose(rates, near_bytes, 2 * host_bytes).pass_s <= pass_s
    assert 3 * LAYERS * COSTS.forward_flops / rates.flops_per_s <= pass_s
