"""The shape of a run's configuration: one dataclass a group, gathered in `Config`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from windlass.checkpoint.config import CheckpointConfig
from windlass.launch.config import LaunchConfig
from windlass.offload.config import OffloadConfig
from windlass.optim.config import (
    AdamWConfig,
    ApolloConfig,
    CosmosConfig,
    GaLoreConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    OptimConfig,
    SGDSaIConfig,
)
from windlass.parallel.config import ParallelConfig
from windlass.train.config import (
    DataConfig,
    MetricsConfig,
    ModelConfig,
    ParquetDataConfig,
    StdlibDataConfig,
    TextDataConfig,
    TokensDataConfig,
    TrainConfig,
)


@dataclass
class Config:
    """All that decides a run. `resume`: `auto` goes on from the run folder's newest checkpoint, where there is one;
    `never` insists on an empty run folder; a path goes on from that checkpoint, or from the newest one of that run.
    """

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    parallel: ParallelConfig = MISSING
    offload: OffloadConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    launch: LaunchConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    run_dir: str = "runs/${model.name}"
    resume: str = "auto"


GROUPS: dict[str, dict[str, type]] = {
    "model": {"": ModelConfig},
    "data": {
        "stdlib": StdlibDataConfig,
        "text": TextDataConfig,
        "parquet": ParquetDataConfig,
        "tokens": TokensDataConfig,
    },
    "optim": {
        "adamw": AdamWConfig,
        "apollo": ApolloConfig,
        "apollo_mini": ApolloConfig,
        "galore": GaLoreConfig,
        "natural_galore": NaturalGaLoreConfig,
        "muon": MuonConfig,
        "cosmos": CosmosConfig,
        "sgd_sai": SGDSaIConfig,
    },
    "parallel": {"": ParallelConfig},
    "offload": {"": OffloadConfig},
    "checkpoint": {"": CheckpointConfig},
    "launch": {"": LaunchConfig},
}
"""Group -> the value of its `name` key -> dataclass. `""` stands for every name of a group with one dataclass."""


def schema_of(group: str, name: str) -> type:
    """The dataclass of the preset `name` of `group`."""
    kinds = GROUPS[group]
    return kinds[name] if name in kinds else kinds[""]
