"""The manifest of a durable checkpoint: what is in it, in which chunks, and the checksum of every byte.

A checkpoint is `step-00000300/manifest.json` and the chunks that it names, which other checkpoints may name as well.
The manifest is written when all of them are on the disk, so a step that has one is whole. Torch-free: listing and
verifying need no framework.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from windlass.checkpoint.durable.storage import Location, Storage, join, open_storage
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError, WindlassError

MANIFEST = "manifest.json"
FORMAT = "windlass-checkpoint"
VERSION = 2
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StoredFragment:
    """A block of a global tensor, and the bytes of the chunk's file that hold it."""

    chunk: str
    """Its SHA-256."""
    key: str
    begin: int
    end: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class StoredTensor:
    shape: tuple[int, ...]
    dtype: str
    """As torch names it, without the `torch.`."""
    fragments: list[StoredFragment] = field(default_factory=list)


@dataclass
class Manifest:
    step: int
    generation: int
    """How often the run had been started again when it wrote this."""
    world_size: int
    time: float
    """Unix seconds."""
    objects: dict[str, Any]
    """JSON state by name: scheduler, data cursor, hyperparameters, ..."""
    tensors: dict[str, StoredTensor]
    chunks: dict[str, int]
    """SHA-256 -> bytes of the file."""

    @property
    def num_bytes(self) -> int:
        return sum(self.chunks.values())

    def uncovered(self) -> list[str]:
        """The tensors of which there are not as many elements as they have."""
        return [
            name
            for name, tensor in self.tensors.items()
            if sum(math.prod(fragment.shape) for fragment in tensor.fragments) != math.prod(tensor.shape)
        ]

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`, with a checksum over itself."""
        body = dataclasses.asdict(self)
        document = {"format": FORMAT, "version": VERSION, "sha256": _digest(VERSION, body), "body": body}
        return json.dumps(document).encode()

    @staticmethod
    def parse(text: bytes, folder: Location) -> Manifest:
        """The manifest that `to_bytes` gave `text`; `folder` is for the messages.

        Raises:
            CorruptCheckpoint: it is not as it was written.
            IncompatibleCheckpoint: another version of windlass wrote it.
        """
        try:
            document = json.loads(text.decode())
            if document["format"] != FORMAT:
                raise ValueError(f"is {document['format']!r}, not {FORMAT!r}")
            body, version = document["body"], document["version"]
            # The second: JSON has more than one way to write the same, and a changed byte is a changed byte.
            if document["sha256"] != _digest(version, body) or json.dumps(document).encode() != text:
                raise ValueError("its bytes have changed")
            if version != VERSION:
                raise IncompatibleCheckpoint(
                    "checkpoint",
                    folder,
                    f"is of version {version} of the format, and this windlass reads {VERSION}",
                    "use the windlass that wrote it",
                )
            fields = dict(body)
            fields["tensors"] = {name: _tensor(entry) for name, entry in body["tensors"].items()}
            return Manifest(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise corrupt(folder, f"{MANIFEST} cannot be used: {error}") from error

    @staticmethod
    def read(folder: Location) -> Manifest:
        """The manifest of the checkpoint in `folder`.

        Raises:
            CorruptCheckpoint: there is none, or it is not as it was written.
            IncompatibleCheckpoint: another version of windlass wrote it.
            RunFolderError: the disk does not give it.
        """
        try:
            text = open_storage(folder).read(MANIFEST)
        except OSError as error:
            raise unreadable(folder, MANIFEST, error) from error
        return Manifest.parse(text, folder)


def corrupt(folder: Location, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "checkpoint",
        folder,
        f"is damaged: {what}",
        "resume from an older one (`windlass ckpt list` names them; resume=PATH)",
    )


def unreadable(folder: Location, file: str, error: OSError) -> WindlassError:
    """A file that is missing is damage; one that the disk or the system refuses may be there tomorrow."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return corrupt(folder, f"{file} cannot be used: {error.strerror or 'it is not there'}")
    return RunFolderError(
        "checkpoint", join(folder, file), f"cannot be read: {error.strerror or error}", "mend that and start again"
    )


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folder(directory: Location, step: int) -> Location:
    return join(directory, step_name(step))


def step_of(name: str) -> int | None:
    """The step whose folder is called `name`; None if it is no step's, or was set aside."""
    match = STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def committed_steps(directory: Location) -> list[int]:
    """The steps that have a committed checkpoint in `directory`, oldest first."""
    return steps_in(open_storage(directory))


def steps_in(storage: Storage) -> list[int]:
    """The steps that have a committed checkpoint in `storage`, oldest first."""
    return sorted(
        step
        for name in storage.list()
        if (step := step_of(name)) is not None and storage.size(f"{name}/{MANIFEST}") is not None
    )


def _tensor(entry: dict[str, Any]) -> StoredTensor:
    return StoredTensor(tuple(entry["shape"]), entry["dtype"], [_fragment(part) for part in entry["fragments"]])


def _fragment(entry: dict[str, Any]) -> StoredFragment:
    fields = dict(entry)
    fields["offset"], fields["shape"] = tuple(entry["offset"]), tuple(entry["shape"])
    return StoredFragment(**fields)


def _digest(version: int, body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([version, body], sort_keys=True).encode()).hexdigest()
