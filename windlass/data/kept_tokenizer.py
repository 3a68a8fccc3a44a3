"""The record in a checkpoint of the tokenizer of its run, whose file is among the kept files. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.kept_files import SHA256, damaged, read_kept, sha256_of, stored_name
from windlass.data.manifest import TOKENIZER_FILE, TokenizerInfo
from windlass.data.shards import TokenDataset
from windlass.data.tokenizer import MAX_FILE_BYTES, ByteTokenizer, fingerprint_of, token_of
from windlass.errors import DataError
from windlass.untrusted import Malformed, convert, read_bytes

KEY = "tokenizer"
"""The key in a checkpoint's `info`."""


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
        assert self.sha256 is not None
        return stored_name(TOKENIZER_FILE, self.sha256)

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
    sha256 = None if content is None else sha256_of(content)
    return KeptTokenizer(info.name, info.vocab_size, info.eos_id, eos_token, sha256), content


def kept_tokenizer(info: Mapping[str, Any], checkpoint: Location) -> KeptTokenizer | None:
    """Reads it from a checkpoint's `info`; None where there is none. Raises CorruptCheckpoint if it makes no sense."""
    if info.get(KEY) is None:
        return None
    try:
        tokenizer = convert(info[KEY], KeptTokenizer, KEY)
        if tokenizer.sha256 is not None and not SHA256.fullmatch(tokenizer.sha256):
            raise Malformed("`tokenizer.sha256` is no SHA-256")
    except Malformed as error:
        raise damaged(checkpoint, f"its manifest cannot be used: {error}") from None
    return tokenizer


def kept_content(tokenizer: KeptTokenizer, checkpoint: Location) -> bytes | None:
    """The file that was kept beside `checkpoint`; None if there is none.

    Raises:
        CorruptCheckpoint: its bytes are not those that were written.
        RunFolderError: the disk or the store does not give it.
    """
    if tokenizer.sha256 is None:
        return None
    try:
        return read_kept(checkpoint, TOKENIZER_FILE, tokenizer.sha256)
    except FileNotFoundError:
        return None
