"""What a step does, found by running the real model, optimizer and cut on tensors without storage.

torch's fake tensors go through the same dispatcher, autograd and FSDP2 as real ones, so the operations, their shapes
and the order in which memory is taken and given back are those of the run: no formula has to follow when the model, an
optimizer or torch changes. Nothing is allocated, whatever the size, and no other rank is needed.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from windlass.errors import ConfigError
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import COMM
from windlass.parallel.config import Sharding
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh
from windlass.parallel.random import CHUNK_ELEMENTS
from windlass.parallel.zero import Sharder
from windlass.train.config import ActivationCheckpoint, Borders
from windlass.train.data.loader import Batch
from windlass.train.layer_major import forward_loss_sums
from windlass.train.model import Llama, count_parameters

if TYPE_CHECKING:
    from windlass.conf.schema import Config
    from windlass.optim.in_backward import StepInBackward

_NAMESPACES_WITHOUT_WORK = frozenset({"prim", "profiler"})

MAX_MICRO_STEPS = 3
"""The first makes gradients, those between add to them, the last may reduce them: more are like the second."""
START_BYTES = 32 << 20
"""The largest piece that a process gives back before there is a model, at least: libraries and data are read."""
NORMALS_BYTES, NUM_NORMALS_PIECES = 4, 6
"""What an element of a chunk takes while first weights are drawn, as often (`windlass.parallel.random`)."""
NUM_STEPS = 3
"""The first makes the optimizer's state, the second finds it there, the third finds memory as the second left it."""


@dataclass(frozen=True)
class TensorSpec:
    """What a kernel's time depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Op:
    """One call of an operator; `args` and `kwargs` hold a `TensorSpec` for each tensor."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(hash=False)
    num_bytes: int
    """Of all tensors that go in and come out."""
    flops: int
    """Of matrix products and attention; 0 for others."""
    is_view: bool
    """Touches no element."""

    @property
    def can_replay(self) -> bool:
        """Collectives and FSDP2's own copies need ranks and buffers that are not in the arguments."""
        return self.name.startswith("aten.")

    @property
    def key(self) -> str:
        return f"{self.name} {self.args} {self.kwargs}" if self.can_replay else f"{self.name} {self.num_bytes}"


@dataclass(frozen=True)
class MemoryEvent:
    """Memory that is taken, or given back, in the order of the run."""

    block: int
    num_bytes: int
    is_free: bool


@dataclass
class Trace:
    """What one rank does and holds."""

    num_parameters: int = 0
    """Of the whole model."""
    weights_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    comm_bytes: int = 0
    """Logical bytes a step, as `comm/bytes` counts them."""
    ops: Counter[str] = field(default_factory=Counter)
    """Calls a step, by `Op.key`."""
    op_of: dict[str, Op] = field(default_factory=dict)
    memory: list[MemoryEvent] = field(default_factory=list)
    """From the start to the end of the last step."""


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
    dtype = getattr(torch, train.dtype.value)
    with mesh.device:
        model = Llama(config.model)
        ids = torch.zeros((train.batch_size, train.seq_len), dtype=torch.int64)
        batch = Batch(ids, ids.clone(), torch.zeros(ids.shape, dtype=torch.int32))
    trace.num_parameters = count_parameters(model)
    model.prepare(dtype, train.activation_checkpoint == ActivationCheckpoint.full, compile_blocks=False)
    sharder = Sharder(config.parallel, mesh)
    sharder.shard(model, model.units(), dtype)
    optimizer = config.optim.build(model)
    in_backward = config.optim.build_in_backward(optimizer, train.max_norm, mesh.shard_group)
    recorder = Recorder(trace)
    recorder.pass_by(START_BYTES)
    weights = [local_tensor(parameter) for parameter in model.parameters()]
    for weight in weights:
        recorder.take(weight)
        trace.weights_bytes += weight.nbytes
    for weight in weights:
        recorder.pass_by(*(NORMALS_BYTES * min(CHUNK_ELEMENTS, weight.numel()) for _ in range(NUM_NORMALS_PIECES)))
    with recorder:
        if train.mock_step:
            _step(config, mesh, model, sharder, optimizer, in_backward, batch, recorder)
            optimizer.state.clear()
        for recorder.step in range(1, NUM_STEPS + 1):
            trace.ops.clear()
            comm_bytes = COMM.total_bytes
            _step(config, mesh, model, sharder, optimizer, in_backward, batch, recorder)
            trace.comm_bytes = COMM.total_bytes - comm_bytes
    trace.optimizer_bytes = state_bytes(optimizer)
    return trace


