"""Writes down what a step does: its operators, the memory that is taken and given back, and what goes over the disk.

The step is made on torch's fake tensors, so there is nothing to see but the calls: a dispatch mode sees each of them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

_NAMESPACES_WITHOUT_WORK = frozenset({"prim", "profiler"})
MMAP_THRESHOLD_MAX = 32 << 20
"""From which size on glibc takes every piece from the system anew, whatever was given back before."""
_COPIED_BY_GLOO = frozenset({"c10d._allgather_base_", "c10d._reduce_scatter_base_"})
"""Collectives of gloo that copy the longer one of their two tensors; the others work in place. Measured."""
_SELDOM = 1 << 16
"""A step finds one element in so many where it looks for some: 16-bit rests that are ties (`offload.split_bf16`)."""


@dataclass(frozen=True)
class TensorSpec:
    """The facts of a tensor that a kernel's time depends on."""

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
    """The size of all tensors that go in and come out."""
    flops: int
    """Operations of matrix products and attention; 0 for others."""
    is_view: bool
    """Touches no element."""

    @property
    def can_replay(self) -> bool:
        """Collectives and FSDP2's own copies need ranks and buffers that are not in the arguments."""
        return self.name.startswith("aten.")

    @property
    def only_takes(self) -> bool:
        """Takes memory, and leaves its pages to whoever writes to it first."""
        return self.name.startswith(("aten.empty", "aten.new_empty"))

    @property
    def key(self) -> str:
        return f"{self.name} {self.args} {self.kwargs}" if self.can_replay else f"{self.name} {self.num_bytes}"


class MemoryKind(Enum):
    """The kinds of what happens to memory."""

    take = "take"
    free = "free"
    map = "map"
    """Pages of a mapping of its own, which no heap has a part in, are used and stay so."""
    trim = "trim"
    """All free pages of the heap go back to the system: `windlass.offload.malloc.give_back_free_memory`."""


@dataclass(frozen=True)
class MemoryEvent:
    """In the order of the run. A trim has no block."""

    kind: MemoryKind
    block: int = -1
    num_bytes: int = 0


@dataclass(frozen=True)
class Calls:
    """An operator is called, so many times in a row."""

    key: str
    times: int
    is_moving: bool
    """To bring, update or take back what is elsewhere: takes as long however many tokens a step has."""


@dataclass(frozen=True)
class DiskTransfer:
    """Begins to be read or written."""

    number: int
    num_bytes: int
    is_write: bool


@dataclass(frozen=True)
class DiskWait:
    """The step waits for the end of a transfer."""

    number: int


@dataclass
class Trace:
    """The record of what one rank does and holds."""

    num_parameters: int = 0
    """The parameters of the whole model."""
    weights_bytes: int = 0
    """The size of all weights, wherever they are between steps."""
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    """The size of all of the optimizer's state, wherever it is."""
    disk_weights_bytes: int = 0
    disk_optimizer_bytes: int = 0
    """The part of the two that is on the disk between steps."""
    disk_file_bytes: int = 0
    """The room that its files take."""
    buffer_bytes: int = 0
    """The host memory for what is on its way, as much as steps touch."""
    comm_bytes: int = 0
    """Logical bytes a step, as `comm/bytes` counts them."""
    ops: Counter[str] = field(default_factory=Counter)
    """Calls a step, by `Op.key`."""
    op_of: dict[str, Op] = field(default_factory=dict)
    timeline: list[Calls | DiskTransfer | DiskWait] = field(default_factory=list)
    """The calls and transfers of the last step, in order."""
    memory: list[MemoryEvent] = field(default_factory=list)
    """From the start to the end of the last step."""
    fresh_bytes: int = 0
    """The memory that a step takes from the system anew where `mmap_threshold` is set, and that is in no timed call."""
    mmap_threshold: int | None = None
    """From which size on memory is given back to the system, where that is set."""

    @property
    def transfers(self) -> list[DiskTransfer]:
        """The disk's transfers in the last step."""
        return [event for event in self.timeline if isinstance(event, DiskTransfer)]


