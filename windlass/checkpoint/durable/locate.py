"""Finds the checkpoint that a path or a URL stands for. Torch-free."""

from __future__ import annotations

from pathlib import Path

import yaml

from windlass.checkpoint.durable.manifest import MANIFEST, committed_steps, step_folder
from windlass.checkpoint.durable.storage import Location, as_location, is_same_place, join, open_storage, split
from windlass.errors import ConfigError


def find_checkpoint(path: Location) -> Location:
    """The checkpoint that `resume=PATH` names: itself, or the newest of a run's or a `checkpoints/` folder.

    Raises:
        ConfigError: there is none.
    """
    path = as_location(path)
    for directory in (path, join(path, "checkpoints"), *_configured_folder(path)):
        steps = committed_steps(directory)
        if steps:
            return step_folder(directory, steps[-1])
    if open_storage(path).size(MANIFEST) is not None:
        return path
    raise ConfigError(
        "resume",
        path,
        "is neither a checkpoint nor a folder that holds some",
        "name a step-* folder or a run folder; `windlass ckpt list RUN_DIR` lists them",
    )


def checkpoints_of(path: Location) -> list[Location]:
    """The checkpoints that `path` stands for, oldest first: one, or all of a run.

    Raises:
        ConfigError: there is none.
    """
    newest = find_checkpoint(path)
    if is_same_place(newest, path):
        return [newest]
    directory, _ = split(newest)
    return [step_folder(directory, step) for step in committed_steps(directory)]


def _configured_folder(run_dir: Location) -> list[Location]:
    """The `checkpoint.dir` of the run in `run_dir`, where its config.yaml names one."""
    if not isinstance(run_dir, Path):
        return []
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        directory = config["checkpoint"]["dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [as_location(directory)] if directory else []
