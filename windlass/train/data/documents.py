"""Units of work: small picklable descriptions of a part of the input, each of which yields documents.
Torch-free.

A unit always yields the same documents in the same order, and streams: of a file of many documents it holds
one block or one Parquet batch in memory. Units are what processes are given to tokenise, and what a resumed
run skips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from windlass.errors import DataError

BLOCK_BYTES = 1 << 20
PARQUET_BATCH_BYTES = 8 << 20
SKIP = "skip"
"""An `encoding_errors` of our own: leaves out files that are not UTF-8. For the standard library only."""
REPLACE_FIX = "convert it to UTF-8, or set data.encoding_errors=replace (--encoding-errors replace)"


class Document(NamedTuple):
    identity: str
    """Its name in the source. A hash of it decides whether it is for training or validation."""
    text: str
    num_bytes: int
    """Its share of the unit's `num_bytes`."""


@dataclass(frozen=True)
class SourceFile:
    path: str
    name: str
    """Relative to the input, with `/`: the same wherever the input lies."""
    size: int
    mtime_ns: int
    """0 where only the size tells whether the file is still the same."""


@dataclass(frozen=True)
class FilesUnit:
    """Text files, each one document. A file is read whole."""

    files: tuple[SourceFile, ...]
    encoding_errors: str

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            with open_checked(file) as stream:
                data = stream.read()
            try:
                text = data.decode("utf-8", "strict" if self.encoding_errors == SKIP else self.encoding_errors)
            except UnicodeDecodeError as error:
                if self.encoding_errors == SKIP:
                    continue
                raise not_utf8(file, error.start) from None
            text = text.removeprefix("\ufeff")
            if text:
                yield Document(file.name, text, file.size)


