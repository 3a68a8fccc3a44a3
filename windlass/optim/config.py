"""Which optimizer, and how its learning rate moves. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from windlass.errors import require
from windlass.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

OPTIMIZERS = Registry("optim")


class Schedule(StrEnum):
    """How the learning rate moves after warmup; see `windlass.optim.scheduler`."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class InBackward(StrEnum):
    """Whether the optimizer runs inside the backward pass, and how gradients are clipped then."""

    none = "none"
    """After it, as usual."""
    unclipped = "unclipped"
    previous_norm = "previous_norm"
    """By the norm of the step before."""


@dataclass
class OptimConfig:
    """What every optimizer has: a learning rate and its schedule, and weight decay."""

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    """Decoupled. Matrices decay; norms (and every other 1-D parameter) do not."""
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2
    """WSD: the share of `train.steps` at the end over which the rate falls."""
    min_lr_ratio: float = 0.1
    """The rate at the last step over the peak rate."""
    in_backward: InBackward = InBackward.none
    """Use and free gradients during the backward pass, so that never all of them are in memory."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "must be above 0 and finite", "set optim.lr=2e-3")
        for key in ("weight_decay", "warmup_steps"):
            value = getattr(self, key)
            require(value >= 0, f"optim.{key}", value, "must not be negative", f"set optim.{key}=0")
        for key in ("decay_fraction", "min_lr_ratio"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"optim.{key}", value, "must be in [0, 1]", f"set optim.{key}=0.1")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", OPTIMIZERS.build(self, model))


@dataclass
class AdamWConfig(OptimConfig):
    """Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019); torch's fused kernel."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)
        require(self.eps > 0, "optim.eps", self.eps, "must be above 0", "set optim.eps=1e-8")


class Granularity(StrEnum):
    """APOLLO: what shares one scaling factor."""

    channel = "channel"
    """Each row of a tall matrix, each column of a wide one."""
    tensor = "tensor"
    """The whole matrix (APOLLO-Mini)."""


@dataclass
class MatrixConfig(OptimConfig):
    """What optimizers of matrices have. Embeddings, the head and vectors get AdamW, at `adamw_lr`."""

    adamw_lr: float | None = None
    """Null is `lr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.adamw_lr
        rule = "must be above 0 and finite"
        require(rate is None or 0 < rate < math.inf, "optim.adamw_lr", rate, rule, "leave it out")


@dataclass
class LowRankConfig(MatrixConfig):
    """What optimizers of projected gradients have."""

    lr: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    rank: int | None = None
    """Null: 256 for models from 1B parameters, else a quarter of the width. Narrower matrices get AdamW."""
    update_interval: int = 200
    """Steps between projections."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)
        for key in ("eps", "scale"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"optim.{key}", value, "must be above 0", "leave it out")
        for key in ("rank", "update_interval"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"optim.{key}", value, "must be at least 1", "leave it out")


@dataclass
class ApolloConfig(LowRankConfig):
    """APOLLO: SGD-like Memory, AdamW-level Performance (2024); see `windlass.optim.Apollo`."""

    name: str = "apollo"
    granularity: Granularity = Granularity.channel


@dataclass
class GaLoreConfig(LowRankConfig):
    """GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (2024); see `windlass.optim.GaLore`."""

    name: str = "galore"
    scale: float = 0.25
    shard_projector: bool = False
    """Cut the projectors over the ranks as the rest of the state is, for an all-gather of them a step."""


@dataclass
class NaturalGaLoreConfig(GaLoreConfig):
    """Natural GaLore (2024): GaLore with natural gradients; see `windlass.optim.NaturalGaLore`."""

    name: str = "natural_galore"
    history: int = 20
    """Steps whose projected gradients estimate the Fisher information."""
    damping: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.history >= 1, "optim.history", self.history, "must be at least 1", "leave it out")
        require(0 < self.damping < math.inf, "optim.damping", self.damping, "must be above 0", "leave it out")


class LRAdjustment(StrEnum):
    """Muon: what the learning rate of an (a, b) matrix is multiplied by."""

    original = "original"
    """sqrt(max(1, a / b))."""
    match_rms_adamw = "match_rms_adamw"
    """0.2 sqrt(max(a, b)): updates are as large as AdamW's, so that one rate suits all parameters."""


@dataclass
class MuonConfig(MatrixConfig):
    """Muon: An optimizer for hidden layers in neural networks (Jordan, 2024); see `windlass.optim.Muon`."""

    name: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: LRAdjustment = LRAdjustment.match_rms_adamw

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be in [0, 1)", "set optim.momentum=0.95")
        require(1 <= self.ns_steps < 100, "optim.ns_steps", self.ns_steps, "must be in [1, 99]", "set optim.ns_steps=5")


@dataclass
class CosmosConfig(MatrixConfig):
    """COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs (2025); see `windlass.optim.Cosmos`.

    `betas` and `ratio` as the authors set them for language models.
    """

    name: str = "cosmos"
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    rank: int = 64
    gamma: float = 0.2
    """The weight of Muon's part."""
    ratio: float = 0.2
    """The root mean square of an update, over `lr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)
        for key in ("eps", "ratio"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"optim.{key}", value, "must be above 0 and finite", "leave it out")
        require(self.rank >= 1, "optim.rank", self.rank, "must be at least 1", "set optim.rank=64")
        require(0 <= self.gamma < math.inf, "optim.gamma", self.gamma, "must not be negative", "set optim.gamma=0.2")


@dataclass
class SGDSaIConfig(OptimConfig):
    """No More Adam: Learning Rate Scaling at Initialization is All You Need (2024); see `windlass.optim.SGDSaI`."""

    name: str = "sgd_sai"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    momentum: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be in [0, 1)", "set optim.momentum=0.9")
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "must be above 0 and finite", "set optim.eps=1e-8")


def checked_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Two decay rates of moments, as a tuple: OmegaConf gives tuples back as lists."""
    fix = "set optim.betas='[0.9,0.95]'"
    require(len(betas) == 2, "optim.betas", betas, "must be two numbers", fix)
    require(all(0 <= beta < 1 for beta in betas), "optim.betas", betas, "both must be in [0, 1)", fix)
    return float(betas[0]), float(betas[1])


OPTIMIZERS.add("adamw", AdamWConfig, "windlass.optim.adamw:build")
OPTIMIZERS.add("apollo", ApolloConfig, "windlass.optim.apollo:build")
OPTIMIZERS.add("apollo_mini", ApolloConfig, "windlass.optim.apollo:build")
OPTIMIZERS.add("galore", GaLoreConfig, "windlass.optim.galore:build")
OPTIMIZERS.add("natural_galore", NaturalGaLoreConfig, "windlass.optim.natural_galore:build")
OPTIMIZERS.add("muon", MuonConfig, "windlass.optim.muon:build")
OPTIMIZERS.add("cosmos", CosmosConfig, "windlass.optim.cosmos:build")
OPTIMIZERS.add("sgd_sai", SGDSaIConfig, "windlass.optim.sgd_sai:build")
