"""What a plan says of the disk is what a run does there: compared with real tiers that read and write files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.tiered import await_transfers

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.data.loader import Batch
from windlass.errors import ConfigError
from windlass.machine.speeds import Machine, machine_key, process_kind, ssd_key
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.plan import forecast as module
from windlass.plan.disk import DiskSpeed, DiskUse, play
from windlass.plan.fixes import cheapest_fix
from windlass.plan.forecast import forecast
from windlass.plan.memory import live_peak
from windlass.plan.recorder import Calls, DiskTransfer, DiskWait, Trace
from windlass.plan.trace import NUM_STEPS, trace_step
from windlass.train.build import StepParts, build_model, build_optimizer, build_tiers, modules_of_units
from windlass.train.loss import forward_loss_sums

SMALL = ["model.vocab_size=2048", "model.num_layers=3", "train.batch_size=2", "train.seq_len=32", "parallel=none"]
SMALL += ["checkpoint=none", "offload.buffer_bytes=3000000", "train.device=cpu"]
STREAMED = ("offload=ssd", "offload.weights=streamed")
PROCESS_BYTES = 300 << 20
OP_S: dict[str, float] = {}
"""What tests have timed: a kernel once for all of them."""
MORE_PLACES = ("offload.weights=streamed", "optim.in_backward=previous_norm")
MORE_TIERS = (
    ("offload=ssd", "train.grad_accum_steps=5"),
    ("offload=ssd", "offload.max_host_bytes=2000000"),
    ("offload=ssd", "optim=apollo", "optim.rank=16"),
    ("offload=ssd", "optim.in_backward=previous_norm"),
    STREAMED,
    (*STREAMED, "train.dtype=bfloat16", "train.grad_accum_steps=3"),
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """This machine, as if it had been measured."""
    machine = Machine(machine_key(), op_s=OP_S)
    machine.process_bytes = {process_kind(1, "float32"): PROCESS_BYTES}
    machine.op_overhead_s, machine.gloo_bytes_per_s, machine.memcpy_bytes_per_s = 1e-5, 1e9, 1e10
    machine.ssd[ssd_key(tmp_path)] = {
        "read_bytes_per_s": 1e9,
        "write_bytes_per_s": 1e9,
        "cpu_s_per_byte": 0.0,
        "is_direct": True,
    }
    return machine


def disk_bytes(trace: Trace) -> tuple[int, int]:
    """Read and written in a step."""
    return (
        sum(transfer.num_bytes for transfer in trace.transfers if not transfer.is_write),
        sum(transfer.num_bytes for transfer in trace.transfers if transfer.is_write),
    )


def real_parts(config: Config) -> StepParts:
    mesh = config.parallel.build(torch.device("cpu"))
    tiers = build_tiers(config, mesh)
    assert tiers is not None
    model, sharder = build_model(config, mesh, tiers)
    optimizer = build_optimizer(config, model, tiers)
    assert isinstance(optimizer, OffloadedOptimizer)
    buckets = optimizer.bucket_parameters()
    in_backward = config.optim.build_in_backward(optimizer, config.train.max_norm, buckets)
    tiers.attend(model, modules_of_units(model), is_cut=False)
    optimizer.reserve()
    return StepParts(config, mesh, model, sharder, optimizer, in_backward, tiers)


def real_step(parts: StepParts) -> None:
    train = parts.config.train
    ids = torch.zeros(train.batch_size, train.seq_len, dtype=torch.int64)
    batch = Batch(ids, ids.clone(), torch.zeros(ids.shape, dtype=torch.int32))
    passes = parts.passes([batch] * train.grad_accum_steps)
    for i, batches in enumerate(passes):
        parts.sharder.begin_micro_step(parts.model, i == len(passes) - 1)
        if parts.in_backward is not None:
            parts.in_backward.begin_micro_step(i == len(passes) - 1)
        torch.autograd.backward(forward_loss_sums(parts.model, batches, mask_documents=False))
    if parts.in_backward is None:
        clip_grad_norm_(parts.model.parameters(), train.max_norm, parts.mesh)
    else:
        parts.in_backward.finish()
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("offload=ssd",),
        *(pytest.param(overrides, marks=pytest.mark.full) for overrides in MORE_TIERS),
        (*STREAMED, "train.dtype=bfloat16", "train.activation_checkpoint=full", "optim.in_backward=previous_norm"),
    ],
)
def test_bytes_of_a_step_are_those_of_a_real_one(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = compose([*SMALL, f"run_dir={tmp_path}", *overrides])
    parts = real_parts(config)
    assert parts.tiers is not None
    figures = parts.tiers.figures
    for _ in range(NUM_STEPS):
        before = figures
        real_step(parts)
        await_transfers(parts.tiers)
        figures = parts.tiers.figures
    of_step = figures.since(before)
    parts.tiers.close()
    read, written = disk_bytes(trace_step(config, 1))
    assert written == of_step.write_bytes > 0
    assert read == of_step.read_bytes > 0


@pytest.mark.full
@pytest.mark.slow
def test_bytes_on_the_disk_are_those_of_the_state(tmp_path: Path) -> None:
    run = f"run_dir={tmp_path}"
    in_memory = trace_step(compose([*SMALL, run]), 1)
    on_disk = trace_step(compose([*SMALL, run, "offload=ssd"]), 1)
    streamed = trace_step(compose([*SMALL, run, *STREAMED]), 1)
    assert (in_memory.disk_optimizer_bytes, in_memory.disk_weights_bytes, in_memory.transfers) == (0, 0, [])
    assert on_disk.optimizer_bytes == in_memory.optimizer_bytes
    assert 0.95 * on_disk.optimizer_bytes < on_disk.disk_optimizer_bytes < on_disk.optimizer_bytes
    assert on_disk.disk_weights_bytes == 0
    assert streamed.disk_optimizer_bytes == on_disk.disk_optimizer_bytes
    assert 0.95 * streamed.weights_bytes < streamed.disk_weights_bytes < streamed.weights_bytes
    assert live_peak(streamed.memory) - streamed.buffer_bytes < live_peak(on_disk.memory) - on_disk.buffer_bytes
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


@pytest.mark.full
@pytest.mark.slow
def test_ranks_share_the_state(tmp_path: Path) -> None:
    overrides = [*SMALL, f"run_dir={tmp_path}", *STREAMED, "parallel=zero3"]
    one, two = (trace_step(compose(overrides), num_ranks) for num_ranks in (1, 2))
    assert two.disk_optimizer_bytes == pytest.approx(one.disk_optimizer_bytes / 2, rel=0.05)
    assert two.disk_weights_bytes == pytest.approx(one.disk_weights_bytes / 2, rel=0.05)


def test_a_step_waits_only_for_what_has_not_come() -> None:
    disk = DiskSpeed(read_bytes_per_s=1.0, write_bytes_per_s=2.0)
    ahead = [DiskTransfer(0, 3, is_write=False), Calls("pass", 2, False), DiskWait(0), Calls("update", 1, True)]
    assert play(ahead, {"pass": 1.0, "update": 1.0}, disk) == DiskUse(busy_s=3.0, stall_s=1.0)
    assert play(ahead, {"pass": 2.0, "update": 1.0}, disk) == DiskUse(busy_s=3.0, stall_s=0.0)
    behind = [*ahead, DiskTransfer(1, 4, is_write=True)]  # the next step's reading comes after it
    assert play(behind, {"pass": 1.0, "update": 1.0}, disk) == DiskUse(busy_s=5.0, stall_s=3.0)


def test_a_step_waits_for_what_the_one_before_has_begun_to_read() -> None:
    timeline = [DiskWait(4), Calls("pass", 1, False), DiskTransfer(5, 3, is_write=False)]
    assert play(timeline, {"pass": 1.0}, DiskSpeed(1.0, 1.0)) == DiskUse(busy_s=3.0, stall_s=3.0)


@pytest.mark.full
@pytest.mark.slow
def test_a_step_that_uses_all_cores_is_longer_by_what_transfers_take_of_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.ssd[ssd_key(tmp_path)]["cpu_s_per_byte"] = 1e-8
    config = compose([*SMALL, f"run_dir={tmp_path}", *STREAMED])
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    plan = forecast(config, 1, machine)
    time = plan.time
    assert time.disk_cpu_s == pytest.approx(1e-8 * (plan.ssd_read_bytes + plan.ssd_write_bytes))
    parts = (time.kernels_s, time.overhead_s, time.comm_s, time.stall_s, time.disk_cpu_s, time.pages_s)
    assert time.step.expected == pytest.approx(sum(parts))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1024)))
    assert forecast(config, 1, machine).time.disk_cpu_s == 0.0


@pytest.mark.full
@pytest.mark.slow
def test_a_disk_that_is_too_small(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "host_memory", lambda: (1 << 40, 1 << 40))
    config = compose([*SMALL, f"run_dir={tmp_path}", *STREAMED])
    needed = forecast(config, 1, machine).memory.peak_tiers.ssd
    assert needed >= 12 * 0.95 * sum(parameter.numel() for parameter in config.model.build().parameters())
    monkeypatch.setattr(module, "free_bytes", lambda folder: needed)
    assert forecast(config, 1, machine).fits
    config.checkpoint = compose([*SMALL, "checkpoint=durable"]).checkpoint
    plan = forecast(config, 1, machine)
    assert plan.memory.peak_tiers.ssd == 2 * needed
    assert not plan.fits and not plan.is_close
    assert any("set offload.dir to a disk with more" in reason for reason in plan.reasons)


@pytest.mark.full
@pytest.mark.slow
def test_a_slow_disk_is_the_bottleneck(machine: Machine, tmp_path: Path) -> None:
    config = compose([*SMALL, f"run_dir={tmp_path}", "offload=ssd"])
    fast = forecast(config, 1, machine)
    machine.ssd[ssd_key(tmp_path)] |= {"read_bytes_per_s": 1e6, "write_bytes_per_s": 1e6}
    slow = forecast(config, 1, machine)
    assert slow.bottleneck == "disk"
    assert slow.time.disk_s == pytest.approx((slow.ssd_read_bytes + slow.ssd_write_bytes) / 1e6)
    # What the buffers hold is read while the passes compute, all else is waited for.
    assert 0.5 * slow.time.disk_s < slow.time.stall_s <= slow.time.disk_s
    assert slow.time.step.expected == pytest.approx(fast.time.step.expected - fast.time.stall_s + slow.time.stall_s)
    assert fast.break_even_tokens is not None and slow.break_even_tokens is not None
    assert slow.break_even_tokens > 100 * max(1, fast.break_even_tokens) or fast.break_even_tokens == 1
    assert slow.ssd_written_tb_per_day == pytest.approx(86400e-12 * slow.ssd_write_bytes / slow.time.step.expected)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["offload=ssd", *(pytest.param(place, marks=pytest.mark.full) for place in MORE_PLACES)]
)
def test_the_cheapest_place_that_fits_is_proposed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    overrides = [*SMALL, "model.vocab_size=8192", "model.hidden_size=512", "model.intermediate_size=2048"]
    overrides += ["model.num_heads=8", "model.tie_embeddings=false", "train.batch_size=1", "train.mock_step=false"]
    overrides.append(f"run_dir={tmp_path}")
    config = compose(overrides)
    places = ["offload=ssd", "offload.weights=streamed", "optim.in_backward=previous_norm"]
    monkeypatch.setattr(module, "host_memory", lambda: (1 << 40, 1 << 40))
    expected = places[: places.index(place) + 1]
    changed = compose([*overrides, "train.activation_checkpoint=full", *expected])
    enough = int(forecast(changed, 1, machine).memory.peak.high / 0.98) + 1
    monkeypatch.setattr(module, "host_memory", lambda: (enough, enough))
    fix = cheapest_fix(config, 1, machine)
    assert fix is not None
    assert [override for override in fix.overrides if override in places] == expected
    assert fix.keeps_result == (place != "optim.in_backward=previous_norm")


@pytest.mark.slow
def test_weights_cannot_be_streamed_from_the_memory_that_they_go_to() -> None:
    with pytest.raises(ConfigError, match=r"offload\.weights=streamed"):
        trace_step(compose([*SMALL, "offload=cpu", "offload.weights=streamed"]), 1)
