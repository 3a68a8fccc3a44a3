"""Plans: what they say, what they call fitting, what they keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from windlass.cli import main
from windlass.conf.compose import compose
from windlass.data.prepare import vocab_size_of
from windlass.errors import ConfigError
from windlass.machine.speeds import (
    Machine,
    load_machine,
    machine_file,
    machine_key,
    process_kind,
    save_machine,
    ssd_key,
)
from windlass.plan import forecast as module
from windlass.plan.fixes import cheapest_fix
from windlass.plan.forecast import Plan, forecast
from windlass.plan.recorder import Op, TensorSpec
from windlass.plan.step_time import MAX_REPLAY_FLOPS, _cut, measure, step_time
from windlass.plan.trace import trace_step
from windlass.train.build import resolve_vocabulary

SMALL = ["model.vocab_size=256", "model.num_layers=2", "train.batch_size=4", "train.seq_len=128"]
SMALL += ["parallel=none", "checkpoint=none", "train.mock_step=false"]
PROCESS_BYTES = 300 << 20
OP_S: dict[str, float] = {}
"""What tests have timed: a kernel once for all of them."""
MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """This machine, as if it had been measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = Machine(machine_key(), op_s=OP_S)
    machine.process_bytes = {process_kind(1, "float32"): PROCESS_BYTES, process_kind(2, "float32"): PROCESS_BYTES}
    machine.op_overhead_s, machine.gloo_bytes_per_s, machine.memcpy_bytes_per_s = 1e-5, 1e9, 1e10
    machine.matmul_flops = {"float32": 1e11, "bfloat16": 1e11}
    machine.ssd[ssd_key(tmp_path)] = {
        "read_bytes_per_s": 1e9,
        "write_bytes_per_s": 1e9,
        "cpu_s_per_byte": 0.0,
        "is_direct": True,
    }
    return machine


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(module, "host_memory", lambda: (num_bytes, num_bytes))


@pytest.mark.slow
def test_parts_add_up_and_ranges_hold_what_is_expected(machine: Machine) -> None:
    plan = forecast(compose(SMALL), 1, machine)
    memory = plan.memory
    assert memory.persistent.host == memory.weights + memory.optimizer
    parts = memory.persistent.host + memory.activations + memory.allocator + memory.process
    assert parts == memory.peak.expected
    assert memory.peak.low < memory.peak.expected < memory.peak.high
    time = plan.time
    assert time.kernels_s + time.overhead_s + time.comm_s == pytest.approx(time.step.expected)
    assert plan.tokens_per_s == pytest.approx(4 * 128 / time.step.expected)


@pytest.mark.slow
def test_kernels_are_timed_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.op_s = {}
    first = forecast(compose(SMALL), 1, machine)
    monkeypatch.setattr("windlass.plan.step_time.measure", lambda op: pytest.fail(f"{op.name} was measured again"))
    assert forecast(compose(SMALL), 1, machine).time == first.time


@pytest.mark.slow
def test_a_product_that_is_cut_is_priced_whole() -> None:
    config = compose([*SMALL, "train.batch_size=1", "model.vocab_size=65536"])
    trace = trace_step(config, 1)
    seconds = {op.flops: measure(op) for op in trace.op_of.values() if op.flops}
    largest, smallest = max(seconds), min(seconds)
    assert largest > 50 * smallest
    assert seconds[largest] > 5 * seconds[smallest]


def test_a_product_with_a_bias_is_cut_with_it() -> None:
    layouts = (((4096,), (1,)), ((2048, 512), (512, 1)), ((512, 4096), (1, 512)))  # bias, inputs, weight transposed
    specs = tuple(TensorSpec(shape, stride, torch.float32) for shape, stride in layouts)
    op = Op("aten.addmm.default", specs, {}, 0, 2 * 2048 * 512 * 4096, is_view=False)
    (added, left, right), _, share = _cut(op)
    assert 0 < share < 1 and left.shape[1] == right.shape[0]
    assert added.shape == (right.shape[1],) and added.stride == (1,)


@pytest.mark.slow
def test_what_a_cut_product_takes_anew_is_counted(machine: Machine) -> None:
    """The hidden layers of 256 tokens are 64 MiB, taken anew each time; the product that is timed is smaller."""
    config = compose([*SMALL, "train.batch_size=2", "model.vocab_size=256", "model.intermediate_size=65536"])
    trace = trace_step(config, 1)
    time = step_time(trace, machine, 1)
    products = [op for op in trace.op_of.values() if op.flops and op.args[-1].shape == (192, 65536)]
    assert products and all(op.flops > MAX_REPLAY_FLOPS for op in products)
    num_large = sum(trace.ops[op.key] for op in trace.op_of.values() if op.flops > MAX_REPLAY_FLOPS)
    assert 0 < time.pages_s <= num_large * (64 << 20) * machine.op_s["1 fresh pages"]
    assert time.pages_s >= (64 << 20) * machine.op_s["1 fresh pages"]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "fits", "is_close"), [(1.2, True, False), (0.99, False, True), (0.5, False, False)])
