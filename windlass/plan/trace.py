"""Traces a step by running the real model, optimizer and cut on tensors without storage.

torch's fake tensors go through the same dispatcher, autograd and FSDP2 as real ones, so the operations, their shapes
and the order in which memory is taken and given back are those of the run: no formula has to follow when the model, an
optimizer or torch changes. Nothing is allocated, whatever the size, and no other rank is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from windlass.data.batch import Batch
from windlass.errors import ConfigError
from windlass.models.spec import Model, count_parameters
from windlass.offload.config import OffloadKind, WeightsPlace
from windlass.offload.unit_hooks import parameters_by_unit
from windlass.offload.weights import Weights
from windlass.parallel.collectives import COMM
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.fragment import local_tensor
from windlass.parallel.fsdp2 import FSDP2Engine
from windlass.parallel.mesh import Mesh
from windlass.parallel.random import CHUNK_ELEMENTS
from windlass.plan.offload import PlannedTiers
from windlass.plan.recorder import Recorder, Trace
from windlass.train.build import StepParts, build_parts, choose_device
from windlass.train.config import DType
from windlass.train.step import Around, forward_backward, made_up_batch, run_step

if TYPE_CHECKING:
    from windlass.conf.schema import Config

MAX_MICRO_STEPS = 3
"""The first makes gradients, those between add to them, the last may reduce them: more are like the second."""
START_BYTES = 32 << 20
"""The largest piece that a process gives back before there is a model, at least: libraries and data are read."""
NORMALS_BYTES, NUM_NORMALS_PIECES = 4, 6
"""The bytes that an element of a chunk takes while first weights are drawn, as often (`windlass.parallel.random`)."""
NUM_STEPS = 3
"""The first makes the optimizer's state, the second finds it there, the third finds memory as the second left it."""


def trace_step(config: Config, num_ranks: int) -> Trace:
    """Traces the first steps of rank 0 of `num_ranks`, on tensors of a CPU.

    Args:
        config: with a `model.vocab_size`.

    Raises:
        ConfigError: such a run could not be built.
    """
    with _mesh_without_peers(config, num_ranks) as mesh, FakeTensorMode(), warnings.catch_warnings():
        # Optimizers look where state lies in memory; of fake tensors that is 0, which is aligned, and torch warns.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        return _trace(config, mesh)


def _trace(config: Config, mesh: Mesh) -> Trace:
    train, trace = config.train, Trace()
    recorder = Recorder(trace)
    recorder.pass_by(START_BYTES)
    tiers = _tiers(config, recorder)
    try:
        parts = _build(config, mesh, tiers, recorder)
        batch = made_up_batch(parts.objective, train.batch_size, train.seq_len)
        with recorder:
            if train.mock_step:
                _mock_step(parts, batch, recorder)
            if tiers is not None:
                tiers.reserve()
            for recorder.step in range(1, NUM_STEPS + 1):
                trace.ops.clear()
                trace.timeline.clear()
                trace.fresh_bytes = 0
                comm_bytes = COMM.total_bytes
                run_step(parts, *_traced(parts, batch), around=_standing_for_others(parts, recorder))
                trace.comm_bytes = COMM.total_bytes - comm_bytes
        trace.optimizer_bytes = state_bytes(parts.optimizer)
        trace.buffer_bytes = 0 if tiers is None else tiers.buffer_bytes
    finally:
        if tiers is not None:
            tiers.close()
    return trace


class _TracedEngine(FSDP2Engine):
    """The engine of the run, where no gradient has a value."""

    def __init__(self, config: Config, mesh: Mesh, trace: Trace) -> None:
        super().__init__(config.parallel, mesh, config.train.max_norm)
        self._trace = trace

    def grad_norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self._trace.gradient_bytes = sum(local_tensor(gradient).nbytes for gradient in gradients)
        return super().grad_norm()

    def all_ranks_finite(self, grad_norm: torch.Tensor) -> bool:
        return True