@dataclass(frozen=True)
class RecordsUnit:
    """The records of `file` that start at a byte in [start, stop). A record ends at `separator`.

    Args:
        text_key: the field of the record, a JSON object, that holds the text; None where the record is the
            text.
    """

    file: SourceFile
    start: int
    stop: int
    separator: bytes
    text_key: str | None
    encoding_errors: str

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[Document]:
        for offset, record in self._records():
            if not record.strip():
                continue
            try:
                text = record.decode("utf-8", self.encoding_errors)
            except UnicodeDecodeError as error:
                raise not_utf8(self.file, offset + error.start) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            text = self._text_of(text, self.text_key, offset) if self.text_key is not None else text.strip("\r\n")
            if text:
                yield Document(f"{self.file.name}\0{offset}", text, len(record))

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Byte offset and content of each record. The last one may reach beyond `stop`."""
        width = len(self.separator)
        base = max(0, self.start - width)  # offset of buffer[0]; a separator may end right at `start`
        record_start = 0 if self.start == 0 else None
        buffer, search_from = bytearray(), 0
        with open_checked(self.file) as stream:
            stream.seek(base)
            while True:
                found = buffer.find(self.separator, search_from)
                if found >= 0:
                    if record_start is not None:
                        yield record_start, bytes(buffer[record_start - base : found])
                    search_from = found + width
                    record_start = base + search_from
                    if record_start >= self.stop:
                        return
                    continue
                # Without a separator in the buffer, all but the record so far goes; its searched part is not
                # searched again.
                unsearched = max(0, len(buffer) - width + 1)
                drop = unsearched if record_start is None else record_start - base
                del buffer[:drop]
                base += drop
                search_from = max(0, len(buffer) - width + 1)
                block = stream.read(BLOCK_BYTES)
                if not block:
                    break
                buffer += block
        if record_start is not None and buffer:
            yield record_start, bytes(buffer)

    def _text_of(self, record: str, text_key: str, offset: int) -> str:
        try:
            value = json.loads(record)
        except json.JSONDecodeError as error:
            raise self._bad_line(offset, f"is not JSON ({error.msg})", "mend or remove the line") from None
        if not isinstance(value, dict):
            raise self._bad_line(offset, f"must be a JSON object, not {_json_type(value)}", "mend the line")
        if text_key not in value:
            keys = ", ".join(map(str, value)) or "none"
            raise self._bad_line(
                offset,
                f"has no key data.text_key={text_key!r}; its keys are: {keys}",
                "set data.text_key (--text-key) to the one that holds the text",
            )
        text = value[text_key]
        if not isinstance(text, str):
            raise self._bad_line(
                offset,
                f"must hold a string under data.text_key={text_key!r}, not {_json_type(text)}",
                "mend the line, or set data.text_key (--text-key) to the key that holds the text",
            )
        if "\\u" in record:  # only an escape can smuggle in half of a surrogate pair
            try:
                text = text.encode("utf-8", self.encoding_errors).decode("utf-8")
            except UnicodeEncodeError:
                raise self._bad_line(
                    offset,
                    "escapes half of a surrogate pair, which no UTF-8 text can hold",
                    "mend the line, or set data.encoding_errors=replace (--encoding-errors replace)",
                ) from None
        return text

    def _bad_line(self, offset: int, rule: str, fix: str) -> DataError:
        with open_checked(self.file) as stream:
            line, left = 1, offset
            while left and (block := stream.read(min(left, BLOCK_BYTES))):
                line += block.count(b"\n")
                left -= len(block)
        return DataError("data.path", f"{self.file.path}:{line}", rule, fix)


@dataclass(frozen=True)
class ParquetUnit:
    """Row groups [first_row_group, stop_row_group) of a Parquet file; a document a row of `column`."""

    file: SourceFile
    first_row_group: int
    stop_row_group: int
    first_row: int
    num_rows: int
    num_bytes: int
    """Of the column, uncompressed, as the file's footer says."""
    column: str
    encoding_errors: str

    def documents(self) -> Iterator[Document]:
        row, row_bytes = self.first_row, max(1, self.num_bytes // max(1, self.num_rows))
        for batch in self._batches(max(1, min(1024, PARQUET_BATCH_BYTES // row_bytes))):
            for data in _as_binary(batch.column(0)).to_pylist():
                if data is None:
                    raise self._bad_row(row, "is null", "filter out the rows without text")
                try:
                    text = data.decode("utf-8", self.encoding_errors)
                except UnicodeDecodeError as error:
                    raise self._bad_row(row, f"is not UTF-8 at its byte {error.start}", REPLACE_FIX) from None
                if text:
                    yield Document(f"{self.file.name}\0{row}", text, len(data))
                row += 1

    def _batches(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        row_groups = list(range(self.first_row_group, self.stop_row_group))
        with open_parquet(self.file) as parquet:
            yield from parquet.iter_batches(num_rows, row_groups, [self.column], use_threads=False)

    def _bad_row(self, row: int, rule: str, fix: str) -> DataError:
        rule = f"row {row} of column {self.column!r} {rule}"
        return DataError("data.path", self.file.path, rule, fix)


Unit = FilesUnit | RecordsUnit | ParquetUnit


def unit_identity(unit: Unit) -> dict[str, Any]:
    """`unit` as plain JSON, without the place where the files lie."""
    fields: dict[str, Any] = {"kind": type(unit).__name__, **asdict(unit)}
    for file in [fields["file"]] if "file" in fields else fields["files"]:
        del file["path"]
    if "separator" in fields:
        fields["separator"] = fields["separator"].hex()
    return fields


def split_position(identity: str) -> float:
    """A number in [0, 1) from `identity` alone: below `validation_fraction` a document is for validation."""
    digest = blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


@contextmanager
def open_checked(file: SourceFile) -> Iterator[BinaryIO]:
    """`file` for reading. Raises DataError if it cannot be read, or is not as it was when it was listed."""
    try:
        with Path(file.path).open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if stat.st_size != file.size or file.mtime_ns not in (0, stat.st_mtime_ns):
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
def open_parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """The Parquet `file`. Damage, found now or while the body reads, is a DataError that names it."""
    with open_checked(file) as stream:
        try:
            with pq.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            first_line = str(error).partition("\n")[0]
            raise DataError(
                "data.path",
                file.path,
                f"is not a sound Parquet file ({first_line})",
                "write or download it again, or leave it out with data.glob (--glob)",
            ) from None


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
    return DataError("data.path", path, f"cannot be read ({error.strerror or error})", "check the disk and the path")


def not_utf8(file: SourceFile, byte_offset: int) -> DataError:
    return DataError("data.path", file.path, f"must be UTF-8 text, and is not at byte {byte_offset}", REPLACE_FIX)


def _as_binary(column: pa.Array) -> pa.Array:
    """Strings as bytes: `to_pylist` of strings fails on what is not UTF-8 without saying in which row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string()).cast(pa.large_binary())


def _json_type(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")
