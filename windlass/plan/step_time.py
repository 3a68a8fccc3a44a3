"""Times a step: the calls of a trace, each timed once on this machine at its own shapes.

Kernels are far from any one bandwidth or FLOP rate: what a product of 64 columns, a transposed copy or a fresh page
costs is measured and not assumed. A call is timed on tensors made for it, cut where they would be large, and the figure
is kept (`windlass.machine.speeds`), so that the next plan only looks it up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from windlass.machine.speeds import Machine
from windlass.plan.disk import DiskSpeed, DiskUse, play
from windlass.plan.recorder import MMAP_THRESHOLD_MAX, Calls, Op, TensorSpec, Trace

MAX_REPLAY_BYTES = 96 << 20
"""Tensors of a call are cut to about this much: what is larger than any cache costs in proportion."""
MAX_REPLAY_FLOPS = 2e9
"""The most operations of a product that is timed; its dims stay at 256 or more, where the rate hardly changes."""
MIN_PRODUCT_DIM = 256
COLD_BYTES = 64 << 20
"""Calls take turns with as many copies of their arguments as together do not stay in a cache."""
MAX_COPIES = 32
MIN_REPEATS, MAX_REPEATS = 4, 100
REPEATS_BUDGET_S = 0.15
FRESH_BYTES = 64 << 20
"""The size of a piece that no C library keeps for the next one to ask."""


TIME_SPREAD = 0.15
"""The error of a step's time, as a share of it."""
STALL_SHARE = 0.05
"""A step that waits for longer than this share of its time is bound by the disk."""


@dataclass(frozen=True)
class Range:
    """A forecast, and between what it is expected to come out."""

    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and of what it is made."""

    step: Range
    kernels_s: float
    overhead_s: float
    """Seconds of calling them: Python, autograd, the dispatcher."""
    comm_s: float
    disk_s: float = 0.0
    """The seconds that the disk works, most of it beside the above."""
    stall_s: float = 0.0
    """The part of these that the step waits for."""
    disk_cpu_s: float = 0.0
    """Processor time of transfers and their checksums, which a step that uses all cores is longer by."""
    pages_s: float = 0.0
    """Seconds for memory that is taken from the system anew, beyond what the kernels' own times have in them."""
    moving_s: float = 0.0
    """The part of kernels and calls that updates, brings and takes back what is elsewhere; the same for any batch."""

    @property
    def bottleneck(self) -> str:
        """The means with more of which the step would be shorter."""
        return "disk" if self.stall_s > STALL_SHARE * self.step.expected else "compute"


def step_time(trace: Trace, machine: Machine, threads: int, disk: DiskSpeed | None = None) -> StepTime:
    """The time of a step on this machine; measures, and puts into `machine`, calls that it has not seen yet.

    Args:
        disk: a rank's share of it; not needed where a step moves nothing.
    """
    assert machine.op_overhead_s is not None and machine.gloo_bytes_per_s is not None, "see plan_measure"
    with _threads(threads):
        call_s = {key: _call_s(trace.op_of[key], machine, threads) for key in trace.ops}
        fresh_bytes = trace.fresh_bytes
        fresh_bytes += sum(count * _fresh_bytes_left_out(trace.op_of[key]) for key, count in trace.ops.items())
        pages = fresh_bytes * _fresh_s_per_byte(machine, threads) if fresh_bytes else 0.0
    kernels = sum(count * call_s[key] for key, count in trace.ops.items())
    overhead = trace.ops.total() * machine.op_overhead_s
    comm = trace.comm_bytes / machine.gloo_bytes_per_s
    cost = {key: seconds + machine.op_overhead_s for key, seconds in call_s.items()}
    moving = sum(
        event.times * cost[event.key] for event in trace.timeline if isinstance(event, Calls) and event.is_moving
    )
    use = DiskUse() if disk is None else play(trace.timeline, cost, disk)
    expected = kernels + overhead + comm + use.stall_s + use.cpu_s + pages
    return StepTime(
        Range(expected, (1 - TIME_SPREAD) * expected, (1 + TIME_SPREAD) * expected),
        kernels,
        overhead,
        comm,
        use.busy_s,
        use.stall_s,
        use.cpu_s,
        pages,
        moving,
    )


def _call_s(op: Op, machine: Machine, threads: int) -> float:
    if op.is_view or op.num_bytes == 0 or op.only_takes:
        return 0.0
    makes_much = op.num_bytes > MAX_REPLAY_BYTES and not _bytes((op.args, op.kwargs))
    if not op.can_replay or makes_much:
        assert machine.memcpy_bytes_per_s is not None
        return op.num_bytes / machine.memcpy_bytes_per_s
    kept = f"{threads} {op.key}"
    if kept not in machine.op_s:
        machine.op_s[kept] = measure(op)
    return machine.op_s[kept]


def _fresh_s_per_byte(machine: Machine, threads: int) -> float:
    """The extra cost of writing to memory that the system has just given."""
    kept = f"{threads} fresh pages"
    if kept not in machine.op_s:
        used = torch.ones(FRESH_BYTES, dtype=torch.uint8)
        fresh_s = _typical_s(lambda: torch.empty(FRESH_BYTES, dtype=torch.uint8).fill_(1))
        machine.op_s[kept] = max(0.0, fresh_s - _typical_s(lambda: used.fill_(1))) / FRESH_BYTES
    return machine.op_s[kept]


