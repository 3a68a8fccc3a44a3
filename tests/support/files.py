"""What tests do to files, and to the disk under them."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


def flip(path: Path, position: int, mask: int = 0x01) -> None:
    """Changes one byte of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        file.seek(position)
        file.write(bytes([old ^ mask]))


def snapshot_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond `num_bytes`; root is bound by it as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
