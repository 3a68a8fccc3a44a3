"""A store whose writes a test holds up, in whatever process they are made: `gated://FOLDER`.

Agents are processes of their own. They find the scheme as they would find any that is installed, by an entry point.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from windlass.checkpoint.durable.object_storage import MORE_SCHEMES

GATE = "WINDLASS_TEST_GATE"
"""The variable that names the gate's folder."""
SCHEME = "gated"


class GatedFileSystem(LocalFileSystem):
    """Local files; who writes one whose path has the gate's word in it waits until the gate is opened."""

    protocol = SCHEME

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{SCHEME}://"))

    def pipe_file(self, path: str, value: bytes, *others: Any, **options: Any) -> None:
        gate = Path(os.environ[GATE])
        while (word := gate / "word").exists() and word.read_text() in path:
            (gate / f"waiting-{os.getpid()}").touch()
            time.sleep(0.002)
        super().pipe_file(path, value, *others, **options)


class Gate:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def close(self, word: str) -> None:
        """From now on nothing is written whose path has `word` in it."""
        for path in self._folder.glob("waiting-*"):
            path.unlink()
        (self._folder / "word.new").write_text(word)
        (self._folder / "word.new").rename(self._folder / "word")

    def open(self) -> None:
        (self._folder / "word").unlink(missing_ok=True)

    def waiting(self) -> set[int]:
        """The processes that wait, or have waited."""
        return {int(path.name.removeprefix("waiting-")) for path in self._folder.glob("waiting-*")}


@contextmanager
def gated_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Gate]]:
    """The URL of a store below `folder`, and its gate, which is open."""
    package, gate, store = folder / "package", folder / "gate", folder / "store"
    info = package / "windlass_gated-1.dist-info"
    for made in (info, gate, store):
        made.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: windlass-gated\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[fsspec.specs]\n{SCHEME}=support.gated:GatedFileSystem\n")
    paths = [str(package), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv(GATE, str(gate))
    fsspec.register_implementation(SCHEME, GatedFileSystem, clobber=True)
    monkeypatch.setenv(MORE_SCHEMES, SCHEME)
    opened = Gate(gate)
    try:
        yield f"{SCHEME}://{store}", opened
    finally:
        opened.open()