class Recorder(TorchDispatchMode):
    """Writes down operations, and when memory is taken and given back, while it is entered."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.step = 1
        """The number that the host reads off a tensor: an optimizer counts steps in tensors."""
        self._blocks: dict[int, tuple[int, int]] = {}  # id of a storage that lives -> (block, bytes)
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._num_blocks = 0
        self._repeats = 1
        self._mappings: dict[int, torch.UntypedStorage] = {}  # by id
        self.is_moving: Callable[[], bool] = lambda: False
        """True if what is called now brings, updates or takes back what is elsewhere."""
        self._num_transfers = 0
        self._is_paused = False

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
            recorder._take_storage(storage, is_timed=False)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]  # FSDP2 frees gathered weights by it
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(self.step) if args[0].is_floating_point() else self.step
        result = _found(func, args)
        if result is None:
            result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        is_shape = bool(tensors) and all(tensor.device.type == "meta" for tensor in tensors)
        if func.namespace not in _NAMESPACES_WITHOUT_WORK and not is_shape:
            op = self._count(func, args, kwargs, result)
            for tensor in tensors:
                self._take_storage(tensor.untyped_storage(), is_timed=not op.only_takes)
        if str(func.overloadpacket) in _COPIED_BY_GLOO:
            self.pass_by(max(tensor.nbytes for tensor in args[:2]))
        return result

    def take(self, tensor: torch.Tensor) -> None:
        """Counts the memory of `tensor`, unless another one has it already."""
        self._take_storage(tensor.untyped_storage(), is_timed=False)

    def map(self, num_bytes: int) -> torch.Tensor:
        """Bytes of a mapping of its own, which take no memory until `touch` says that they are used."""
        self._is_paused = True
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self._is_paused = False
        storage = data.untyped_storage()
        self._mappings[id(storage)] = storage
        return data

    def touch(self, num_bytes: int) -> None:
        """Counts pages of a mapping that are used for the first time, and stay."""
        self.trace.memory.append(MemoryEvent(MemoryKind.map, self._num_blocks, num_bytes))
        self._num_blocks += 1

    def trim(self) -> None:
        """Writes down that the heap's free pages go back to the system."""
        self.trace.memory.append(MemoryEvent(MemoryKind.trim))

    def transfer(self, num_bytes: int, *, is_write: bool) -> int:
        """Writes down that a transfer begins; returns its number."""
        self.trace.timeline.append(DiskTransfer(self._num_transfers, num_bytes, is_write))
        self._num_transfers += 1
        return self._num_transfers - 1

    def wait(self, number: int) -> None:
        """Writes down that the step waits for a transfer."""
        self.trace.timeline.append(DiskWait(number))

    def pass_by(self, *pieces: int) -> None:
        """Counts pieces of memory, in bytes, that are taken and then all given back."""
        blocks = range(self._num_blocks, self._num_blocks + len(pieces))
        for kind in (MemoryKind.take, MemoryKind.free):
            for block, num_bytes in zip(blocks, pieces, strict=True):
                self.trace.memory.append(MemoryEvent(kind, block, num_bytes))
        self._num_blocks += len(pieces)

    def _take_storage(self, storage: torch.UntypedStorage, is_timed: bool) -> None:
        """`is_timed`: by an operator whose timed calls take such a piece, too, with the process's usual threshold."""
        identity, num_bytes = id(storage), storage.nbytes()
        if identity in self._blocks or identity in self._mappings or num_bytes == 0:
            return
        self._blocks[identity] = self._num_blocks, num_bytes
        self._references[identity] = weakref.ref(storage, lambda _: self._freed(identity))
        self.trace.memory.append(MemoryEvent(MemoryKind.take, self._num_blocks, num_bytes))
        self._num_blocks += 1
        threshold = self.trace.mmap_threshold
        if threshold is not None and num_bytes >= threshold and not (is_timed and num_bytes >= MMAP_THRESHOLD_MAX):
            self.trace.fresh_bytes += self._repeats * num_bytes

    def _freed(self, identity: int) -> None:
        if identity not in self._blocks:
            return
        block, num_bytes = self._blocks.pop(identity)
        del self._references[identity]
        self.trace.memory.append(MemoryEvent(MemoryKind.free, block, num_bytes))

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Op:
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
        self.trace.timeline.append(Calls(key, self._repeats, self.is_moving()))
        return op


def _found(func: Any, args: Any) -> torch.Tensor | None:
    """The result of an operator that is as long as there is something to find; None for all others."""
    if func is torch.ops.aten.nonzero.default:
        return args[0].new_empty((args[0].numel() // _SELDOM, args[0].ndim), dtype=torch.int64)
    if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
        return args[0].new_empty((args[1][0].numel() // 2, *args[0].shape[args[1][0].ndim :]))
    return None


def _spec(leaf: Any) -> Any:
    return TensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
