"""The tokenizer of a run, kept by content beside its checkpoints: the file it was read from may change or go.

    tokenizer-<sha256>.json       what tokenizer.json said; `info.tokenizer` of each checkpoint names it

Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.checkpoint.durable.storage import Location, Storage, open_storage, split
from windlass.data.manifest import TOKENIZER_FILE, TokenizerInfo
from windlass.data.shards import TokenDataset
from windlass.data.tokenizer import MAX_FILE_BYTES, ByteTokenizer, fingerprint_of, token_of
from windlass.errors import CorruptCheckpoint, DataError, RunFolderError
from windlass.untrusted import Malformed, convert, read_bytes

KEY = "tokenizer"
"""The key in a checkpoint's `info`."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class KeptTokenizer:
    """The tokenizer of a run, as its checkpoint records it."""

    name: str
    vocab_size: int
    eos_id: int
    eos_token: str | None
    """None where the tokenizer has no file."""
    sha256: str | None
    """The file's; None where there is none."""

    @property
    def file(self) -> str:
        return f"tokenizer-{self.sha256}.json"

    @property
    def is_bytes(self) -> bool:
        return self.name == ByteTokenizer.name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tokenizer_of(dataset: TokenDataset) -> tuple[KeptTokenizer, bytes | None]:
    """Returns what to keep of the tokenizer that made the tokens of `dataset`, and its file.

    Raises:
        DataError: the tokenizer.json of the prepared folder cannot be read, or is not the one that made its tokens.
    """
    info = TokenizerInfo(**dataset.manifest.tokenizer)
    path = dataset.folder / TOKENIZER_FILE
    content = eos_token = None
    if info.spec == TOKENIZER_FILE and path.exists():
        try:
            content = read_bytes(path, MAX_FILE_BYTES)
            if fingerprint_of(content, info.eos_id) != info.fingerprint:
                raise Malformed("it is not the tokenizer that the text was prepared with")
            eos_token = token_of(content, info.eos_id)
        except (Malformed, OSError) as error:
            raise DataError(
                "data.path",
                path,
                f"cannot be kept with the run: {getattr(error, 'strerror', None) or error}",
                "put the original there again, or delete the folder and prepare the text again",
            ) from None
    sha256 = None if content is None else hashlib.sha256(content).hexdigest()
    return KeptTokenizer(info.name, info.vocab_size, info.eos_id, eos_token, sha256), content


def keep(storage: Storage, tokenizer: KeptTokenizer, content: bytes | None) -> None:
    """Writes the file beside the checkpoints in `storage`, unless it is there. Raises RunFolderError."""
    if content is None:
        return
    try:
        if storage.size(tokenizer.file) != len(content):
            storage.write(tokenizer.file, [content])
    except OSError as error:
        raise RunFolderError(
            "checkpoint.dir",
            storage.location,
            f"cannot take the tokenizer: {error.strerror or error}",
            "make room or mend its permissions, or choose another checkpoint.dir",
        ) from error


def kept_tokenizer(info: Mapping[str, Any], checkpoint: Location) -> KeptTokenizer | None:
    """Reads it from a checkpoint's `info`; None where there is none. Raises CorruptCheckpoint if it makes no sense."""
    if info.get(KEY) is None:
        return None
    try:
        tokenizer = convert(info[KEY], KeptTokenizer, KEY)
        if tokenizer.sha256 is not None and not SHA256.fullmatch(tokenizer.sha256):
            raise Malformed("`tokenizer.sha256` is no SHA-256")
    except Malformed as error:
        raise _damaged(checkpoint, f"its manifest cannot be used: {error}") from None
    return tokenizer


def kept_content(tokenizer: KeptTokenizer, checkpoint: Location) -> bytes | None:
    """The file that was kept beside `checkpoint`; None if there is none.

    Raises:
        CorruptCheckpoint: its bytes are not those that were written.
        RunFolderError: the disk or the store does not give it.
    """
    if tokenizer.sha256 is None:
        return None
    folder, _ = split(Path(checkpoint).absolute() if isinstance(checkpoint, Path) else checkpoint)
    try:
        content = open_storage(folder).read(tokenizer.file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(
            "path", f"{folder}/{tokenizer.file}", f"cannot be read: {error.strerror or error}", "mend that"
        ) from error
    if hashlib.sha256(content).hexdigest() != tokenizer.sha256:
        raise _damaged(checkpoint, f"{tokenizer.file} beside it is not as it was written")
    return content


def _damaged(checkpoint: Location, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "path", checkpoint, what, "export an older checkpoint, or put the original tokenizer there again"
    )
