"""What a step does, found by running the real model, optimizer and cut on tensors without storage.

torch's fake tensors go through the same dispatcher, autograd and FSDP2 as real ones, so the operations, their shapes
and the order in which memory is taken and given back are those of the run: no formula has to follow when the model, an
optimizer or torch changes. Nothing is allocated, whatever the size, and no other rank is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from windlass.data.loader import Batch
from windlass.errors import ConfigError
from windlass.models.llama import Llama, count_parameters
from windlass.offload.config import OffloadKind, WeightsPlace
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import COMM
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh
from windlass.parallel.random import CHUNK_ELEMENTS
from windlass.parallel.zero import Sharder
from windlass.plan.offload import PlannedTiers
from windlass.plan.recorder import Recorder, Trace
from windlass.train.build import StepParts, build_optimizer, choose_device, modules_of_units
from windlass.train.config import ActivationCheckpoint, DType
from windlass.train.loss import forward_loss_sums

if TYPE_CHECKING:
    from windlass.conf.schema import Config

MAX_MICRO_STEPS = 3
"""The first makes gradients, those between add to them, the last may reduce them: more are like the second."""
START_BYTES = 32 << 20
"""The largest piece that a process gives back before there is a model, at least: libraries and data are read."""
NORMALS_BYTES, NUM_NORMALS_PIECES = 4, 6
"""What an element of a chunk takes while first weights are drawn, as often (`windlass.parallel.random`)."""
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
        parts, batch = _build(config, mesh, tiers, recorder), _batch(config)
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
                _step(parts, batch, recorder)
                trace.comm_bytes = COMM.total_bytes - comm_bytes
        trace.optimizer_bytes = state_bytes(parts.optimizer)
        trace.buffer_bytes = 0 if tiers is None else tiers.buffer_bytes
    finally:
        if tiers is not None:
            tiers.close()
    return trace


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
    """The parts of a run as `windlass.train.session` builds them, with weights that nobody has drawn."""
    train, trace = config.train, recorder.trace
    dtype = getattr(torch, train.dtype.value)
    with mesh.device:
        model = Llama(config.model)
    trace.num_parameters = count_parameters(model)
    recompute = train.activation_checkpoint in (ActivationCheckpoint.full, ActivationCheckpoint.auto)
    model.prepare(dtype, recompute, compile_blocks=False, alpha=train.activation_fraction)
    sharder = Sharder(config.parallel, mesh)
    sharder.shard(model, model.units(), dtype)
    trace.weights_bytes = sum(local_tensor(parameter).nbytes for parameter in model.parameters())
    weights = None if tiers is None else tiers.stream_weights(model, modules_of_units(model))
    with recorder:
        for parameters in _in_order(model):
            _materialize(parameters, recorder)
            if weights is not None:
                weights.add(parameters)
    optimizer = build_optimizer(config, model, tiers)
    buckets = optimizer.bucket_parameters() if isinstance(optimizer, OffloadedOptimizer) else ()
    in_backward = config.optim.build_in_backward(optimizer, train.max_norm, buckets)
    if tiers is not None:
        tiers.attend(model, modules_of_units(model), is_cut=mesh.device_mesh is not None)
    return StepParts(config, mesh, model, sharder, optimizer, in_backward, tiers)


def _in_order(model: Llama) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters unit by unit, last those of no unit: the order in which `Llama.materialize` fills them."""
    units = [[p for module in modules for p in module.parameters()] for modules in modules_of_units(model)]
    named = {parameter for unit in units for parameter in unit}
    yield from (*units, [parameter for parameter in model.parameters() if parameter not in named])


def _materialize(parameters: Sequence[torch.nn.Parameter], recorder: Recorder) -> None:
    """What first weights take of memory, while they are drawn and after."""
    weights = [local_tensor(parameter) for parameter in parameters]
    for weight in weights:
        recorder.take(weight)
    for weight in weights:
        recorder.pass_by(*(NORMALS_BYTES * min(CHUNK_ELEMENTS, weight.numel()) for _ in range(NUM_NORMALS_PIECES)))


def _batch(config: Config) -> Batch:
    ids = torch.zeros((config.train.batch_size, config.train.seq_len), dtype=torch.int64)
    return Batch(ids, ids.clone(), torch.zeros(ids.shape, dtype=torch.int32))


def _mock_step(parts: StepParts, batch: Batch, recorder: Recorder) -> None:
    """What `windlass.train.mock_step` computes, but for the places of state that is elsewhere."""
    if parts.tiers is None:
        _step(parts, batch, recorder)
        parts.optimizer.state.clear()
        return
    with nullcontext() if parts.in_backward is None else parts.in_backward.discarding():
        _passes(parts, batch, recorder)
    parts.optimizer.zero_grad(set_to_none=True)


def _step(parts: StepParts, batch: Batch, recorder: Recorder) -> None:
    """What `windlass.train.loop.train` computes in a step."""
    _passes(parts, batch, recorder)
    recorder.trace.gradient_bytes = sum(
        local_tensor(parameter.grad).nbytes for parameter in parts.model.parameters() if parameter.grad is not None
    )
    if parts.in_backward is None:
        clip_grad_norm_(parts.model.parameters(), parts.config.train.max_norm, parts.mesh)
    else:
        parts.in_backward.finish()
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)


def _passes(parts: StepParts, batch: Batch, recorder: Recorder) -> None:
    """Forward and backward of a step's micro-batches."""
    num_micro_steps = parts.config.train.grad_accum_steps
    num_traced = num_micro_steps if parts.is_layer_major else min(num_micro_steps, MAX_MICRO_STEPS)
    passes = parts.passes([batch] * num_traced)
    for i, batches in enumerate(passes):
        is_last = i == len(passes) - 1
        parts.sharder.begin_micro_step(parts.model, is_last)
        if parts.in_backward is not None:
            parts.in_backward.begin_micro_step(is_last)
        stands_for = num_micro_steps - num_traced + 1 if 0 < i < len(passes) - 1 else 1
        with recorder.repeated(stands_for):
            loss_sums = forward_loss_sums(parts.model, batches, parts.mask_documents)
            torch.autograd.backward([loss_sum / batch.labels.numel() for loss_sum in loss_sums])
        del loss_sums


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
