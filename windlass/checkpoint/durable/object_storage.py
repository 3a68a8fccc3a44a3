"""Checkpoints in an object store, through fsspec: `s3://`, `gs://`, `abfs://`, ..., and `memory://` for tests.

A store has no rename and needs none: a PUT is there whole or not at all. Networks fail, so calls are tried again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import fsspec

from windlass.errors import ConfigError, RunFolderError
from windlass.os_errors import remedy, said
from windlass.untrusted import MAX_BYTES, Malformed
from windlass.urls import HOW_INSTEAD, has_password

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

Result = TypeVar("Result")

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""`memory` lasts as long as its process: for tests."""
MORE_SCHEMES = "WINDLASS_STORAGE_SCHEMES"
"""Environment variable: other schemes of fsspec's that are admitted, with `,` between them."""
NUM_TRIES = 8
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 20.0
NOT_TRANSIENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def _check_scheme(location: str) -> None:
    """Raises ConfigError unless the URL is of a store that whoever starts windlass admits.

    fsspec has dozens of schemes, and chains of them: some read archives, call other hosts, or run templates.
    """
    scheme, _, rest = location.partition("://")
    more = [name.strip() for name in os.environ.get(MORE_SCHEMES, "").split(",") if name.strip()]
    if "::" in location or "://" in rest or scheme not in (*SCHEMES, *more):
        raise ConfigError(
            "checkpoint.dir",
            location,
            f"is not a URL of {', '.join(f'{name}://' for name in (*SCHEMES, *more))}, and chains (`::`) are not taken",
            f"name such a place or a local folder; {MORE_SCHEMES}=NAME in the environment admits another scheme of "
            "fsspec's",
        )


class FsspecStorage:
    """The objects below one URL.

    Args:
        sleep: waits between tries, which double up to `MAX_WAIT_S` and are spread so that ranks do not come together.

    Raises:
        ConfigError: nothing that is installed serves URLs of its scheme, or there is a password in it.
        RunFolderError: from every method, after `NUM_TRIES` failures, or at once where access is denied.
    """

    def __init__(self, location: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.location, self._sleep = location, sleep
        if has_password(location):
            raise ConfigError("checkpoint.dir", location, "has a password in it, which others could read", HOW_INSTEAD)
        _check_scheme(location)
        try:
            # A cached listing would hide what other ranks write.
            self._files, self._root = fsspec.url_to_fs(location, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "checkpoint.dir",
                location,
                f"cannot be served: {error}",
                "install the fsspec package of its scheme (s3fs, gcsfs, adlfs, ...) or use a local folder",
            ) from error

    def make(self) -> None:
        """A store has no folders to make, and a PUT that was cut off leaves nothing."""

    def write(self, name: str, parts: Iterable[Buffer], guard: Callable[[], None] | None = None) -> None:
        data = b"".join(parts)
        if guard is not None:
            guard()
        self._try(f"write {name}", lambda: self._files.pipe_file(self._path(name), data))

    def adopt(self, name: str, file: Path) -> bool:
        return False

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        size = self.size(name)
        if size is not None and size > max_bytes:
            raise Malformed(f"{name}: it has {size:,} bytes, and at most {max_bytes:,} are read")
        return self._try(f"read {name}", lambda: self._files.cat_file(self._path(name)))

    def open(self, name: str, max_bytes: int | None = None) -> memoryview:
        part = {} if max_bytes is None else {"start": 0, "end": max_bytes}
        return memoryview(self._try(f"read {name}", lambda: self._files.cat_file(self._path(name), **part)))

    def size(self, name: str) -> int | None:
        try:
            return self._try(f"look at {name}", lambda: self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        folder = self._path(prefix)
        try:
            paths = self._try(f"list {prefix or 'it'}", lambda: self._files.ls(folder, detail=False))
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").removeprefix(self._root).lstrip("/") for path in paths)
        return sorted(name for name in names if name != prefix)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._try(f"delete {name}", lambda name=name: self._files.rm_file(self._path(name)))
            except FileNotFoundError:
                continue

    def move(self, source: str, target: str) -> None:
        self._try(f"copy {source}", lambda: self._files.cp_file(self._path(source), self._path(target)))
        self.delete([source])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, what: str, action: Callable[[], Result]) -> Result:
        wait_s = FIRST_WAIT_S
        for remaining in reversed(range(NUM_TRIES)):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:  # TimeoutError is one
                if remaining == 0 or isinstance(error, NOT_TRANSIENT):
                    raise RunFolderError(
                        "checkpoint.dir",
                        self.location,
                        f"cannot {what}: {said(error)}",
                        remedy(error, "see that the store answers and lets this machine in")
                        + "; the checkpoints that are there are intact, and the same command resumes from the newest",
                    ) from error
                self._sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, MAX_WAIT_S)
        raise AssertionError("the last try returns or raises")
