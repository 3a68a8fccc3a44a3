"""Units of work: small picklable descriptions of a part of the input, each of which yields documents.
Torch-free.

A unit always yields the same documents in the same order, and streams: of a file of many documents it holds
one block or one Parquet batch in memory. Units are what processes are given to tokenise, and what a resumed
run skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from windlass.data.chat_rows import conversation_of_row, to_text
from windlass.data.config import ChatFormat
from windlass.data.json_rows import ROW_DECODER, ArrayUnit, Row, parse_row, text_of_row
from windlass.data.parquet import ParquetRowsUnit, ParquetUnit
from windlass.data.source_files import (
    BLOCK_BYTES,
    Document,
    SourceFile,
    check_document,
    decode,
    not_utf8,
    open_text,
    read_document,
)
from windlass.data.tally import Tally
from windlass.errors import DataError

SKIP = "skip"
"""An `encoding_errors` of our own: leaves out files that are not UTF-8. For the standard library only."""


@dataclass(frozen=True)
class FilesUnit:
    """Text files, each one document. A file is read whole."""

    files: tuple[SourceFile, ...]
    encoding_errors: str

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def documents(self, tally: Tally) -> Iterator[Document]:
        for file in self.files:
            with open_text(file) as stream:
                data = read_document(stream, file)
            try:
                text = decode(data, "strict" if self.encoding_errors == SKIP else self.encoding_errors, tally)
            except UnicodeDecodeError as error:
                if self.encoding_errors == SKIP:
                    continue
                raise not_utf8(file, error.start) from None
            text = text.removeprefix("\ufeff")
            if text:
                yield Document(file.name, text, file.size)
            else:
                tally.empty_documents += 1


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
        return self.file.size if self.file.codec is not None else self.stop - self.start

    def documents(self, tally: Tally) -> Iterator[Document]:
        for offset, text, num_bytes in self._decoded(tally):
            text = text.strip("\r\n") if self.text_key is None else self._text_of(text, self.text_key, offset, tally)
            if text:
                yield Document(f"{self.file.name}\0{offset}", text, num_bytes)
            else:
                tally.empty_documents += 1

    def rows(self, tally: Tally) -> Iterator[Row]:
        """The records as JSON values, numbers included."""
        for offset, record, num_bytes in self._decoded(tally):
            refused = partial(self._bad_line, offset)
            yield Row(f"{self.file.name}\0{offset}", parse_row(record, refused, ROW_DECODER), num_bytes, refused)

    def _decoded(self, tally: Tally) -> Iterator[tuple[int, str, int]]:
        """Byte offset, text and bytes of each record that is not blank."""
        for offset, record in self._records(tally):
            if not record.strip():
                continue
            try:
                text = decode(record, self.encoding_errors, tally)
            except UnicodeDecodeError as error:
                raise not_utf8(self.file, offset + error.start) from None
            yield offset, text.removeprefix("\ufeff") if offset == 0 else text, len(record)

    def _records(self, tally: Tally) -> Iterator[tuple[int, bytes]]:
        """Byte offset and content of each record. The last one may reach beyond `stop`."""
        width = len(self.separator)
        base = max(0, self.start - width)  # offset of buffer[0]; a separator may end right at `start`
        record_start = 0 if self.start == 0 else None
        buffer, search_from = bytearray(), 0
        with open_text(self.file) as stream:
            if base:
                stream.seek(base)
            while True:
                found = buffer.find(self.separator, search_from)
                if found >= 0:
                    if record_start is not None:
                        tally.separators += self.text_key is None
                        yield record_start, self._checked(buffer[record_start - base : found])
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
                check_document(self.file, len(buffer) - BLOCK_BYTES)
        if record_start is not None and buffer:
            yield record_start, self._checked(buffer)

    def _checked(self, record: bytearray) -> bytes:
        """`record`, which must not hold separators with the line ends of Windows: they would be taken for text."""
        windows = self.separator.replace(b"\n", b"\r\n")
        if self.text_key is None and self.separator not in windows and windows in record:
            shown = windows.decode().replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
            raise DataError(
                "data.separator",
                shown.replace("\\r", ""),
                f"must be what separates documents, and {self.file.path} has lines that end with CR LF (\\r\\n)",
                f"set data.separator='{shown}' (--separator '{shown}'), or convert the file's line ends",
            )
        return bytes(record)

    def _text_of(self, record: str, text_key: str, offset: int, tally: Tally) -> str:
        def refused(rule: str, fix: str) -> DataError:
            return self._bad_line(offset, rule, fix)

        return text_of_row(parse_row(record, refused), text_key, self.encoding_errors, tally, refused)

    def _bad_line(self, offset: int, rule: str, fix: str) -> DataError:
        with open_text(self.file) as stream:
            line, left = 1, offset
            while left and (block := stream.read(min(left, BLOCK_BYTES))):
                line += block.count(b"\n")
                left -= len(block)
        return DataError("data.path", f"{self.file.path}:{line}", rule, fix)


@dataclass(frozen=True)
class ChatUnit:
    """The rows of another unit as conversations; a document is the JSON of one, see `chat_rows.to_text`."""

    rows: RecordsUnit | ArrayUnit | ParquetRowsUnit
    format: str
    """A `ChatFormat`."""

    @property
    def file(self) -> SourceFile:
        return self.rows.file

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes

    def documents(self, tally: Tally) -> Iterator[Document]:
        chat_format = ChatFormat(self.format)
        for row in self.rows.rows(tally):
            conversation = conversation_of_row(row.value, chat_format, row.refused)
            yield Document(row.identity, to_text(conversation, row.refused), row.num_bytes, row.refused)


Unit = FilesUnit | RecordsUnit | ArrayUnit | ParquetUnit | ChatUnit


def unit_files(unit: Unit) -> tuple[SourceFile, ...]:
    return unit.files if isinstance(unit, FilesUnit) else (unit.file,)


def unit_identity(unit: Unit) -> dict[str, Any]:
    """`unit` as plain JSON, which another file never has: names, sizes and times can be made equal, but not all of it.

    Of files without a time it leaves out where they lie: there the source's settings tell their content.
    """
    if isinstance(unit, ChatUnit):
        return {"kind": "ChatUnit", "format": unit.format, "rows": _plain(unit.rows)}
    return _plain(unit)


def _plain(unit: Unit | ParquetRowsUnit) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": type(unit).__name__, **asdict(unit)}
    for file in [fields["file"]] if "file" in fields else fields["files"]:
        if file["mtime_ns"] == 0:
            del file["path"]
    if "separator" in fields:
        fields["separator"] = fields["separator"].hex()
    return fields


def split_position(identity: str) -> float:
    """A number in [0, 1) from `identity` alone: below `validation_fraction` a document is for validation."""
    digest = blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
