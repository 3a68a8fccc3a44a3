"""The shape of a run's configuration: one dataclass a group, gathered in `Config`. Torch-free."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass, field

from omegaconf import MISSING

from windlass.checkpoint.config import CheckpointConfig
from windlass.data.config import DataConfig, ParquetDataConfig, StdlibDataConfig, TextDataConfig, TokensDataConfig
from windlass.launch.config import LaunchConfig
from windlass.models.config import ModelConfig
from windlass.observe.config import MetricsConfig
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
from windlass.train.config import TrainConfig


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


PATH_KEYS = (
    "run_dir",
    "resume",
    "data.path",
    "data.tokenizer",
    "data.cache_dir",
    "offload.dir",
    "checkpoint.dir",
    "checkpoint.shm_dir",
    "launch.runtime_env",
    "launch.secret_file",
)
"""Keys that name files and folders: `~` is the home folder in each. Some take a word or a URL as well."""


@functools.cache
def text_keys() -> dict[str, bool]:
    """Dotted name of each key that holds text -> whether it may be null."""
    schemas = [(f"{group}.", schema) for group, kinds in GROUPS.items() for schema in kinds.values()]
    found = {}
    for prefix, schema in [("", Config), ("train.", TrainConfig), ("metrics.", MetricsConfig), *schemas]:
        for key, hint in typing.get_type_hints(schema).items():
            if hint in (str, str | None):
                found[prefix + key] = hint is not str
    return found


def schema_of(group: str, name: str) -> type:
    """The dataclass of the preset `name` of `group`."""
    kinds = GROUPS[group]
    return kinds[name] if name in kinds else kinds[""]
