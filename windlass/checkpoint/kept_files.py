"""Small files that a run keeps by content beside its checkpoints: what they were read from may change or go.

    config-<sha256>.json        what config.json said; `info.files` of each checkpoint names it

They are written once, never changed, and never deleted. Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from windlass.checkpoint.durable.storage import Location, Storage, open_storage, resolved, split
from windlass.errors import CorruptCheckpoint, RunFolderError
from windlass.untrusted import Malformed, convert

KEY = "files"
"""The key in a checkpoint's `info`: the names of its files, each with the SHA-256 of its content."""
SHA256 = re.compile("[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""Names of kept files: a manifest may come from a stranger, and an export writes files of these names."""
MAX_FILES = 64
MAX_FILE_BYTES = 256 << 20
"""The most of one: tokenizers of a quarter of a million tokens have 35 MB."""


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stored_name(name: str, sha256: str) -> str:
    """The name beside the checkpoints of the file that the model calls `name`: `tokenizer-<sha256>.json`."""
    path = Path(name)
    return f"{path.stem}-{sha256}{path.suffix}"


def keep(storage: Storage, contents: Mapping[str, bytes]) -> None:
    """Writes files, by name, beside the checkpoints in `storage`, unless they are there. Raises RunFolderError."""
    for name, content in contents.items():
        stored = stored_name(name, sha256_of(content))
        try:
            if not _is_there(storage, stored, content):
                storage.write(stored, [content])
        except OSError as error:
            raise RunFolderError(
                "checkpoint.dir",
                storage.location,
                f"cannot take {name}, which is kept with the run: {error.strerror or error}",
                "make room or mend its permissions, or choose another checkpoint.dir",
            ) from error


def _is_there(storage: Storage, stored: str, content: bytes) -> bool:
    """A file of this name and other bytes is damaged: its name says what it has to hold."""
    return storage.size(stored) == len(content) and storage.read(stored, MAX_FILE_BYTES) == content


def kept_files(info: object, checkpoint: Location) -> dict[str, str]:
    """The files of a checkpoint, name -> SHA-256, from its `info`. Raises CorruptCheckpoint if it makes no sense."""
    if not isinstance(info, Mapping) or info.get(KEY) is None:
        return {}
    try:
        files = convert(info[KEY], dict[str, str], KEY)
        for name, sha256 in files.items():
            if not FILE_NAME.fullmatch(name) or not SHA256.fullmatch(sha256):
                raise Malformed(f"`{KEY}` has {name[:100]!a}, which is no file name with a SHA-256")
        if len(files) > MAX_FILES:
            raise Malformed(f"`{KEY}` has {len(files):,} names, and at most {MAX_FILES} are kept")
    except Malformed as error:
        raise damaged(checkpoint, f"its manifest cannot be used: {error}") from None
    return files


def read_kept(checkpoint: Location, name: str, sha256: str) -> bytes:
    """The content of a file that was kept beside `checkpoint`.

    Raises:
        FileNotFoundError: it is not there any more.
        CorruptCheckpoint: its bytes are not those that were written.
        RunFolderError: the disk or the store does not give it.
    """
    folder, _ = split(resolved(checkpoint))
    stored = stored_name(name, sha256)
    try:
        content = open_storage(folder).read(stored, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise
    except Malformed as error:
        raise damaged(checkpoint, f"{stored} beside it cannot be used: {error}") from None
    except OSError as error:
        raise RunFolderError(
            "path", f"{folder}/{stored}", f"cannot be read: {error.strerror or error}", "mend that"
        ) from error
    if sha256_of(content) != sha256:
        raise damaged(checkpoint, f"{stored} beside it is not as it was written")
    return content


def read_all_kept(info: object, checkpoint: Location, leave_out: str = "") -> dict[str, bytes]:
    """The files of a checkpoint, all but the one named `leave_out`, by name.

    Raises:
        CorruptCheckpoint: one is damaged or not there.
        RunFolderError: as `read_kept`.
    """
    contents = {}
    for name, sha256 in kept_files(info, checkpoint).items():
        if name == leave_out:
            continue
        try:
            contents[name] = read_kept(checkpoint, name, sha256)
        except FileNotFoundError:
            raise damaged(checkpoint, f"{stored_name(name, sha256)} is not beside it any more") from None
    return contents


def kept_problems(info: object, checkpoint: Location) -> list[str]:
    """The problems of the files of a checkpoint, each as a clause. Raises RunFolderError as `read_kept`."""
    problems = []
    try:
        files = kept_files(info, checkpoint)
    except CorruptCheckpoint as error:
        return [error.rule]
    for name, sha256 in files.items():
        try:
            read_kept(checkpoint, name, sha256)
        except FileNotFoundError:
            problems.append(f"{stored_name(name, sha256)}: is not there")
        except CorruptCheckpoint as error:
            problems.append(error.rule)
    return problems


def damaged(checkpoint: Location, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("path", checkpoint, what, "take an older checkpoint, or put the original there again")
