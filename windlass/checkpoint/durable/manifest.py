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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from windlass.checkpoint.durable.chunk_file import Part
from windlass.checkpoint.durable.storage import Location, Storage, join, name_of, open_storage
from windlass.checkpoint.image import DTYPE_BYTES
from windlass.checkpoint.tiling import tiling_problem
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError, WindlassError
from windlass.os_errors import remedy, said
from windlass.untrusted import MAX_BYTES, Malformed, convert, parse_json

MANIFEST = "manifest.json"
FORMAT = "windlass-checkpoint"
VERSION = 3
READ_VERSIONS = (2, VERSION)
"""Version 2 does not say which run wrote it."""
PARTIAL = "partial"
"""The key of a checkpoint's `info` that says that it has not all that a run needs: what it lacks begins anew."""
RNG_PREFIX = "rng"
"""The prefix of the names of the states of random generators."""
STEP_FOLDER = re.compile(r"step-([0-9]{8,16})")
RUN = re.compile(r"[0-9a-f]{16}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_COUNT = 10**15
"""The largest count of steps, attempts, ranks, and bytes of a chunk."""
MAX_TIME = 250_000_000_000.0
"""Unix seconds of the year 9892: `time.localtime` takes no year of five digits."""


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
    """As torch names it, without the `torch.`; one of `DTYPE_BYTES`."""
    fragments: list[StoredFragment] = field(default_factory=list)

    def problem(self) -> str | None:
        """Why it cannot be read, as a clause; None if its fragments tile it."""
        if self.dtype not in DTYPE_BYTES:
            return f"has the dtype {self.dtype[:40]!r}, which is none of {', '.join(DTYPE_BYTES)}"
        return tiling_problem(self.shape, [(fragment.offset, fragment.shape) for fragment in self.fragments])


@dataclass
class Manifest:
    step: int
    generation: int
    """The generation of the attempt that wrote it."""
    world_size: int
    time: float
    """Unix seconds."""
    objects: dict[str, Any]
    """JSON state by name: scheduler, data cursor, hyperparameters, ..."""
    tensors: dict[str, StoredTensor]
    chunks: dict[str, int]
    """SHA-256 -> bytes of the file."""
    run: str = ""
    """The run that wrote it, by the identity of its folder of checkpoints; empty for version 2."""

    @property
    def num_bytes(self) -> int:
        return sum(self.chunks.values())

    def parts_of_chunks(self) -> dict[str, set[Part]]:
        """SHA-256 -> the blocks that it has in that chunk. Blocks with the same bytes may be one."""
        found: dict[str, set[Part]] = {sha256: set() for sha256 in self.chunks}
        for tensor in self.tensors.values():
            for part in tensor.fragments:
                found[part.chunk].add((part.key, tensor.dtype, part.shape, part.begin, part.end))
        return found

    def problems(self) -> Iterator[str]:
        """Yields why no reader may use it: everything that can be told before a chunk is opened."""
        for key, limit in (("step", MAX_COUNT), ("generation", MAX_COUNT), ("world_size", MAX_COUNT)):
            if not 0 <= getattr(self, key) <= limit:
                yield f"its {key} is {getattr(self, key)}"
        if not -MAX_TIME < self.time < MAX_TIME:
            yield f"its time is {self.time}"
        for sha256, size in self.chunks.items():
            if not SHA256.fullmatch(sha256) or not 0 < size <= MAX_COUNT:
                yield f"{sha256[:80]!r} of {size} bytes is no chunk"
        for name, tensor in self.tensors.items():
            problem = self._problem_of(name, tensor)
            if problem is not None:
                yield problem
        yield from _problems_of_objects(self.objects)

    def _problem_of(self, name: str, tensor: StoredTensor) -> str | None:
        if not name.isprintable():
            return f"{name[:80]!a} is no name of a tensor"
        problem = tensor.problem()
        if problem is not None:
            return f"{name} {problem}"
        if name.startswith(f"{RNG_PREFIX}.") and (tensor.dtype != "uint8" or len(tensor.shape) != 1):
            return f"{name} is no state of a generator of random numbers"
        for fragment in tensor.fragments:
            size = self.chunks.get(fragment.chunk)
            num_bytes = math.prod(fragment.shape) * DTYPE_BYTES[tensor.dtype]
            if size is None:
                return f"{name} has a part in {fragment.chunk[:80]!r}, which is no chunk of it"
            if not (0 <= fragment.begin <= fragment.end <= size and fragment.end - fragment.begin == num_bytes):
                return (
                    f"{name} has a part of {num_bytes} bytes at {fragment.begin} to {fragment.end} of a chunk of {size}"
                )
        return None

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`, with a checksum over itself."""
        body = dataclasses.asdict(self)
        return _dumped(_Document(FORMAT, VERSION, _digest(VERSION, body), body))

    @staticmethod
    def parse(text: bytes, folder: Location) -> Manifest:
        """The manifest that `to_bytes` gave `text`; `folder` is for the messages.

        Raises:
            CorruptCheckpoint: it is not as it was written.
            IncompatibleCheckpoint: another version of windlass wrote it.
        """
        try:
            document = convert(parse_json(text), _Document)
            if document.format != FORMAT:
                raise Malformed(f"is {document.format[:40]!r}, not {FORMAT!r}")
            # The second: JSON has more than one way to write the same, and a changed byte is a changed byte.
            if document.sha256 != _digest(document.version, document.body) or _dumped(document) != text:
                raise Malformed("its bytes have changed")
            if document.version not in READ_VERSIONS:
                raise IncompatibleCheckpoint(
                    "checkpoint",
                    folder,
                    f"is of version {document.version} of the format, and this windlass reads "
                    f"{' and '.join(map(str, READ_VERSIONS))}",
                    "use the windlass that wrote it",
                )
            manifest = convert(document.body, Manifest, "body")
            if document.version > 2 and not RUN.fullmatch(manifest.run):
                raise Malformed(f"it is of the run {manifest.run[:40]!r}, which is no run")
            problem = next(manifest.problems(), None)
            if problem is not None:
                raise Malformed(problem)
            return manifest
        except Malformed as error:
            raise corrupt(folder, f"{MANIFEST} cannot be used: {error}") from error

    @staticmethod
    def read(folder: Location) -> Manifest:
        """The manifest of the checkpoint in `folder`, of whose name it must be, if that is the name of a step.

        Raises:
            CorruptCheckpoint: there is none, it is not as it was written, or it is another step's.
            IncompatibleCheckpoint: another version of windlass wrote it.
            RunFolderError: the disk does not give it.
        """
        try:
            text = open_storage(folder).read(MANIFEST, MAX_BYTES)
        except Malformed as error:
            raise corrupt(folder, f"{MANIFEST} cannot be used: {error}") from error
        except OSError as error:
            raise unreadable(folder, MANIFEST, error) from error
        manifest = Manifest.parse(text, folder)
        named, _, _ = name_of(folder).partition(".")  # of one that was set aside, too
        if step_of(named) not in (None, manifest.step):
            raise corrupt(
                folder, f"its {MANIFEST} is that of step {manifest.step}: the folder was renamed, or the file copied"
            )
        return manifest


@dataclass
class _Document:
    """The fields of `manifest.json`, in this order."""

    format: str
    version: int
    sha256: str
    body: dict[str, Any]


def is_of_optimizer(entry: object) -> bool:
    """True if the JSON state of an object is an optimizer's."""
    return isinstance(entry, dict) and entry.keys() >= {"class", "param_groups", "numbers"}


def _problems_of_objects(objects: dict[str, Any]) -> Iterator[str]:
    for name, entry in objects.items():
        if is_of_optimizer(entry):
            try:
                convert(entry["class"], str, f"objects.{name}.class")
                groups = convert(entry["param_groups"], list[dict[str, Any]], f"objects.{name}.param_groups")
                for group in groups:
                    convert(group.get("names"), list[str], f"objects.{name}.param_groups.names")
                convert(entry["numbers"], dict[str, dict[str, Any]], f"objects.{name}.numbers")
            except Malformed as error:
                yield str(error)


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
        "checkpoint",
        join(folder, file),
        f"cannot be read: {said(error)}; that is no damage",
        remedy(error, "mend that and start again"),
    )


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folder(directory: Location, step: int) -> Location:
    return join(directory, step_name(step))


def step_of(name: str) -> int | None:
    """The step whose folder is called `name`; None if it is no step's, or was set aside."""
    match = STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


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


def _dumped(document: _Document) -> bytes:
    return json.dumps(vars(document)).encode()


def _digest(version: int, body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([version, body], sort_keys=True).encode()).hexdigest()
