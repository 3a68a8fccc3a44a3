"""Which optimizer, and how its learning rate moves. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from windlass.errors import ConfigError, require

if TYPE_CHECKING:
    import torch
    from torch import nn

    from windlass.optim.in_backward import StepInBackward
    from windlass.optim.scheduler import WarmupScheduler


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
        raise NotImplementedError(f"{type(self).__name__} does not say which optimizer it builds")

    def build_in_backward(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        buckets: Sequence[Sequence[torch.Tensor]] = (),
    ) -> StepInBackward | None:
        """Hooks that run `optimizer` in the backward pass, if that is configured.

        Args:
            buckets: parameters that are best updated together.

        Raises:
            ConfigError: gradients cannot be clipped as `max_norm` says.
        """
        if self.in_backward == InBackward.none:
            return None
        require(
            max_norm is None or self.in_backward == InBackward.previous_norm,
            "train.max_norm",
            max_norm,
            "cannot be kept with optim.in_backward=unclipped, which uses gradients before their norm is known",
            "set train.max_norm=null, or optim.in_backward=previous_norm to clip by the norm of the step before",
        )
        require(
            max_norm is not None or self.in_backward == InBackward.unclipped,
            "optim.in_backward",
            self.in_backward.value,
            "needs train.max_norm",
            "set train.max_norm=1.0, or optim.in_backward=unclipped",
        )
        from windlass.optim.in_backward import StepInBackward

        return StepInBackward(optimizer, self.in_backward, max_norm, buckets=buckets)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> WarmupScheduler:
        from windlass.optim.scheduler import WarmupScheduler

        return WarmupScheduler(
            optimizer,
            schedule=self.schedule,
            num_steps=num_steps,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            min_lr_ratio=self.min_lr_ratio,
        )


@dataclass
class AdamWConfig(OptimConfig):
    """Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019); torch's fused kernel."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = checked_betas(self.betas)
        require(self.eps > 0, "optim.eps", self.eps, "must be above 0", "set optim.eps=1e-8")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.adamw import build_adamw

        return build_adamw(self, model)


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

    def param_groups(self, model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
        """`low_rank_param_groups`, with `keys` for the matrices.

        Raises:
            ConfigError: no matrix is larger than the rank.
        """
        from windlass.optim.param_groups import low_rank_param_groups

        try:
            groups = low_rank_param_groups(
                model, self.rank, update_interval=self.update_interval, scale=self.scale, **keys
            )
        except ValueError as error:
            fix = "lower it, leave it out, or choose optim=adamw"
            raise ConfigError("optim.rank", self.rank, str(error), fix) from error
        for group in groups:
            if "rank" not in group:
                group["lr"] = self.adamw_lr or self.lr
        return groups


@dataclass
class ApolloConfig(LowRankConfig):
    """APOLLO: SGD-like Memory, AdamW-level Performance (2024); see `windlass.optim.Apollo`."""

    name: str = "apollo"
    granularity: Granularity = Granularity.channel

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.apollo import Apollo

        groups = self.param_groups(model, granularity=self.granularity.value)
        return Apollo(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass
class GaLoreConfig(LowRankConfig):
    """GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (2024); see `windlass.optim.GaLore`."""

    name: str = "galore"
    scale: float = 0.25
    shard_projector: bool = False
    """Cut the projectors over the ranks as the rest of the state is, for an all-gather of them a step."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.galore import GaLore

        groups = self.param_groups(model, shard_projector=self.shard_projector)
        return GaLore(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.natural_galore import NaturalGaLore

        keys = {key: getattr(self, key) for key in ("shard_projector", "history", "damping")}
        groups = self.param_groups(model, **keys)
        return NaturalGaLore(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass
class WholeMatrixConfig(MatrixConfig):
    """What optimizers of whole matrices have."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        from windlass.optim.param_groups import matrix_param_groups

        return matrix_param_groups(model, lr=self.adamw_lr or self.lr)


class LRAdjustment(StrEnum):
    """Muon: what the learning rate of an (a, b) matrix is multiplied by."""

    original = "original"
    """sqrt(max(1, a / b))."""
    match_rms_adamw = "match_rms_adamw"
    """0.2 sqrt(max(a, b)): updates are as large as AdamW's, so that one rate suits all parameters."""


@dataclass
class MuonConfig(WholeMatrixConfig):
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.muon import Muon

        keys = {key: getattr(self, key) for key in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps")}
        return Muon(self.param_groups(model), adjust_lr_fn=self.adjust_lr_fn.value, **keys)


@dataclass
class CosmosConfig(WholeMatrixConfig):
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.cosmos import Cosmos

        keys = {key: getattr(self, key) for key in ("lr", "betas", "eps", "rank", "gamma", "ratio", "weight_decay")}
        return Cosmos(self.param_groups(model), **keys)


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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        from windlass.optim.param_groups import decay_param_groups
        from windlass.optim.sgd_sai import SGDSaI

        groups = decay_param_groups(model.named_parameters(), self.weight_decay)
        return SGDSaI(groups, lr=self.lr, momentum=self.momentum, eps=self.eps, weight_decay=self.weight_decay)


def checked_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Two decay rates of moments, as a tuple: OmegaConf gives tuples back as lists."""
    fix = "set optim.betas='[0.9,0.95]'"
    require(len(betas) == 2, "optim.betas", betas, "must be two numbers", fix)
    require(all(0 <= beta < 1 for beta in betas), "optim.betas", betas, "both must be in [0, 1)", fix)
    return float(betas[0]), float(betas[1])
