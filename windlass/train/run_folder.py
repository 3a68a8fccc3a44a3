"""A run's folder: made, locked against a second run, and checked against what it already holds."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from windlass.conf.dotted_keys import flatten
from windlass.errors import ConfigError, RunFolderError
from windlass.files import make_folder, open_growing
from windlass.text import override

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
LOCK_PATIENCE_S = 10.0
"""A restarted worker may find the lock held for a moment by the dying one before it."""

FIXED_KEYS = (
    "model.",
    "objective.",
    "optim.",
    "data.borders",
    "train.seed",
    "train.seq_len",
    "train.dtype",
    "train.max_norm",
)
"""The keys that a run keeps from its first step to its last: another value is another run. (The text, too: the loader
compares its fingerprint, so that the same text may move to another path.)"""


class RunFolder:
    """Owns `path` for as long as it is open. For rank 0.

    Raises:
        RunFolderError: the folder cannot be made or written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path / "logs", path)
            self._lock = lock_folder(path, "run_dir")
        except OSError as error:
            raise unusable(path, error) from error

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_folder(path: Path, key: str, patience_s: float | None = None) -> IO[str]:
    """Locks the folder that the configuration's `key` names, until the returned file is closed or this process ends.

    Args:
        patience_s: how long another process may take to let go of it; None: `LOCK_PATIENCE_S`.

    Raises:
        RunFolderError: another process has it.
        OSError: the file system refuses a file, or has no locks.
    """
    file = os.fdopen(open_growing(path / LOCK_FILE), "a+", encoding="utf-8", errors="replace")
    deadline = time.monotonic() + (LOCK_PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            file.close()
            raise RunFolderError(
                key, path, f"is in use by {owner}", f"wait for that run, or choose another {key}"
            ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def unusable(path: Path, error: OSError) -> RunFolderError:
    rule = f"cannot be written: {error.strerror or error}"
    if error.errno == errno.ELOOP:
        return RunFolderError("run_dir", path, rule, "remove that link, or choose another run_dir")
    return RunFolderError("run_dir", path, rule, "make room or mend its permissions, or choose another run_dir")


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value now), where the two configurations differ."""
    old, new = flatten(before), flatten(now)
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def refuse_another_run(path: Path | str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the run that `path` holds is not the one that `now` describes."""
    known = flatten(before)  # of a checkpoint that was imported, little
    for key, (old, new) in changed_keys(before, now).items():
        if key in known and key.startswith(FIXED_KEYS):
            raise ConfigError(
                key,
                new,
                f"{path} holds a run with {key}={old}, and a run keeps that from its first step to its last",
                f"choose another run_dir (with {override('resume', str(path))} to begin from this run's newest "
                f"checkpoint), or {set_again(key, old)} to go on with this run",
            )


def set_again(key: str, value: object) -> str:
    """The override that gives a run the value that a saved configuration has."""
    if key.endswith(".name") and key != "model.name":
        return f"choose {override(key.removesuffix('.name'), value)}"
    return f"set {override(key, value)}"
