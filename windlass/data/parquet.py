"""Documents in Parquet: rows of a string column, read in batches whose size is bounded beforehand. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from windlass.data.source_files import (
    BLOCK_BYTES,
    REPLACE_FIX,
    Document,
    SourceFile,
    check_expansion,
    decode,
    open_checked,
    said,
    shortened,
)
from windlass.data.tally import Tally
from windlass.errors import DataError

BATCH_BYTES = 8 << 20
"""The size of a batch of rows, about, by the footer's mean."""
MAX_BATCH_BYTES = 64 << 20
"""The most of a batch of rows, where many may stand for one that the file has once; a single row may be larger."""
MAX_BATCH_ROWS = 1024


@dataclass(frozen=True)
class ParquetUnit:
    """Row groups [first_row_group, stop_row_group) of a Parquet file; a document a row of `column`."""

    file: SourceFile
    first_row_group: int
    stop_row_group: int
    first_row: int
    num_rows: int
    num_bytes: int
    """The size of the column, uncompressed, as the file's footer says."""
    column: str
    encoding_errors: str

    def documents(self, tally: Tally) -> Iterator[Document]:
        row, num_bytes = self.first_row, 0
        with open_parquet(self.file) as parquet:
            for group in range(self.first_row_group, self.stop_row_group):
                num_rows = self._batch_rows(parquet, group)
                for batch in parquet.iter_batches(num_rows, [group], [self.column], use_threads=False):
                    for value in _as_binary(batch.column(0)).to_pylist():
                        if value is None:
                            raise self._bad_row(row, "is null", "filter out the rows without text")
                        num_bytes += len(value)
                        check_expansion(self.file, num_bytes)
                        text = self._decode(value, row, tally)
                        if text:
                            yield Document(f"{self.file.name}\0{row}", text, len(value))
                        else:
                            tally.empty_documents += 1
                        row += 1

    def _decode(self, value: bytes, row: int, tally: Tally) -> str:
        try:
            return decode(value, self.encoding_errors, tally)
        except UnicodeDecodeError as error:
            raise self._bad_row(row, f"is not UTF-8 at its byte {error.start}", REPLACE_FIX) from None

    def _batch_rows(self, parquet: pq.ParquetFile, group: int) -> int:
        """Rows to read at once, so that no batch takes much memory whatever the file says of itself."""
        most = MAX_BATCH_ROWS
        for chunk in _chunks(parquet.metadata.row_group(group), self.column):
            num_bytes = max(1, chunk.total_uncompressed_size)
            check_expansion(self.file, num_bytes)
            most = min(most, BATCH_BYTES * max(1, chunk.num_values) // num_bytes)
            if chunk.has_dictionary_page:  # each row may be the largest word of the dictionary
                most = min(most, MAX_BATCH_BYTES // max(1, self._dictionary_bytes(chunk)))
            if "DELTA_BYTE_ARRAY" in chunk.encodings:  # each row may repeat the one before it
                most = min(most, MAX_BATCH_BYTES // num_bytes)
        return max(1, most)

    def _dictionary_bytes(self, chunk: pq.ColumnChunkMetaData) -> int:
        """The size of the uncompressed dictionary page, as its header says; of all pages if that cannot be read."""
        with open_checked(self.file) as stream:
            stream.seek(max(0, chunk.dictionary_page_offset or 0))
            return _uncompressed_page_bytes(stream.read(32)) or chunk.total_uncompressed_size

    def _bad_row(self, row: int, rule: str, fix: str) -> DataError:
        return DataError("data.path", self.file.path, f"row {row} of column {self.column!r} {rule}", fix)


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """The Parquet `file`. Damage, found now or while the body reads, is a DataError that names it."""
    with open_checked(file) as stream:
        try:
            with pq.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES) as parquet:
                yield parquet
        except (pa.ArrowException, OSError, ValueError, OverflowError, IndexError, KeyError, MemoryError) as error:
            raise DataError(
                "data.path",
                file.path,
                f"is not a sound Parquet file ({said(error)})",
                "write or download it again, or leave it out with data.glob (--glob)",
            ) from None


def cut_parquet(file: SourceFile, column: str, encoding_errors: str, target: int) -> Iterator[ParquetUnit]:
    """The units of `file`, of about `target` bytes of text each.

    Raises:
        DataError: it is damaged, or has no one column `column` of strings.
    """
    with open_parquet(file) as parquet:
        _check_column(file, parquet.schema_arrow, column)
        groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
        sizes = [
            (group.num_rows, sum(chunk.total_uncompressed_size for chunk in _chunks(group, column))) for group in groups
        ]
    if any(num_rows < 0 or num_bytes < 0 for num_rows, num_bytes in sizes):
        raise DataError("data.path", file.path, "is not a sound Parquet file (a size is negative)", "write it again")
    first_group = first_row = row = size = 0
    for group, (num_rows, num_bytes) in enumerate(sizes):
        size += num_bytes
        row += num_rows
        if size >= target or group + 1 == len(sizes):
            if row > first_row:
                yield ParquetUnit(
                    file, first_group, group + 1, first_row, row - first_row, size, column, encoding_errors
                )
            first_group, first_row, size = group + 1, row, 0


def _check_column(file: SourceFile, schema: pa.Schema, column: str) -> None:
    found = [field for field in schema if field.name == column]
    if len(found) != 1:
        rule = f"must be a column of {file.path}, which has: {shortened(', '.join(schema.names))}"
        if found:
            rule = f"must be one column of {file.path}, which has {len(found)} of that name"
        fix = "set data.text_key (--text-key) to the column that holds the text"
        raise DataError("data.text_key", column, rule, fix if not found else "rename or drop one of them")
    if not _is_string(found[0].type):
        strings = [field.name for field in schema if _is_string(field.type)]
        raise DataError(
            "data.text_key",
            column,
            f"must be a string column of {file.path}, not {shortened(str(found[0].type))}",
            f"set data.text_key (--text-key) to a string column, of: {shortened(', '.join(strings)) or 'it has none'}",
        )


def _chunks(row_group: pq.RowGroupMetaData, column: str) -> list[pq.ColumnChunkMetaData]:
    """One; or two, where `a.b` is a column and a field of the column `a`."""
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema == column]


def _uncompressed_page_bytes(header: bytes) -> int | None:
    """The second field of a page header, after its type: two 32-bit integers in Thrift's compact protocol."""
    values, position = [], 0
    for _ in range(2):
        if header[position : position + 1] != b"\x15":  # the next field, an i32
            return None
        value = shift = 0
        position += 1
        while position < len(header) and shift < 35:
            byte = header[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        values.append(value >> 1)  # zigzag
    return values[1]


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _as_binary(column: pa.Array) -> pa.Array:
    """Strings as bytes: as strings they fail where they are not UTF-8 without saying in which row."""
    column.validate(full=False)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string()).cast(pa.large_binary())