def _step(
    config: Config,
    mesh: Mesh,
    model: Llama,
    sharder: Sharder,
    optimizer: torch.optim.Optimizer,
    in_backward: StepInBackward | None,
    batch: Batch,
    recorder: Recorder,
) -> None:
    """What `windlass.train.loop.train` computes in a step."""
    num_micro_steps = min(config.train.grad_accum_steps, MAX_MICRO_STEPS)
    for i in range(num_micro_steps):
        is_last = i == num_micro_steps - 1
        sharder.begin_micro_step(model, is_last)
        if in_backward is not None:
            in_backward.begin_micro_step(is_last)
        stands_for = config.train.grad_accum_steps - num_micro_steps + 1 if 0 < i < num_micro_steps - 1 else 1
        with recorder.repeated(stands_for):
            loss_sums = forward_loss_sums(model, [batch], config.data.borders == Borders.attention)
            torch.autograd.backward([loss_sum / batch.labels.numel() for loss_sum in loss_sums])
        del loss_sums
    recorder.trace.gradient_bytes = sum(
        local_tensor(parameter.grad).nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    if in_backward is None:
        clip_grad_norm_(model.parameters(), config.train.max_norm, mesh)
    else:
        in_backward.finish()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors on this rank."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local_tensor(value).nbytes for value in values if isinstance(value, torch.Tensor))


class Recorder(TorchDispatchMode):
    """Writes down operations, and when memory is taken and given back, while it is entered."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.step = 1
        """What a number that the host reads off a tensor is: of the optimizer, which counts steps in tensors."""
        self._blocks: dict[int, tuple[int, int]] = {}  # id of a storage that lives -> (block, bytes)
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._num_blocks = 0
        self._repeats = 1

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Counts each operation inside as `times` of them. What they take in memory is given back in between."""
        self._repeats = times
        yield
        self._repeats = 1

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._resize = torch.UntypedStorage.resize_
        recorder, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
            result = resize(storage, num_bytes)
            recorder._freed(id(storage))
            recorder._take_storage(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]  # FSDP2 frees gathered weights by it
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(self.step) if args[0].is_floating_point() else self.step
        result = func(*args, **kwargs)
        if func.namespace not in _NAMESPACES_WITHOUT_WORK:
            self._count(func, args, kwargs, result)
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.take(tensor)
        return result

    def take(self, tensor: torch.Tensor) -> None:
        """Counts the memory of `tensor`, unless another one has it already."""
        self._take_storage(tensor.untyped_storage())

    def pass_by(self, *pieces: int) -> None:
        """Counts pieces of memory, in bytes, that are taken and then all given back."""
        blocks = range(self._num_blocks, self._num_blocks + len(pieces))
        for is_free in (False, True):
            for block, num_bytes in zip(blocks, pieces, strict=True):
                self.trace.memory.append(MemoryEvent(block, num_bytes, is_free))
        self._num_blocks += len(pieces)

    def _take_storage(self, storage: torch.UntypedStorage) -> None:
        identity, num_bytes = id(storage), storage.nbytes()
        if identity in self._blocks or num_bytes == 0:
            return
        self._blocks[identity] = self._num_blocks, num_bytes
        self._references[identity] = weakref.ref(storage, lambda _: self._freed(identity))
        self.trace.memory.append(MemoryEvent(self._num_blocks, num_bytes, is_free=False))
        self._num_blocks += 1

    def _freed(self, identity: int) -> None:
        if identity not in self._blocks:
            return
        block, num_bytes = self._blocks.pop(identity)
        del self._references[identity]
        self.trace.memory.append(MemoryEvent(block, num_bytes, is_free=True))

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        returns = [value.alias_info for value in func._schema.returns]
        is_view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        formula = flop_registry.get(func.overloadpacket)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        op = Op(
            name=str(func),
            args=tree_map(_spec, args),
            kwargs=tree_map(_spec, kwargs),
            num_bytes=0 if is_view else sum({id(tensor): tensor.nbytes for tensor in tensors}.values()),
            flops=int(formula(*args, **kwargs, out_val=result)) if formula else 0,
            is_view=is_view,
        )
        key = op.key
        self.trace.op_of.setdefault(key, op)
        self.trace.ops[key] += self._repeats


def _spec(leaf: Any) -> Any:
    return TensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


@contextmanager
def _mesh_without_peers(config: Config, num_ranks: int) -> Iterator[Mesh]:
    """A mesh in which this process is rank 0 and the others do not exist: collectives return at once."""
    if dist.is_initialized():
        raise ConfigError(
            "plan", "...", "cannot be made in a process that is a rank of a run", "run `windlass plan` on its own"
        )
    num_replicas, num_shards = config.parallel.mesh_shape(num_ranks, num_ranks)
    device, group, device_mesh = torch.device("cpu"), None, None
    if num_ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
        group = dist.group.WORLD
        is_hybrid = config.parallel.name in (Sharding.ddp, Sharding.hsdp)
        shape, names = (
            ((num_replicas, num_shards), ("replicate", "shard")) if is_hybrid else ((num_shards,), ("shard",))
        )
        device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    try:
        yield Mesh(
            rank=0,
            local_rank=0,
            world_size=num_ranks,
            local_world_size=num_ranks,
            num_replicas=num_replicas,
            num_shards=num_shards,
            device=device,
            group=group,
            device_mesh=device_mesh,
        )
    finally:
        if num_ranks > 1:
            dist.destroy_process_group()
