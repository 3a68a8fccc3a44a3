"""The manifest of a durable checkpoint: what is in it, where, and the checksum of every byte.

A checkpoint is a folder `step-00000300/` with a safetensors file a rank and `manifest.json`. The folder is written
under another name and renamed when all of it is on disk, so a folder of that name is whole. Torch-free: listing and
verifying need no framework.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError, WindlassError

MANIFEST = "manifest.json"
FORMAT = "windlass-checkpoint"
VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StoredFragment:
    """A block of a global tensor, and the bytes of the file that hold it."""

    file: str
    key: str
    begin: int
    end: int
    sha256: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class StoredTensor:
    shape: tuple[int, ...]
    dtype: str
    """As torch names it, without the `torch.`."""
    fragments: list[StoredFragment] = field(default_factory=list)


@dataclass(frozen=True)
class StoredFile:
    size: int
    header_sha256: str


@dataclass
class Manifest:
    step: int
    world_size: int
    time: float
    """Unix seconds."""
    objects: dict[str, Any]
    """JSON state by name: scheduler, data cursor, hyperparameters, ..."""
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Writes and syncs `manifest.json`, with a checksum over itself."""
        body = dataclasses.asdict(self)
        document = {"format": FORMAT, "version": VERSION, "sha256": _digest(VERSION, body), "body": body}
        with (folder / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of the checkpoint in `folder`.

        Raises:
            CorruptCheckpoint: there is none, or it is not as it was written.
            IncompatibleCheckpoint: another version of windlass wrote it.
            RunFolderError: the disk does not give it.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise ValueError(f"is {document['format']!r}, not {FORMAT!r}")
            body, version = document["body"], document["version"]
            # The second: JSON has more than one way to write the same, and a changed byte is a changed byte.
            if document["sha256"] != _digest(version, body) or json.dumps(document) != text:
                raise ValueError("its bytes have changed")
            if version != VERSION:
                raise IncompatibleCheckpoint(
                    "checkpoint",
                    folder,
                    f"is of version {version} of the format, and this windlass reads {VERSION}",
                    "use the windlass that wrote it",
                )
            return Manifest(
                step=body["step"],
                world_size=body["world_size"],
                time=body["time"],
                objects=body["objects"],
                tensors={name: _tensor(entry) for name, entry in body["tensors"].items()},
                files={name: StoredFile(**entry) for name, entry in body["files"].items()},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise corrupt(folder, f"{MANIFEST} cannot be used: {error}") from error
        except OSError as error:
            raise unreadable(folder, MANIFEST, error) from error


def corrupt(folder: Path, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "checkpoint",
        folder,
        f"is damaged: {what}",
        "resume from an older one (`windlass ckpt list` names them; resume=PATH)",
    )


def unreadable(folder: Path, file: str, error: OSError) -> WindlassError:
    """A file that is missing is damage; one that the disk or the system refuses may be there tomorrow."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return corrupt(folder, f"{file} cannot be used: {error.strerror}")
    return RunFolderError(
        "checkpoint", folder / file, f"cannot be read: {error.strerror or error}", "mend that and start again"
    )


def step_folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def committed_steps(directory: Path) -> list[int]:
    """The steps that have a committed checkpoint in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _tensor(entry: dict[str, Any]) -> StoredTensor:
    return StoredTensor(tuple(entry["shape"]), entry["dtype"], [_fragment(part) for part in entry["fragments"]])


def _fragment(entry: dict[str, Any]) -> StoredFragment:
    fields = dict(entry)
    fields["offset"], fields["shape"] = tuple(entry["offset"]), tuple(entry["shape"])
    return StoredFragment(**fields)


def _digest(version: int, body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([version, body], sort_keys=True).encode()).hexdigest()
