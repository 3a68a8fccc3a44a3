"""ZeRO stages, data parallelism and hybrid sharding, all on FSDP2.

| `parallel=` | weights between forward and backward | gradients | bytes a micro-step of M, in B (N-1)/N |
| --- | --- | --- | --- |
| `zero3`, `hsdp` | cut again | cut, reduced each micro-step | 2 AG + RS each |
| `zero2` | whole | cut, reduced each micro-step | AG + RS each |
| `zero1` | whole until the last micro-step | whole, reduced once | AG + RS once |
| `ddp` | whole, on every rank | whole, reduced once | one all-reduce |

B is the model's size in the dtype of the collective, N the ranks. A unit that is the last of the forward and so the
first of the backward pass stays whole in `zero3` too: gathering it twice would move the same bytes for nothing.
ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020. FSDP2: torch's `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from windlass.parallel.config import Axis, Cut, ParallelConfig, Sharding
from windlass.parallel.fragment import local_tensor
from windlass.parallel.fsdp_shim import count_collectives
from windlass.parallel.mesh import Mesh


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are gathered and freed together."""

    modules: Sequence[nn.Module]
    is_last: bool = False
    """The last to run forward, so the first to run backward."""


class Sharder:
    """Cuts a model over a mesh and steers its collectives through gradient accumulation."""

    def __init__(self, config: ParallelConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh

    def shard(self, model: nn.Module, units: Sequence[Unit], dtype: torch.dtype) -> None:
        """Cuts `model` in place; it may be on the meta device. Nothing is done for a mesh of one rank.

        Weights are kept, and gradients reduced, in their own dtype (float32); forward and backward run in `dtype`.
        """
        if self.mesh.device_mesh is None:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the model casts where it computes
        )
        frees_weights = self.config.name in (Sharding.zero3, Sharding.hsdp)
        for unit in (*units, Unit([model], is_last=True)):
            fully_shard(
                list(unit.modules) if len(unit.modules) > 1 else unit.modules[0],
                mesh=self.mesh.fsdp_mesh,
                reshard_after_forward=frees_weights and not unit.is_last,
                shard_placement_fn=self._placement,
                mp_policy=policy,
            )
        for module in _fsdp_modules(model):
            # The loss is divided by the global token count, so gradients are summed and never averaged. On gloo
            # a divide factor would also select an operation that it does not have (PREMUL_SUM).
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            count_collectives(module, self.mesh.size(Axis.replicate))

    def _placement(self, parameter: nn.Parameter) -> Shard:
        return placement(local_tensor(parameter), self.config.cut, self.mesh.size(Axis.shard))

    def begin_micro_step(self, model: nn.Module, is_last: bool) -> None:
        """To be called before each forward pass of a step; `is_last`: of its micro-steps."""
        if self.mesh.device_mesh is None:
            return
        root = cast("FSDPModule", model)
        if self.config.name in (Sharding.zero1, Sharding.ddp):
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)
        elif self.config.name == Sharding.hsdp:
            root.set_requires_all_reduce(is_last)

    def free_gathered(self, model: nn.Module) -> None:
        """Frees weights that a forward pass without a backward one (an evaluation) left gathered."""
        for module in _fsdp_modules(model):
            module.reshard()


def placement(parameter: torch.Tensor, cut: Cut, num_shards: int) -> Shard:
    """Which dim of a parameter is cut: the longer one, so that what low-rank optimizers contract stays whole.

    FSDP2 cuts dims other than 0 only evenly; a longer dim that does not divide falls back to dim 0.
    """
    if cut == Cut.dim0 or parameter.ndim < 2:
        return Shard(0)
    longer = max(range(parameter.ndim), key=lambda dim: parameter.shape[dim])  # the first of equals
    return Shard(longer if parameter.shape[longer] % num_shards == 0 else 0)


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