def test_only_the_upper_end_of_the_range_fits(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, share: float, fits: bool, is_close: bool
) -> None:
    with_free(monkeypatch, 1 << 40)
    high = forecast(compose(SMALL), 1, machine).memory.peak.high
    with_free(monkeypatch, int(share * high / 0.98))
    plan = forecast(compose(SMALL), 1, machine)
    assert (plan.fits, plan.is_close) == (fits, is_close)


@pytest.mark.slow
def test_checkpoints_in_memory_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1 << 40)
    plan = forecast(compose(SMALL), 1, machine)
    with_free(monkeypatch, int((plan.memory.peak.high + 2 * plan.memory.persistent.host) / 0.98))
    assert forecast(compose(SMALL), 1, machine).fits
    assert not forecast(compose([*SMALL, "checkpoint=erasure"]), 1, machine).fits


@pytest.mark.slow
@pytest.mark.full
def test_the_fix_that_costs_least_is_proposed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*SMALL, "train.batch_size=8", "train.seq_len=256", "model.vocab_size=8192"])
    with_free(monkeypatch, 1 << 40)
    fitting = forecast(
        compose([*SMALL, "train.batch_size=2", "train.seq_len=256", "model.vocab_size=8192"]), 1, machine
    )
    with_free(monkeypatch, int(1.2 * fitting.memory.peak.high))
    assert not forecast(config, 1, machine).fits
    fix = cheapest_fix(config, 1, machine)
    assert fix is not None and fix.keeps_result
    fixed = forecast(compose([*SMALL, "train.seq_len=256", "model.vocab_size=8192", *fix.overrides]), 1, machine)
    assert fixed.fits
    assert fixed.time.step.expected == pytest.approx(fix.step_s)


@pytest.mark.slow
@pytest.mark.full
def test_nothing_helps_where_not_even_the_process_fits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, PROCESS_BYTES)
    assert cheapest_fix(compose([*SMALL, "train.batch_size=1", "train.seq_len=16"]), 1, machine) is None


@pytest.mark.slow
def test_what_is_assumed_is_said(machine: Machine) -> None:
    def reasons(*overrides: str) -> str:
        plan: Plan = forecast(compose([*SMALL, *overrides]), 1, machine)
        return " ".join(plan.reasons)

    assert "assumed" not in reasons()
    assert "assumed: a CPU computes" in reasons("train.device=cuda")
    assert "train.compile=false" in reasons("train.compile=true")


def test_the_vocabulary_is_that_of_the_tokenizer() -> None:
    config = compose(["model=tiny"])
    assert config.model.vocab_size is None
    resolve_vocabulary(config, vocab_size_of(config.data))
    assert config.model.vocab_size == 320
    with pytest.raises(ConfigError, match=r"data\.path"):
        vocab_size_of(compose(["data=tokens", "data.path=''"]).data)


def test_figures_are_kept_by_machine(machine: Machine) -> None:
    save_machine(machine)
    save_machine(Machine("another", op_overhead_s=1.0))
    assert load_machine() == machine
    kept = json.loads(machine_file().read_text())
    machine_file().write_text(json.dumps(kept | {"format": -1}))
    assert load_machine() == Machine(machine_key())
    machine_file().write_text("{")
    assert load_machine() == Machine(machine_key())


def test_a_user_without_a_home_measures_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", raise_no_home)
    machine = Machine(machine_key(), op_overhead_s=1.0)
    save_machine(machine)
    assert load_machine() == Machine(machine_key())
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    save_machine(machine)
    assert load_machine() == Machine(machine_key())


def raise_no_home(_: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.slow
def test_the_command(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_free(monkeypatch, 1 << 40)
    save_machine(machine)
    arguments = ["plan", f"run_dir={machine_file().parent}/run", *SMALL]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True and document["fix"] is None
    assert document["memory"]["weights"] == 4 * document["num_parameters"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{document['num_parameters']:,} parameters, 1 rank: fits\n")
    assert "kept between steps" in text
    assert not (machine_file().parent / "run").exists()
    assert main([*arguments, "--ranks", "0"]) == 2
    assert "--ranks=0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_product_into_a_buffer_is_timed_with_a_buffer_of_its_size() -> None:
    trace = trace_step(compose([*SMALL, "train.batch_size=2", "model.vocab_size=65536"]), 1)
    products = [op for op in trace.op_of.values() if op.flops > MAX_REPLAY_FLOPS and "out" in op.kwargs]
    assert products, "the logits of a chunk go into the buffer of all chunks"
    for op in products:
        (*_, left, right), kwargs, share = _cut(op)
        assert share < 1 and kwargs["out"].shape == (left.shape[0], right.shape[1])
