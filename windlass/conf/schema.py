"""The shape of a run's configuration: one dataclass a group, gathered in `Config`. Torch-free."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass, field

from omegaconf import MISSING

from windlass.checkpoint.config import CheckpointConfig
from windlass.data.config import SOURCES, DataConfig
from windlass.launch.config import LaunchConfig
from windlass.models.config import MODELS, ModelConfig
from windlass.observe.config import MetricsConfig
from windlass.offload.config import OffloadConfig
from windlass.optim.config import OPTIMIZERS, OptimConfig
from windlass.parallel.config import ENGINES, ParallelConfig
from windlass.registry import OTHERS, Registry
from windlass.train.config import TrainConfig
from windlass.train.objectives.config import OBJECTIVES, ObjectiveConfig


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
    objective: ObjectiveConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    run_dir: str = "runs/${model.name}"
    resume: str = "auto"


def _of_one(group: str, config: type) -> Registry:
    registry = Registry(group)
    registry.add(OTHERS, config)
    return registry


GROUPS: dict[str, Registry] = {
    registry.group: registry
    for registry in (
        MODELS,
        SOURCES,
        OBJECTIVES,
        OPTIMIZERS,
        ENGINES,
        _of_one("offload", OffloadConfig),
        _of_one("checkpoint", CheckpointConfig),
        _of_one("launch", LaunchConfig),
    )
}
"""The groups that have presets, by name."""


ADDED_LATER = {"objective": {"name": "next_token"}}
"""The choices of groups that files of older runs do not have."""


PATH_KEYS = (
    "run_dir",
    "resume",
    "model.path",
    "model.from_config",
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
    schemas = [(f"{group}.", kinds.config_of(name)) for group, kinds in GROUPS.items() for name in kinds]
    found = {}
    for prefix, schema in [("", Config), ("train.", TrainConfig), ("metrics.", MetricsConfig), *schemas]:
        for key, hint in typing.get_type_hints(schema).items():
            if hint in (str, str | None):
                found[prefix + key] = hint is not str
    return found


def schema_of(group: str, name: str) -> type:
    """The dataclass of the preset `name` of `group`."""
    return GROUPS[group].config_of(name)
