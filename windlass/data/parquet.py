"""Documents in Parquet: rows of a string column, read in batches whose size is bounded beforehand. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from windlass.data.json_rows import Row
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
                num_rows = _batch_rows(self.file, parquet, group, [self.column])
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

    def _bad_row(self, row: int, rule: str, fix: str) -> DataError:
        return DataError("data.path", self.file.path, f"row {row} of column {self.column!r} {rule}", fix)


@dataclass(frozen=True)
class ParquetRowsUnit:
    """As `ParquetUnit`, of rows of several columns, which may hold lists and structs."""

    file: SourceFile
    first_row_group: int
    stop_row_group: int
    first_row: int
    num_rows: int
    num_bytes: int
    """The size of the columns, uncompressed, as the file's footer says."""
    columns: tuple[str, ...]

    def rows(self, tally: Tally) -> Iterator[Row]:
        """The rows as JSON values. A field that a struct has and a row has not is null."""
        number, num_bytes = self.first_row, 0
        share = self.num_bytes // max(1, self.num_rows)
        with open_parquet(self.file) as parquet:
            for group in range(self.first_row_group, self.stop_row_group):
                num_rows = _batch_rows(self.file, parquet, group, self.columns)
                for batch in parquet.iter_batches(num_rows, [group], list(self.columns), use_threads=False):
                    num_bytes += batch.nbytes
                    check_expansion(self.file, num_bytes)
                    batch.validate(full=True)  # strings that are not UTF-8 among others
                    for value in batch.to_pylist():
                        yield Row(f"{self.file.name}\0{number}", _without_nulls(value), share, self._refusal(number))
                        number += 1

    def _refusal(self, row: int) -> Callable[[str, str], DataError]:
        return lambda rule, fix: DataError("data.path", self.file.path, f"row {row} {rule}", fix)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _batch_rows(file: SourceFile, parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Rows to read at once, so that no batch takes much memory whatever the file says of itself."""
    most = MAX_BATCH_ROWS
    row_group = parquet.metadata.row_group(group)
    for chunk in _chunks(row_group, columns):
        num_bytes = max(1, chunk.total_uncompressed_size)
        check_expansion(file, num_bytes)
        num_rows = min(chunk.num_values, row_group.num_rows)  # a row of a list has several values
        most = min(most, BATCH_BYTES * max(1, num_rows) // num_bytes)
        if chunk.has_dictionary_page:  # each row may be the largest word of the dictionary
            most = min(most, MAX_BATCH_BYTES // max(1, _dictionary_bytes(file, chunk)))
        if "DELTA_BYTE_ARRAY" in chunk.encodings:  # each row may repeat the one before it
            most = min(most, MAX_BATCH_BYTES // num_bytes)
    return max(1, most)


def _dictionary_bytes(file: SourceFile, chunk: pq.ColumnChunkMetaData) -> int:
    """The size of the uncompressed dictionary page, as its header says; of all pages if that cannot be read."""
    with open_checked(file) as stream:
        stream.seek(max(0, chunk.dictionary_page_offset or 0))
        return _uncompressed_page_bytes(stream.read(32)) or chunk.total_uncompressed_size


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
        sizes = _group_sizes(file, parquet, [column])
    for span in _cut_groups(sizes, target):
        yield ParquetUnit(file, *span, column, encoding_errors)


def cut_parquet_rows(
    file: SourceFile, known: Sequence[str], needed: Sequence[Sequence[str]], target: int
) -> Iterator[ParquetRowsUnit]:
    """The units of `file`, of about `target` bytes each, with the columns of it that are `known`.

    Raises:
        DataError: it is damaged, has a column twice, or has no columns that are `needed`: all of any one of these.
    """
    with open_parquet(file) as parquet:
        names = parquet.schema_arrow.names
        columns = tuple(name for name in known if name in names)
        if not any(set(wanted) <= set(columns) for wanted in needed) or any(names.count(name) > 1 for name in columns):
            wanted = "; ".join(" and ".join(names) for names in needed)
            rule = f"has the columns of no format once each ({wanted}); it has: {shortened(', '.join(names))}"
            raise DataError("data.path", file.path, rule, "rename its columns, or leave it out with data.glob (--glob)")
        sizes = _group_sizes(file, parquet, columns)
    for span in _cut_groups(sizes, target):
        yield ParquetRowsUnit(file, *span, columns)


def _group_sizes(file: SourceFile, parquet: pq.ParquetFile, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Rows of each row group, and bytes of the columns in it."""
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    sizes = [
        (group.num_rows, sum(chunk.total_uncompressed_size for chunk in _chunks(group, columns))) for group in groups
    ]
    if any(num_rows < 0 or num_bytes < 0 for num_rows, num_bytes in sizes):
        raise DataError("data.path", file.path, "is not a sound Parquet file (a size is negative)", "write it again")
    return sizes


def _cut_groups(sizes: Sequence[tuple[int, int]], target: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The first row group, the one behind the last, the first row, rows and bytes of each unit."""
    first_group = first_row = row = size = 0
    for group, (num_rows, num_bytes) in enumerate(sizes):
        size += num_bytes
        row += num_rows
        if size >= target or group + 1 == len(sizes):
            if row > first_row:
                yield first_group, group + 1, first_row, row - first_row, size
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


def _chunks(row_group: pq.RowGroupMetaData, columns: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """Those of the columns, and of what is in them where they are lists and structs."""
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    inside = tuple(f"{column}." for column in columns)
    return [chunk for chunk in chunks if chunk.path_in_schema in columns or chunk.path_in_schema.startswith(inside)]


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
