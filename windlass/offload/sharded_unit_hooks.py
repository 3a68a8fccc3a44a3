"""Unit hooks for a model that FSDP2 has sharded: weights are needed when they are gathered.

The shards of a unit's weights are in memory while FSDP2 reads them into a collective, and not a moment longer; what it
gathers from them it keeps and frees by its own rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from windlass.offload.unit_hooks import UnitHooks
from windlass.parallel.autograd_shim import is_in_backward
from windlass.parallel.fsdp_shim import around_unshard


class ShardedUnitHooks(UnitHooks):
    """Hooks on a model that FSDP2 has sharded, unit by unit.

    Args: as `UnitHooks`.
    """

    def _attach(self, number: int, modules: Sequence[nn.Module]) -> None:
        @torch.compiler.disable
        def before_forward(*_: Any) -> None:
            self._before_forward(number)

        for module in modules:
            module.register_forward_pre_hook(before_forward, prepend=True)  # so before FSDP2's
        if self._units[number]:
            around_unshard(
                cast("FSDPModule", modules[0]), lambda: self._before_gather(number), lambda: self._let_go([number])
            )

    def _before_forward(self, number: int) -> None:
        if is_in_backward():  # a checkpoint computes it again
            return
        if self._optimizer.has_pending:
            self._acquire(number)  # once, for the update and for what FSDP2 reads after it
            self._optimizer.update(self._units[number])
        self._look_ahead(number, 1, with_rest=self._optimizer.has_pending)

    def _before_gather(self, number: int) -> None:
        self._acquire(number)
        if is_in_backward():
            self._look_ahead(number, -1, with_rest=not self._optimizer.is_deferring)