def _fresh_bytes_left_out(op: Op) -> int:
    """The bytes that `op` makes, if it is a product, or attention, that takes them from the system anew and is timed on
    smaller tensors, for whose result a heap has room."""
    made = op.num_bytes - _bytes((op.args, op.kwargs))
    return made if op.flops > MAX_REPLAY_FLOPS and made >= MMAP_THRESHOLD_MAX else 0


def measure(op: Op) -> float:
    """Seconds of one call of `op`."""
    args, kwargs, share = _cut(op)
    bound = _index_bound((args, kwargs))
    copies = min(MAX_COPIES, 1 + COLD_BYTES // max(1, _bytes((args, kwargs))))
    made = itertools.cycle([tree_map(lambda leaf: _made(leaf, bound), (args, kwargs)) for _ in range(copies)])
    function: Any = torch.ops
    for part in op.name.split("."):
        function = getattr(function, part)

    def call() -> None:
        args, kwargs = next(made)
        function(*args, **kwargs)

    return _typical_s(call) / share


def _typical_s(call: Callable[[], Any]) -> float:
    """The median of a few calls. The fastest would be what no step is made of: a machine whose cores are shared is
    slower most of the time, by a tenth where it was tried."""
    call()
    seconds: list[float] = []
    deadline = time.perf_counter() + REPEATS_BUDGET_S
    while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and time.perf_counter() < deadline):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cut(op: Op) -> tuple[Any, Any, float]:
    """Arguments no larger than they need be, and which share of the work they are."""
    if "attention" in op.name:  # quadratic in the sequence, so only the batch may shrink
        args, kwargs = tree_map(_first_of_batch, (op.args, op.kwargs))
        return args, kwargs, _bytes((args, kwargs)) / _bytes((op.args, op.kwargs))
    if op.flops:
        return _cut_product(op)
    args, kwargs = op.args, op.kwargs
    whole = _bytes((args, kwargs))
    if not whole:
        return args, kwargs, 1.0
    while (size := _bytes((args, kwargs))) > MAX_REPLAY_BYTES:
        dims = [dim for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TensorSpec) for dim in leaf.shape]
        longest = max(dims)
        shorter = max(1, int(longest * max(0.25, MAX_REPLAY_BYTES / size)))
        args, kwargs = tree_map(
            lambda leaf, longest=longest, shorter=shorter: _shortened(leaf, longest, shorter), (args, kwargs)
        )
    return args, kwargs, _bytes((args, kwargs)) / whole


def _cut_product(op: Op) -> tuple[Any, Any, float]:
    """A product of two matrices or batches of them, smaller in its longest dims."""
    left, right = op.args[-2:]
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    batch = left.shape[:-2]
    whole, dims = 2 * math.prod(batch) * rows * inner * columns, [rows, inner, columns]
    if batch:
        batch = (min(batch[0], max(1, int(batch[0] * MAX_REPLAY_FLOPS / whole))),)
    while 2 * math.prod(batch) * math.prod(dims) > MAX_REPLAY_FLOPS and max(dims) > MIN_PRODUCT_DIM:
        longest = dims.index(max(dims))
        dims[longest] = max(MIN_PRODUCT_DIM, dims[longest] // 2)
    operands = _with_shape(left, (*batch, *dims[:2])), _with_shape(right, (*batch, *dims[1:]))
    share = 2 * math.prod(batch) * math.prod(dims) / whole
    # What is added has the product's shape, or is a bias of its columns.
    added = [_with_shape(leaf, (dims[0], dims[2])[-len(leaf.shape) :]) for leaf in op.args[:-2]]
    return (*added, *operands), op.kwargs, share


def _first_of_batch(leaf: Any) -> Any:
    return _with_shape(leaf, (1, *leaf.shape[1:])) if isinstance(leaf, TensorSpec) and leaf.shape else leaf


def _shortened(leaf: Any, longest: int, shorter: int) -> Any:
    """`leaf` with each dim of `longest` elements, or a size that is written down, `shorter`."""
    if isinstance(leaf, TensorSpec):
        return _with_shape(leaf, tuple(shorter if dim == longest else dim for dim in leaf.shape))
    return shorter if leaf == longest and isinstance(leaf, int) and leaf > 1 else leaf


def _with_shape(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """A spec of another shape whose dims lie in memory in the same order; dims of stride 0 stay so."""
    stride, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (spec.stride[dim], -dim)):
        if spec.stride[dim] or spec.shape[dim] == 1:
            stride[dim] = step
            step *= shape[dim]
    return TensorSpec(shape, tuple(stride), spec.dtype)


def _bytes(tree: Any) -> int:
    return sum(leaf.num_bytes for leaf in tree_leaves(tree) if isinstance(leaf, TensorSpec))


def _index_bound(tree: Any) -> int:
    """The bound below which integers are valid rows, columns or classes of the matrices that they go with."""
    specs = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, TensorSpec)]
    dims = [dim for spec in specs if spec.dtype.is_floating_point and len(spec.shape) == 2 for dim in spec.shape]
    counts = [leaf for leaf in tree_leaves(tree) if type(leaf) is int and leaf > 1]
    return max(1, min(dims or counts or [1]))


def _made(leaf: Any, bound: int) -> Any:
    """A tensor as `leaf` says, of ones or of indexes below `bound`."""
    if not isinstance(leaf, TensorSpec):
        return leaf
    if leaf.dtype == torch.bool:
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype).fill_(0)  # little to find
    if leaf.dtype.is_floating_point:
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype).fill_(1)
    extent = 1 + sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride, strict=True))
    numbers = torch.arange(max(0, extent)).remainder_(bound).to(leaf.dtype)
    return numbers.as_strided(leaf.shape, leaf.stride)  # also where a dim has stride 0, as positions have