def _tiers(config: Config, recorder: Recorder) -> PlannedTiers | None:
    if config.offload.name == OffloadKind.none:
        return None
    computes_in_bfloat16 = config.train.dtype == DType.bfloat16
    if config.offload.name == OffloadKind.cpu and config.offload.weights == WeightsPlace.streamed:
        device = choose_device(config.train.device)
        if device.type == "cpu":  # says why there is no such run
            config.offload.build(Path(config.run_dir), 0, device, computes_in_bfloat16=False, is_checkpointed=False)
    return PlannedTiers(config.offload, recorder, computes_in_bfloat16=computes_in_bfloat16)


def _build(config: Config, mesh: Mesh, tiers: PlannedTiers | None, recorder: Recorder) -> StepParts:
    """The parts of a run, with weights that nobody has drawn."""
    trace = recorder.trace

    def give_weights(model: Model, weights: Weights | None) -> None:
        trace.num_parameters = count_parameters(model)
        trace.weights_bytes = sum(local_tensor(parameter).nbytes for parameter in model.parameters())
        with recorder:
            for parameters in _in_order(model):
                _materialize(parameters, recorder)
                if weights is not None:
                    weights.add(parameters)

    as_traced = replace(config, train=replace(config.train, compile=False))
    engine = _TracedEngine(config, mesh, trace)
    return build_parts(as_traced, mesh, tiers, engine=engine, device=mesh.device.type, give_weights=give_weights)


def _in_order(model: Model) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters unit by unit, last those of no unit: the order in which `Model.materialize` fills them."""
    yield from parameters_by_unit(model, [unit.modules for unit in model.units()])


def _materialize(parameters: Sequence[torch.nn.Parameter], recorder: Recorder) -> None:
    """Records the memory of first weights, while they are drawn and after."""
    weights = [local_tensor(parameter) for parameter in parameters]
    for weight in weights:
        recorder.take(weight)
    for weight in weights:
        recorder.pass_by(*(NORMALS_BYTES * min(CHUNK_ELEMENTS, weight.numel()) for _ in range(NUM_NORMALS_PIECES)))


def _mock_step(parts: StepParts, batch: Batch, recorder: Recorder) -> None:
    """Runs what `windlass.train.mock_step` computes, but for the places of state that is elsewhere."""
    traced, around = _traced(parts, batch), _standing_for_others(parts, recorder)
    if parts.tiers is None:
        run_step(parts, *traced, around=around)
        parts.optimizer.state.clear()
        return
    in_backward = parts.engine.in_backward
    with nullcontext() if in_backward is None else in_backward.discarding():
        forward_backward(parts, *traced, around=around)
    parts.engine.zero_grad()


def _traced(parts: StepParts, batch: Batch) -> tuple[list[Batch], Callable[[], int]]:
    """The micro-batches of a step that are traced, and what the loss is divided by."""
    num_micro_steps = parts.config.train.grad_accum_steps
    num_traced = num_micro_steps if parts.is_fused else min(num_micro_steps, MAX_MICRO_STEPS)
    return [batch] * num_traced, batch.labels.numel


def _standing_for_others(parts: StepParts, recorder: Recorder) -> Around:
    """The passes in the middle, of which one is traced, stand for all of them."""
    num_left_out = max(0, parts.config.train.grad_accum_steps - MAX_MICRO_STEPS)

    def around(number: int, num_passes: int) -> AbstractContextManager[None]:
        return recorder.repeated(num_left_out + 1 if 0 < number < num_passes - 1 else 1)

    return around


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors on this rank."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local_tensor(value).nbytes for value in values if isinstance(value, torch.Tensor))


@contextmanager
def _mesh_without_peers(config: Config, num_ranks: int) -> Iterator[Mesh]:
    """A mesh in which this process is rank 0 and the others do not exist: collectives return at once."""
    if dist.is_initialized():
        raise ConfigError(
            "plan", "...", "cannot be made in a process that is a rank of a run", "run `windlass plan` on its own"
        )
    if num_ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        ranks = RankEnvironment(0, num_ranks, 0, num_ranks)
        yield Mesh.lay_out(ranks, config.parallel.mesh_axes(num_ranks, num_ranks), torch.device("cpu"))
    finally:
        if num_ranks > 1:
            dist.destroy_process_group()
