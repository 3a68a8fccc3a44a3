"""Keeps what a run writes out of the text that it reads. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from windlass.data.config import ChatDataConfig, DataConfig, ParquetDataConfig, TextDataConfig
from windlass.errors import ConfigError
from windlass.files import real_path


def refuse_inside(folder: Path, inputs: Sequence[str | Path], key: str) -> None:
    """Raise ConfigError if `folder` is inside one of `inputs`, where its files would be taken for text."""
    resolved = real_path(folder.expanduser())
    for given in inputs:
        if resolved.is_relative_to(real_path(Path(given).expanduser())):
            raise ConfigError(key, folder, f"must not lie inside the input {given}", "choose a folder elsewhere")


def refuse_outputs(data: DataConfig, folders: Mapping[str, Path | None]) -> None:
    """Raise ConfigError if the run would write into the text that it, or the next run, reads.

    Args:
        folders: what the run writes into, by the configuration's keys. Those that `data.glob` does not reach into, or
            that are hidden, are no text.
    """
    if not isinstance(data, TextDataConfig | ParquetDataConfig | ChatDataConfig):
        return
    root = real_path(Path(data.path).expanduser())
    for key, folder in folders.items():
        if folder is None:
            continue
        resolved = real_path(folder.expanduser())
        if not resolved.is_relative_to(root):
            continue
        parts = resolved.relative_to(root).parts
        is_reached = "**" in data.glob or data.glob.count("/") >= len(parts)
        if is_reached and not any(part.startswith(".") for part in parts):
            raise ConfigError(
                key,
                folder,
                f"must not lie inside data.path={data.path}, where its files would be text of the next start",
                f"set {key} to a folder elsewhere",
            )
