"""Input files: what is known of each, and opening them, packed ones too, within bounds. Torch-free."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from windlass.data.tally import Tally
from windlass.errors import DataError
from windlass.os_errors import remedy
from windlass.os_errors import said as said_of_system

BLOCK_BYTES = 1 << 20
REPLACE_FIX = "convert it to UTF-8, or set data.encoding_errors=replace (--encoding-errors replace)"

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of packed text that is read, and what Arrow calls their codecs."""
OTHER_ARCHIVES = (".bz2", ".xz", ".lzma", ".zip", ".tar", ".tgz", ".tbz", ".txz", ".lz4", ".7z", ".rar", ".br", ".z")
PARQUET_SUFFIXES = (".parquet", ".pq")
OTHER_TABLES = (".arrow", ".feather", ".orc", ".avro")
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
"""First bytes that no text has."""

MAX_QUOTED = 200
"""Characters of what a library or a file says, in a message."""
UNPACKED_FREE_BYTES = 64 << 20
MAX_UNPACK_RATIO = 250
"""A packed file may be unpacked to as many times its size, and `UNPACKED_FREE_BYTES` more. Text is packed to a half or
a tenth, logs to a hundredth; what is made to fill a disk, to a thousandth and less."""
MAX_UNPACKED_DOCUMENT_BYTES = 128 << 20
"""The most of one document in a packed file: it is held in memory whole."""


class Document(NamedTuple):
    identity: str
    """Its name in the source. A hash of it decides whether it is for training or validation."""
    text: str
    num_bytes: int
    """Its share of the unit's `num_bytes`."""
    refused: Callable[[str, str], DataError] | None = None
    """Makes the error that names its place, of a rule and a fix, where the tokenizer may find fault with it."""


@dataclass(frozen=True)
class SourceFile:
    path: str
    name: str
    """Relative to the input, with `/`: the same wherever the input lies."""
    size: int
    mtime_ns: int
    """0 where what tells whether the file is still the same is in the source's settings."""
    inode: int = 0
    ctime_ns: int = 0
    """Size and modification time can be set to those of another file; the two of them cannot."""

    @property
    def codec(self) -> str | None:
        """The format that the file is packed with, as its name says."""
        return CODECS.get(Path(self.name.lower()).suffix)

    @property
    def unpacked_name(self) -> str:
        """The name in lower case, without the suffix of a packed file."""
        name = self.name.lower()
        return name if self.codec is None else name.rpartition(".")[0]


@contextmanager
def open_checked(file: SourceFile) -> Iterator[BinaryIO]:
    """`file` for reading. Raises DataError if it cannot be read, or is not as it was when it was listed."""
    try:
        with Path(file.path).open("rb") as stream:
            stat = os.fstat(stream.fileno())
            changed = stat.st_size != file.size or file.mtime_ns not in (0, stat.st_mtime_ns)
            if changed or file.ctime_ns not in (0, stat.st_ctime_ns):
                raise DataError(
                    "data.path",
                    file.path,
                    "must not change while it is prepared",
                    "run the command again when nothing writes to it any more",
                )
            yield stream
    except OSError as error:
        raise unreadable(file.path, error) from None


@contextmanager
def open_text(file: SourceFile) -> Iterator[BinaryIO]:
    """The bytes of a text `file`, unpacked if its name says that it is packed.

    Raises:
        DataError: as `open_checked`; it is binary, or packed in a way that is not read; or, while the body reads, it is
            damaged or is unpacked to more than `MAX_UNPACK_RATIO` allows.
    """
    with open_checked(file) as stream:
        if file.codec is not None:
            yield cast("BinaryIO", _Unpacked(file, stream))
            return
        start = stream.read(8)
        for magic, kind in MAGIC.items():
            if start.startswith(magic):
                raise DataError(
                    "data.path",
                    file.path,
                    f"is packed ({kind}), whatever its name says, and no text",
                    "name it .gz or .zst if it is packed so, or unpack it",
                )
        stream.seek(0)
        yield stream


class _Unpacked(io.RawIOBase):
    """A stream that unpacks `stream`, read from its start to its end."""

    def __init__(self, file: SourceFile, stream: BinaryIO) -> None:
        self._file, self._num_bytes = file, 0
        self._unpacked = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), file.codec)

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return read_document(cast("BinaryIO", self), self._file)
        try:
            block = self._unpacked.read(size)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                "data.path",
                self._file.path,
                f"is not a sound {self._file.codec} file ({said(error)})",
                "download or pack it again, or leave it out with data.glob (--glob)",
            ) from None
        self._num_bytes += len(block)
        check_expansion(self._file, self._num_bytes)
        return block


def check_expansion(file: SourceFile, num_bytes: int) -> None:
    """Raises DataError if `file` has been unpacked to more bytes than a file of text of its size."""
    if num_bytes > UNPACKED_FREE_BYTES + MAX_UNPACK_RATIO * file.size:
        raise DataError(
            "data.path",
            file.path,
            f"has {file.size:,} bytes and is unpacked to {num_bytes:,} and more: no text is packed to less than one "
            f"{MAX_UNPACK_RATIO}th",
            "leave it out with data.glob (--glob); or, if you trust it, unpack it yourself",
        )


def read_document(stream: BinaryIO, file: SourceFile) -> bytes:
    """All of `stream`, for one document. Raises DataError for a packed one of over `MAX_UNPACKED_DOCUMENT_BYTES`."""
    if file.codec is None:
        return stream.read()
    content = bytearray()
    while block := stream.read(BLOCK_BYTES):
        content += block
        check_document(file, len(content))
    return bytes(content)


def check_document(file: SourceFile, num_bytes: int) -> None:
    """Raises DataError if a document of so many bytes in the packed `file` is too large for memory."""
    if file.codec is not None and num_bytes > MAX_UNPACKED_DOCUMENT_BYTES:
        raise DataError(
            "data.path",
            file.path,
            f"has a document of more than {MAX_UNPACKED_DOCUMENT_BYTES:,} bytes, the most for a packed file",
            "unpack it, or say what ends a document with data.separator (--separator)",
        )


def max_document_bytes(file: SourceFile) -> int:
    """A bound of the bytes of a document in `file`."""
    return file.size if file.codec is None else min(MAX_UNPACKED_DOCUMENT_BYTES, MAX_UNPACK_RATIO * file.size)


def decode(data: bytes, encoding_errors: str, tally: Tally) -> str:
    """`data` as text. Raises UnicodeDecodeError where `encoding_errors` is `strict`; counts what is mended."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", encoding_errors)
        tally.mended_documents += 1
        return text


def unreadable(path: str | Path, error: OSError) -> DataError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return DataError("data.path", path, f"must exist ({error.strerror})", "check the path")
    if isinstance(error, PermissionError):
        return DataError(
            "data.path",
            path,
            f"must be readable ({error.strerror})",
            f"give this user read access, e.g. chmod -R u+rX {path}",
        )
    fix = remedy(error, "check the disk and the path")
    return DataError("data.path", path, f"cannot be read ({said_of_system(error)})", fix)


def said(error: BaseException) -> str:
    """The message of a library about a file, in one short line."""
    return shortened(str(error).partition("\n")[0] or type(error).__name__)


def shortened(text: str) -> str:
    """`text`, or its beginning: what is found in a file may be of any length."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def not_utf8(file: SourceFile, byte_offset: int) -> DataError:
    return DataError("data.path", file.path, f"must be UTF-8 text, and is not at byte {byte_offset}", REPLACE_FIX)
