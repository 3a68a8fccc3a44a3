"""The tiers of a rank: its folder on the disk, its buffers in host memory, and all that uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from windlass.offload.activations import ActivationOffload
from windlass.offload.arena import Arena
from windlass.offload.config import OffloadConfig, WeightsPlace
from windlass.offload.conveyor import Conveyor
from windlass.offload.direct_io import Engine
from windlass.offload.malloc import free_to_system, give_back_free_memory
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.sharded_unit_hooks import ShardedUnitHooks
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFile, TierFolder
from windlass.offload.unit_hooks import UnshardedUnitHooks, parameters_by_unit
from windlass.offload.weights import Weights, most_bytes

STREAMED_MIN_BYTES = 8 << 20
"""Streamed weights of this size leave the process when they go; what is smaller is soon needed for the next ones."""


@dataclass(frozen=True)
class OffloadFigures:
    """The costs of offloading so far."""

    stall_s: float = 0.0
    """Seconds that training has waited for transfers."""
    read_bytes: int = 0
    write_bytes: int = 0

    def since(self, before: OffloadFigures) -> OffloadFigures:
        return OffloadFigures(
            self.stall_s - before.stall_s, self.read_bytes - before.read_bytes, self.write_bytes - before.write_bytes
        )


class Tiers:
    """Args:
    folder: below which the rank's files go; None keeps everything in host memory.
    computes_in_bfloat16: streamed weights are kept in halves then (`windlass.offload.split_bf16`).
    is_checkpointed: checkpoints will pin files while steps write others.
    """

    def __init__(
        self,
        config: OffloadConfig,
        folder: Path | None,
        rank: int,
        device: torch.device,
        *,
        computes_in_bfloat16: bool,
        is_checkpointed: bool,
    ) -> None:
        self.config, self.device = config, device
        self._num_versions = 2 if is_checkpointed else 1
        self.engine = Engine(config.num_threads)
        self.folder = None if folder is None else TierFolder(folder, self.engine, f"rank{rank}")
        self._host_bytes_left = config.max_host_bytes
        if folder is not None and self._host_bytes_left is None:
            self._host_bytes_left = 0
        self._in_halves = computes_in_bfloat16
        self.weights: Weights | None = None
        self.activations: ActivationOffload | None = None
        if config.max_activation_bytes is not None:
            self.limit_activations(config.max_activation_bytes)
        self.optimizer: OffloadedOptimizer | None = None
        self.give_back_free_memory: Callable[[], None] = give_back_free_memory

    def _arena(self, num_bytes: int) -> Arena:
        return Arena(num_bytes, pin=self.device.type == "cuda")

    @property
    def activation_buffer_bytes(self) -> int:
        """Host memory that moving activations takes, once it is asked for."""
        return self.config.buffer_bytes // 3

    def limit_activations(self, num_bytes: int) -> None:
        """Moves what autograd saves beyond `num_bytes` from now on. To be called once at most."""
        assert self.activations is None
        self.activations = ActivationOffload(
            self.device, num_bytes, self._arena(self.activation_buffer_bytes), self.folder
        )

    def _make_home(self, num_bytes: int) -> TierFile | Tensor:
        """In host memory as long as there is room, then on the disk."""
        left = self._host_bytes_left
        if self.folder is None or (left is not None and num_bytes <= left):
            self._host_bytes_left = None if left is None else left - num_bytes
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self.folder.create(num_bytes)

    def stream_weights(self, model: nn.Module, units: Sequence[Sequence[nn.Module]]) -> Weights | None:
        """Makes the tier for the weights of the model, which may be on the meta device yet; None if they stay.

        They are to be added by unit, those of no unit together.
        """
        if self.config.weights == WeightsPlace.streamed:
            num_bytes = max(self.config.buffer_bytes // 3, most_bytes(parameters_by_unit(model, units)))
            if self.device.type == "cpu":
                free_to_system(STREAMED_MIN_BYTES)
            conveyor = Conveyor(self._arena(num_bytes), Staging(self.device))
            self.weights = Weights(conveyor, self._make_home, self._in_halves)
        return self.weights

    def take_optimizer(
        self, optimizer: torch.optim.Optimizer, units: Sequence[Sequence[nn.Module]], in_backward: bool
    ) -> OffloadedOptimizer:
        """Takes the optimizer's state.

        Args:
            units: modules that run together, in the order of the forward pass.
            in_backward: the optimizer steps in the backward pass. Else a layer's update is made before its next
                forward, so that state is read and written while the passes run.
        """
        self.optimizer = OffloadedOptimizer(
            optimizer,
            self.folder,
            max_device_bytes=self.config.max_device_bytes,
            max_host_bytes=self._host_bytes_left,
            num_versions=self._num_versions,
            buffer_bytes=self.config.buffer_bytes // (1 if self.weights is None else 2),
            order=[
                [parameter for module in unit for parameter in module.parameters()]
                for unit in (reversed(units) if in_backward else units)
            ],
            weights=self.weights,
        )
        self.optimizer.is_deferring = not in_backward
        self.optimizer.give_back_free_memory = self.give_back_free_memory
        return self.optimizer

    def attend(self, model: nn.Module, units: Sequence[Sequence[nn.Module]], is_cut: bool) -> None:
        """Brings what the passes of the model's units need, and takes it back after them.

        To be called after an optimizer in the backward pass was given its hooks: it needs the weights before they go.

        Args:
            is_cut: by FSDP2.
        """
        assert self.optimizer is not None
        hooks = ShardedUnitHooks if is_cut else UnshardedUnitHooks
        hooks(model, units, self.optimizer, self.weights)
        if self.weights is not None:
            self.give_back_free_memory()  # all weights have been drawn in it, a unit at a time

    def offloaded(self) -> AbstractContextManager[None]:
        """Lets autograd's saved tensors move while it lasts."""
        return contextlib.nullcontext() if self.activations is None else self.activations.offloaded()

    @property
    def figures(self) -> OffloadFigures:
        users = (self.optimizer, self.weights, None if self.activations is None else self.activations.figures)
        return OffloadFigures(
            stall_s=sum(user.stall_s for user in users if user is not None),
            read_bytes=self.engine.figures.read_bytes,
            write_bytes=self.engine.figures.write_bytes,
        )

    def close(self) -> None:
        """Waits for what is under way and gives everything back; nothing of the run is to be used any more."""
        for user in (self.optimizer, self.weights, self.activations):
            if user is not None:
                user.close()
        if self.folder is not None:
            self.folder.close()
        self.engine.close()
