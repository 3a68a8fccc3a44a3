"""The settings of offloading: which state lies outside of the device's memory, and where. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.bounds import bounded, check_bounds
from windlass.errors import ConfigError, require
from windlass.registry import resolve

if TYPE_CHECKING:
    import torch

    from windlass.offload.tiers import Tiers

MIB = 1 << 20
BUFFER_BYTES = 464 * MIB
"""Host memory for what is on its way between the disk and its use. With a bucket's temporaries it is below 512 MB; the
more, the earlier the state of a large tensor begins to come."""


class OffloadKind(StrEnum):
    none = "none"
    cpu = "cpu"
    """In host memory."""
    ssd = "ssd"
    """On a disk, but for what `max_host_bytes` leaves room for."""


class WeightsPlace(StrEnum):
    """The places of weights between their passes."""

    memory = "memory"
    """On the device, as without offloading."""
    streamed = "streamed"
    """In the tier; a layer's come for its passes and go."""


@dataclass
class OffloadConfig:
    """Optimizer state goes to the tier with `cpu` and `ssd`; weights and activations do if their keys say so."""

    name: OffloadKind = OffloadKind.none
    dir: str | None = None
    """`ssd`: a folder on a local disk, best a fast one; null is `offload/` in the run folder. Several runs may share
    it: each rank has a folder of its own there, which it removes at its end."""
    max_device_bytes: int = bounded(0, at_least=0, fix="set it to 0")
    """Optimizer state that stays on the device; for GPUs."""
    max_host_bytes: int | None = bounded(None, at_least=0)
    """`ssd`: host memory for state that would else be on the disk; null is none."""
    buffer_bytes: int = bounded(BUFFER_BYTES, at_least=MIB)
    """Host memory of a rank for what is on its way to and from the disk; more if the largest tensors need it."""
    weights: WeightsPlace = WeightsPlace.memory
    max_activation_bytes: int | None = bounded(None, at_least=0)
    """`ssd`: of what the forward pass saves for backward, so much stays in memory and the rest goes to the disk; null
    keeps all."""
    num_threads: int = bounded(8, at_least=1)
    """Transfers that a rank has under way: the depth of the disk's queue."""

    def __post_init__(self) -> None:
        check_bounds(self, "offload")
        for key in ("dir", "max_host_bytes", "max_activation_bytes"):
            value = getattr(self, key)
            require(
                value is None or self.name == OffloadKind.ssd,
                f"offload.{key}",
                value,
                f"is a setting of offload=ssd, not of offload={self.name}",
                "leave it out, or choose offload=ssd",
            )
        require(
            self.weights == WeightsPlace.memory or self.name != OffloadKind.none,
            "offload.weights",
            self.weights.value,
            "needs a tier to stream from, and offload=none has none",
            "choose offload=ssd or offload=cpu",
        )

    def folder(self, run_dir: Path) -> Path | None:
        """The folder below which ranks put their files; None if nothing goes to a disk."""
        if self.name != OffloadKind.ssd:
            return None
        return run_dir / "offload" if self.dir is None else Path(self.dir)

    def build(
        self, run_dir: Path, rank: int, device: torch.device, *, computes_in_bfloat16: bool, is_checkpointed: bool
    ) -> Tiers | None:
        """The tiers of a rank; None where nothing is offloaded.

        Raises:
            ConfigError: weights are to be streamed from host memory to a device that is the host.
            OffloadError: the folder cannot be used.
        """
        if self.name == OffloadKind.none:
            return None
        if self.name == OffloadKind.cpu and self.weights == WeightsPlace.streamed and device.type == "cpu":
            raise ConfigError(
                "offload.weights",
                "streamed",
                "with offload=cpu on a CPU would take memory for weights twice: the device's memory is the host's",
                "choose offload=ssd, or offload.weights=memory",
            )
        return resolve("windlass.offload.tiers:Tiers")(
            self,
            self.folder(run_dir),
            rank,
            device,
            computes_in_bfloat16=computes_in_bfloat16,
            is_checkpointed=is_checkpointed,
        )
