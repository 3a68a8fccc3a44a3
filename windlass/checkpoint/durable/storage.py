"""The storage of checkpoints: a folder of this machine or of a shared file system, or an object store.

Whatever writes a checkpoint needs one promise from it: a name holds all of what was written under it, or is not there.
Locations are `Path`s and, for object stores, URLs that fsspec knows. Torch-free: snapshot agents write checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from windlass.checkpoint.durable.local_storage import LocalStorage
from windlass.files import real_path
from windlass.untrusted import MAX_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

Location = Path | str
"""A folder: a local path, or a URL such as `s3://bucket/run/checkpoints`."""
LOCAL_SCHEME = "file://"


class Storage(Protocol):
    """Named objects below one location. Names are relative to it and have `/` between their parts.

    All raise `OSError` where the place refuses or fails; an object store has tried more than once by then, and raises
    `RunFolderError`. Readers raise `FileNotFoundError` for a name that is not there.
    """

    @property
    def location(self) -> Location: ...

    def make(self) -> None:
        """Makes the place if it is missing, and removes what killed writers left in it."""
        ...

    def write(self, name: str, parts: Iterable[Buffer], guard: Callable[[], None] | None = None) -> None:
        """Writes the parts, one after the other, as `name`, in place of what has that name: whole or not at all.

        On the disk, or taken by the store, when it returns.

        Args:
            guard: called when nothing but the name is missing; `name` stays as it is if it raises.
        """
        ...

    def adopt(self, name: str, file: Path) -> bool:
        """Gives a file of this machine that nobody writes to any more the name `name`, too: nothing is copied.

        On the disk when it returns.

        Returns:
            Whether that can be done: False where the file is elsewhere.
        """
        ...

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """All of `name`. Raises Malformed if that is more than `max_bytes`, or no file."""
        ...

    def open(self, name: str, max_bytes: int | None = None) -> memoryview:
        """The bytes of `name`: mapped where that can be, and for as long as something refers to them.

        Args:
            max_bytes: more than that need not be fetched; None: all.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of `name`; None if it is not there."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """The names directly in the folder `prefix`, which is part of them, sorted; none if there is no such folder."""
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Deletes what is there of `names`, for good when it returns. A folder that it empties is gone, too."""
        ...

    def move(self, source: str, target: str) -> None:
        """Gives an object another name."""
        ...


def open_storage(location: Location) -> Storage:
    """The storage at a local path or a URL; nothing is made or read yet.

    Raises:
        ConfigError: nothing that is installed serves URLs of its scheme.
    """
    location = as_location(location)
    if isinstance(location, Path):
        return LocalStorage(location)
    from windlass.checkpoint.durable.object_storage import FsspecStorage  # most runs need no fsspec

    return FsspecStorage(location)


def as_location(location: Location) -> Location:
    """`location` in its one form: a `Path` if it is of this machine's file systems, else a URL as text."""
    if isinstance(location, Path):
        return location
    if location.startswith(LOCAL_SCHEME):
        return Path(location.removeprefix(LOCAL_SCHEME))
    return location.rstrip("/") if "://" in location else Path(location)


def join(location: Location, name: str) -> Location:
    location = as_location(location)
    return location / name if isinstance(location, Path) else f"{location}/{name}"


def split(location: Location) -> tuple[Location, str]:
    """The folder that `location` is in, and its name there."""
    location = as_location(location)
    if isinstance(location, Path):
        return location.parent, location.name
    parent, _, name = location.rpartition("/")
    return parent, name


def name_of(location: Location) -> str:
    return split(location)[1]


def is_same_place(one: Location, other: Location) -> bool:
    return resolved(one) == resolved(other)


def resolved(location: Location) -> Location:
    """The location without symbolic links and relative parts."""
    location = as_location(location)
    return real_path(location) if isinstance(location, Path) else location
