"""The axes that ranks are laid out along, and how the model is sharded over them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from windlass.bounds import bounded, check_bounds
from windlass.errors import ConfigError, require
from windlass.registry import OTHERS, Registry, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.distributed import Store

    from windlass.parallel.mesh import Mesh

ENGINES = Registry("parallel")


class Axis(StrEnum):
    """The axes that a mesh of ranks may have (docs/design/axes.md)."""

    replicate = "replicate"
    """Each of its ranks holds the whole of what the others hold."""
    shard = "shard"
    """FSDP2 gathers weights along it, and scatters gradients."""
    tensor = "tensor"
    """Its ranks have the same samples, and each computes with a part of the matrices."""


DATA_AXES = (Axis.replicate, Axis.shard)
"""Ranks that differ along these have samples of their own. All others share theirs."""


class Cut(StrEnum):
    """The dim along which a matrix is sharded; see `windlass.parallel.zero.placement`."""

    longer_dim = "longer_dim"
    dim0 = "dim0"


class Sharding(StrEnum):
    """Names what is sharded over ranks (ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020)."""

    none = "none"
    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    hsdp = "hsdp"


@dataclass
class ParallelConfig:
    name: Sharding = Sharding.zero3
    cut: Cut = Cut.longer_dim
    num_replicas: int | None = bounded(None, at_least=1, fix="leave it null for one replica a node")
    """hsdp: groups that each hold the whole model; null is one a node."""
    timeout_s: float = bounded(300.0, above=0)
    """A collective that waits longer fails."""

    def __post_init__(self) -> None:
        check_bounds(self, "parallel")
        require(
            self.num_replicas is None or self.name == Sharding.hsdp,
            "parallel.num_replicas",
            self.num_replicas,
            f"is a setting of parallel=hsdp, not of parallel={self.name}",
            "leave it out, or choose parallel=hsdp",
        )

    def mesh_axes(self, world_size: int, local_world_size: int) -> dict[Axis, int]:
        """The number of ranks along each axis of `world_size` ranks, the outermost axis first.

        Raises:
            ConfigError: the layout does not divide the world size.
        """
        if self.name == Sharding.none and world_size > 1:
            raise ConfigError(
                "parallel",
                "none",
                f"trains on one rank, and {world_size} were started",
                "choose parallel=ddp, zero1, zero2, zero3 or hsdp, or set launch.nproc_per_node=1",
            )
        if self.name == Sharding.ddp:
            return {Axis.replicate: world_size, Axis.shard: 1}
        if self.name != Sharding.hsdp:
            return {Axis.shard: world_size}
        num_replicas = self.num_replicas
        if num_replicas is None:
            num_replicas = max(1, world_size // local_world_size)
        if world_size % num_replicas:
            raise ConfigError(
                "parallel.num_replicas",
                num_replicas,
                f"must divide the number of ranks, {world_size}",
                f"choose one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}",
            )
        return {Axis.replicate: num_replicas, Axis.shard: world_size // num_replicas}

    def build(self, device: torch.device, connect: Callable[[float], Store] | None = None) -> Mesh:
        """The mesh of this run's ranks; without torchrun's environment, a mesh of one rank.

        Args:
            connect: see `Mesh.start`.
        """
        return cast("Mesh", resolve("windlass.parallel.mesh:Mesh.start")(self, device, connect))


ENGINES.add(OTHERS, ParallelConfig, "windlass.parallel.fsdp2:FSDP2Engine")
