"""One rank is late on purpose, and it is the others that count a wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.ranks import run_ranks
from support.toy import Layout, build, digest, train_steps, whole_weights
from torch.distributed.fsdp import FSDPModule

from windlass.parallel.collectives import all_gather_object, all_reduce, all_reduce_async, all_to_all, finish
from windlass.parallel.config import ParallelConfig
from windlass.parallel.fsdp_shim import _count_stream_waits, _param_groups
from windlass.parallel.mesh import Mesh
from windlass.parallel.waiting import WAITED, WaitClock

LATE_S = 0.6
CLEAR_S = LATE_S / 2
"""What others waited longer than the late rank, at least: much less than it was late, as the machine may be busy."""


def test_only_the_main_thread_counts() -> None:
    clock = WaitClock()

    def wait() -> None:
        with clock.host():
            time.sleep(0.02)

    behind = threading.Thread(target=wait)
    behind.start()
    behind.join()
    assert clock.lap().seconds == 0
    wait()
    assert clock.lap().seconds >= 0.02


def test_a_lap_begins_anew_and_keeps_what_it_has() -> None:
    clock = WaitClock()
    clock.add(1.5)
    first = clock.lap()
    clock.add(0.25)
    assert (first.seconds, clock.lap().seconds, clock.lap().seconds) == (1.5, 0.25, 0)


def test_a_wait_that_fails_is_counted() -> None:
    clock = WaitClock()
    with pytest.raises(RuntimeError), clock.host():
        time.sleep(0.02)
        raise RuntimeError
    assert clock.lap().seconds >= 0.02


KINDS: dict[str, Callable[[Mesh], object]] = {
    "all_reduce": lambda mesh: all_reduce(torch.ones(3), mesh.world),
    "async": lambda mesh: finish(all_reduce_async(torch.ones(3), mesh.world)),
    "objects": lambda mesh: all_gather_object(mesh.rank, mesh.world),
    "all_to_all": lambda mesh: all_to_all(torch.ones(2), [1, 1], [1, 1], mesh.world),  # type: ignore[arg-type]
}


def waits_of_kinds(late_rank: int) -> dict[str, float]:
    mesh = ParallelConfig().build(torch.device("cpu"))
    waits = {}
    for kind, communicate in KINDS.items():
        mesh.barrier()
        WAITED.lap()
        if mesh.rank == late_rank:
            time.sleep(LATE_S)
        communicate(mesh)
        waits[kind] = WAITED.lap().seconds
    mesh.stop()
    return waits


@pytest.mark.slow
@pytest.mark.parametrize("late_rank", [0, 1])
def test_the_others_wait_in_each_collective(late_rank: int) -> None:
    waits = run_ranks(waits_of_kinds, 2, late_rank)
    for kind in KINDS:
        assert waits[1 - late_rank][kind] > waits[late_rank][kind] + CLEAR_S, (kind, waits)


def waits_of_a_step(layout: Layout, late_rank: int, in_backward: bool) -> float:
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, sharder, optimizer = build(layout, mesh)
    train_steps(layout, mesh, model, sharder, optimizer, range(1))
    layer = model.layers[1]
    if mesh.rank == late_rank:
        if in_backward:
            layer.register_full_backward_hook(lambda *_: time.sleep(LATE_S))
        else:
            layer.register_forward_hook(lambda *_: time.sleep(LATE_S))
    mesh.barrier()
    WAITED.lap()
    train_steps(layout, mesh, model, sharder, optimizer, range(1, 2))
    waited = WAITED.lap().seconds
    mesh.stop()
    return waited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "in_backward"),
    [
        ("ddp", True),
        ("zero3", False),
        ("zero3", True),
        ("hsdp", False),
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in [
                ("ddp", False),
                ("zero1", False),
                ("zero1", True),
                ("zero2", False),
                ("zero2", True),
                ("hsdp", True),
            ]
        ),
    ],
)
def test_the_others_wait_in_fsdp2(sharding: str, in_backward: bool) -> None:
    is_hybrid = sharding == "hsdp"
    layout = Layout(sharding=sharding, num_replicas=2 if is_hybrid else None, grad_accum_steps=1)
    late, *others = run_ranks(waits_of_a_step, 4 if is_hybrid else 2, layout, 0, in_backward)
    assert min(others) > late + CLEAR_S


def train_as_on_a_gpu(layout: Layout, counts_stream_waits: bool) -> tuple[str, int]:
    """Digest of the weights, and how many waits of the compute stream were counted."""
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, sharder, optimizer = build(layout, mesh)
    num_waits = 0

    @contextmanager
    def count() -> Iterator[None]:
        nonlocal num_waits
        num_waits += 1
        yield

    if counts_stream_waits:
        WAITED.stream = count  # type: ignore[method-assign]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in _param_groups(module):
                    _count_stream_waits(group)
    train_steps(layout, mesh, model, sharder, optimizer, range(2))
    weights = digest(whole_weights(model))
    mesh.stop()
    return weights, num_waits


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
def test_what_counts_waits_of_a_stream_fits_this_fsdp2_and_changes_nothing(sharding: str) -> None:
    """What stands around FSDP2's methods on a GPU finds all that it reads there, of which torch may rename any.

    There are no events on a CPU, so only the wait at the end of each backward is seen.
    """
    layout = Layout(sharding=sharding, grad_accum_steps=2)
    plain, counted = (run_ranks(train_as_on_a_gpu, 2, layout, counts) for counts in (False, True))
    assert [weights for weights, _ in counted] == [weights for weights, _ in plain]
    assert [num_waits > 0 for _, num_waits in counted] == [True, True]
    assert [num_waits for _, num_waits in plain] == [0, 0]
