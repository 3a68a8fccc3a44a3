"""What a trace says is what a run does: compared with real models, optimizers and dispatchers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.errors import ConfigError
from windlass.models.llama import Llama
from windlass.parallel.fsdp2 import FSDP2Engine
from windlass.plan.memory import live_peak
from windlass.plan.recorder import MMAP_THRESHOLD_MAX, MemoryKind, Recorder, Trace
from windlass.plan.trace import NUM_STEPS, state_bytes, trace_step
from windlass.train.build import build_parts
from windlass.train.step import made_up_batch, run_step

SMALL = ("model.vocab_size=256", "model.num_layers=2", "train.batch_size=2", "train.seq_len=32", "parallel=none")


class RealCalls(TorchDispatchMode):
    """Counts the operators that real tensors go through."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "aten":
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of(trace: Trace) -> Counter[str]:
    calls: Counter[str] = Counter()
    for key, count in trace.ops.items():
        if trace.op_of[key].name.startswith("aten."):
            calls[trace.op_of[key].name] += count
    return calls


class Unasked(FSDP2Engine):
    """Takes gradients to be finite, as the trace must."""

    def all_ranks_finite(self, grad_norm: torch.Tensor) -> bool:
        return True


def real_step(config: Config) -> tuple[Counter[str], int]:
    """The operators of the second step of a real model, and the bytes of its optimizer's state."""
    mesh = config.parallel.build(torch.device("cpu"))
    parts = build_parts(config, mesh, None, engine=Unasked(config.parallel, mesh, config.train.max_norm))
    batch = made_up_batch(parts.objective, config.train.batch_size, config.train.seq_len)
    for _ in range(NUM_STEPS):
        with RealCalls() as recorder:
            run_step(parts, [batch] * config.train.grad_accum_steps, batch.labels.numel)
    return recorder.calls, state_bytes(parts.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("optim=adamw",), marks=pytest.mark.full),
        ("optim=adamw", "train.dtype=bfloat16", "train.grad_accum_steps=5"),
        pytest.param(("optim=adamw", "train.activation_checkpoint=full"), marks=pytest.mark.full),
        ("optim=apollo", "optim.rank=16"),
        pytest.param(("optim=muon", "train.grad_accum_steps=3"), marks=pytest.mark.full),
    ],
)
def test_the_operators_and_the_state_are_those_of_a_real_step(overrides: tuple[str, ...]) -> None:
    config = compose([*SMALL, *overrides])
    trace = trace_step(config, 1)
    calls, optimizer_bytes = real_step(config)
    # What the host reads, the trace answers; a detached tensor is a view, of which fake tensors need more.
    ignored = {"aten._local_scalar_dense.default", "aten.detach.default"}
    traced = calls_of(trace)
    for name in ignored:
        del calls[name], traced[name]
    # Which labels count is looked for where there are any: once a loss.
    lookup = ("aten.ne.Scalar", "aten.nonzero.default", "aten.select.int")
    assert calls == traced + Counter(dict.fromkeys(lookup, config.train.grad_accum_steps))
    assert trace.optimizer_bytes == optimizer_bytes


@pytest.mark.slow
def test_bytes_of_weights_and_gradients() -> None:
    config = compose(list(SMALL))
    trace = trace_step(config, 1)
    parameters = sum(parameter.numel() for parameter in Llama(config.model).parameters())
    assert trace.num_parameters == parameters
    assert trace.weights_bytes == trace.gradient_bytes == 4 * parameters
    assert trace.comm_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero3", "zero2", "ddp"])
def test_a_cut_model_without_the_other_ranks(parallel: str) -> None:
    config = compose([*SMALL[:-1], f"parallel={parallel}"])
    trace = trace_step(config, 2)
    whole = 4 * trace.num_parameters
    assert trace.weights_bytes == (whole if parallel == "ddp" else whole // 2)
    # docs/sharding.md: B (N-1)/N for a gather or a scatter; the root and the last unit are gathered once.
    full = {"zero3": 3, "zero2": 2, "ddp": 2}[parallel] * whole // 2
    assert 0.6 * full < trace.comm_bytes <= 1.01 * full
    assert not dist.is_initialized()


@pytest.mark.slow
def test_everything_but_what_lasts_is_given_back() -> None:
    trace = trace_step(compose(list(SMALL)), 1)
    alive: dict[int, int] = {}
    for event in trace.memory:
        if event.kind == MemoryKind.free:
            assert alive.pop(event.block) == event.num_bytes
        else:
            alive[event.block] = event.num_bytes
    assert trace.weights_bytes + trace.optimizer_bytes <= live_peak(trace.memory)


def test_memory_that_comes_from_the_system_anew_is_counted_unless_a_timed_call_has_it() -> None:
    piece = 1 << 20
    trace = Trace(mmap_threshold=piece)
    with FakeTensorMode(), Recorder(trace):
        torch.empty(piece - 1, dtype=torch.uint8)
        assert trace.fresh_bytes == 0
        held = torch.empty(piece, dtype=torch.uint8)
        assert trace.fresh_bytes == piece
        held + 1  # timed in a process that reuses pieces of this size
        assert trace.fresh_bytes == 2 * piece
        large = torch.empty(MMAP_THRESHOLD_MAX, dtype=torch.uint8)
        expected = 2 * piece + MMAP_THRESHOLD_MAX
        assert trace.fresh_bytes == expected
        large + 1  # timed in a process that does not
        assert trace.fresh_bytes == expected
        held.untyped_storage().resize_(0)
        held.untyped_storage().resize_(piece)
        assert trace.fresh_bytes == expected + piece


@pytest.mark.slow
@pytest.mark.full
def test_activation_checkpoints_and_smaller_batches_take_less() -> None:
    more = ["model.num_layers=8", "train.seq_len=128", "train.batch_size=8"]
    peaks = [
        live_peak(trace_step(compose([*SMALL, *more, *overrides]), 1).memory)
        for overrides in ([], ["train.activation_checkpoint=full"], ["train.batch_size=2"])
    ]
    assert peaks[1] < 0.6 * peaks[0]
    assert peaks[2] < 0.5 * peaks[0]


@pytest.mark.full
@pytest.mark.slow
def test_a_billion_parameters_take_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    trace = trace_step(compose(["model=llama_1b", "parallel=none", "train.mock_step=false"]), 1)
    assert trace.weights_bytes > 4e9
    assert psutil.Process().memory_info().rss - before < 0.3e9


def test_not_inside_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="run `windlass plan` on its own"):
        trace_step(compose(list(SMALL)), 1)
