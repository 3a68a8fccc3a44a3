"""Keeps what a run writes out of the text that it reads. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from windlass.data.config import DataConfig, ParquetDataConfig, TextDataConfig
from windlass.errors import ConfigError


def refuse_inside(folder: Path, inputs: Sequence[str | Path], key: str) -> None:
    """Raise ConfigError if `folder` is inside one of `inputs`, where its files would be taken for text."""
    resolved = folder.expanduser().resolve()
    for given in inputs:
        if resolved.is_relative_to(Path(given).expanduser().resolve()):
            raise ConfigError(key, folder, f"must not lie inside the input {given}", "choose a folder elsewhere")


def refuse_outputs(data: DataConfig, folders: Mapping[str, Path | None]) -> None:
    """Raise ConfigError if the run would write into the text that it, or the next run, reads.

    Args:
        folders: what the run writes into, by the configuration's keys. Those that `data.glob` does not reach into, or
            that are hidden, are no text.
    """
    if not isinstance(data, TextDataConfig | ParquetDataConfig):
        return
    root = Path(data.path).expanduser().resolve()
    for key, folder in folders.items():
        if folder is None:
            continue
        resolved = folder.expanduser().resolve()
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
