"""Finds the checkpoint that a path or a URL stands for. Torch-free."""

from __future__ import annotations

from pathlib import Path

from windlass.checkpoint.durable.manifest import MANIFEST, committed_steps, step_folder
from windlass.checkpoint.durable.storage import Location, as_location, is_same_place, join, open_storage, split
from windlass.checkpoint.durable.store import DurableStore
from windlass.errors import ConfigError, RunFolderError
from windlass.os_errors import MISSING, remedy, said
from windlass.untrusted import Malformed, read_yaml

CONFIG_FILE = "config.yaml"
"""The configuration's file in a run folder."""


def find_checkpoint(path: Location) -> Location:
    """The checkpoint that `resume=PATH` names: itself, or the newest of a run's or a `checkpoints/` folder.

    Raises:
        ConfigError: there is none.
        RunFolderError: the system does not say.
    """
    path = as_location(path)
    try:
        return _find_checkpoint(path)
    except OSError as error:
        raise RunFolderError("path", path, f"cannot be read: {said(error)}", remedy(error, "mend that")) from error


def _find_checkpoint(path: Location) -> Location:
    for directory in (path, join(path, "checkpoints")):
        if steps := committed_steps(directory):
            return step_folder(directory, steps[-1])
    if open_storage(path).size(MANIFEST) is not None:
        return path
    configured = _configured_folder(path)
    if isinstance(configured, Path):
        if steps := committed_steps(configured):
            return step_folder(configured, steps[-1])
    elif configured is not None:
        raise ConfigError(
            "resume",
            path,
            f"has no checkpoints, and its {CONFIG_FILE} says that they are at {configured!r}, which is not followed",
            "if you know that place, name it instead of this folder",
        )
    raise ConfigError(
        "resume",
        path,
        "is neither a checkpoint nor a folder that holds some",
        "name a step-* folder or a run folder; `windlass ckpt list RUN_DIR` lists them",
    )


def checkpoints_of(path: Location, with_lost: bool = False) -> list[Location]:
    """The checkpoints that `path` stands for, oldest first: one, or all of a run.

    Args:
        with_lost: also the one that the pointer names and that is not there.

    Raises:
        ConfigError: there is none.
    """
    newest = find_checkpoint(path)
    if is_same_place(newest, path):
        return [newest]
    directory, _ = split(newest)
    steps = DurableStore(directory).restorable_steps() if with_lost else committed_steps(directory)
    return [step_folder(directory, step) for step in steps]


def _configured_folder(run_dir: Location) -> Location | None:
    """The `checkpoint.dir` that the config.yaml of a run folder names; anybody may have written that."""
    if not isinstance(run_dir, Path):
        return None
    try:
        config = read_yaml(run_dir / CONFIG_FILE)
    except MISSING:
        return None
    except Malformed as error:
        raise ConfigError(
            "path", run_dir / CONFIG_FILE, f"cannot be used: {error}", "name the checkpoints themselves"
        ) from None
    checkpoint = config.get("checkpoint") if isinstance(config, dict) else None
    directory = checkpoint.get("dir") if isinstance(checkpoint, dict) else None
    return as_location(directory) if isinstance(directory, str) and directory else None
