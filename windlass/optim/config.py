"""Which optimizer, and how its learning rate moves. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from windlass.bounds import bounded, check_bounds
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
    """The ways to run the optimizer inside the backward pass, and to clip gradients then."""

    none = "none"
    """After it, as usual."""
    unclipped = "unclipped"
    previous_norm = "previous_norm"
    """By the norm of the step before."""


@dataclass
class OptimConfig:
    """The settings of every optimizer: a learning rate and its schedule, and weight decay."""

    name: str = "adamw"
    lr: float = bounded(2e-3, above=0, below=math.inf)
    weight_decay: float = bounded(0.1, at_least=0)
    """Decoupled. Matrices decay; norms (and every other 1-D parameter) do not."""
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = bounded(20, at_least=0)
    decay_fraction: float = bounded(0.2, at_least=0, at_most=1)
    """WSD: the share of `train.steps` at the end over which the rate falls."""
    min_lr_ratio: float = bounded(0.1, at_least=0, at_most=1)
    """The rate at the last step over the peak rate."""
    in_backward: InBackward = InBackward.none
    """Use and free gradients during the backward pass, so that never all of them are in memory."""

    def __post_init__(self) -> None:
        check_bounds(self, "optim")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", OPTIMIZERS.build(self, model))


@dataclass
class AdamWConfig(OptimConfig):
    """Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019); torch's fused kernel."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = bounded(1e-8, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)


class Granularity(StrEnum):
    """APOLLO: what shares one scaling factor."""

    channel = "channel"
    """Each row of a tall matrix, each column of a wide one."""
    tensor = "tensor"
    """The whole matrix (APOLLO-Mini)."""


@dataclass
class MatrixConfig(OptimConfig):
    """The settings of optimizers of matrices. Embeddings, the head and vectors get AdamW, at `adamw_lr`."""

    adamw_lr: float | None = bounded(None, above=0, below=math.inf)
    """Null is `lr`."""


@dataclass
class LowRankConfig(MatrixConfig):
    """The settings of optimizers of projected gradients."""

    lr: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = bounded(1e-6, above=0, below=math.inf)
    rank: int | None = bounded(None, at_least=1)
    """Null: 256 for models from 1B parameters, else a quarter of the width. Narrower matrices get AdamW."""
    update_interval: int = bounded(200, at_least=1)
    """Steps between projections."""
    scale: float = bounded(1.0, above=0, below=math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)


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
    history: int = bounded(20, at_least=1)
    """Steps whose projected gradients estimate the Fisher information."""
    damping: float = bounded(1e-3, above=0, below=math.inf)


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
    momentum: float = bounded(0.95, at_least=0, below=1)
    nesterov: bool = True
    ns_steps: int = bounded(5, at_least=1, at_most=99)
    adjust_lr_fn: LRAdjustment = LRAdjustment.match_rms_adamw


@dataclass
class CosmosConfig(MatrixConfig):
    """COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs (2025); see `windlass.optim.Cosmos`.

    `betas` and `ratio` as the authors set them for language models.
    """

    name: str = "cosmos"
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = bounded(1e-8, above=0, below=math.inf)
    rank: int = bounded(64, at_least=1)
    gamma: float = bounded(0.2, at_least=0, below=math.inf)
    """The weight of Muon's part."""
    ratio: float = bounded(0.2, above=0, below=math.inf)
    """The root mean square of an update, over `lr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)


@dataclass
class SGDSaIConfig(OptimConfig):
    """No More Adam: Learning Rate Scaling at Initialization is All You Need (2024); see `windlass.optim.SGDSaI`."""

    name: str = "sgd_sai"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    momentum: float = bounded(0.9, at_least=0, below=1)
    eps: float = bounded(1e-8, above=0, below=math.inf)


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
