"""The source of `data=chat`: files whose rows are conversations. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from windlass.data.chat_rows import COLUMNS, EXTRA_COLUMNS, KEYS
from windlass.data.config import ChatDataConfig, ChatFormat
from windlass.data.documents import ChatUnit
from windlass.data.json_rows import ArrayUnit
from windlass.data.parquet import cut_parquet_rows
from windlass.data.source_files import PARQUET_SUFFIXES, SourceFile
from windlass.data.sources import Source, cut_records, format_of, given_path, list_files, unit_bytes
from windlass.errors import DataError

STRICT = "strict"


def build_chat(config: ChatDataConfig) -> Source:
    return chat_source(
        [given_path(config.path)],
        glob=config.glob,
        chat_format=config.format.value,
        follow_links=config.follow_links,
    )


def chat_source(
    inputs: Sequence[str | Path],
    *,
    glob: str = "**/*",
    chat_format: str = "auto",
    follow_links: bool = False,
) -> Source:
    """Rows of conversations in JSON Lines, JSON arrays and Parquet. JSON may be packed with gzip or zstd.

    Args:
        chat_format: a `ChatFormat`.

    Raises:
        DataError: as `list_files`; or a file is of another kind.
    """
    files = list_files(inputs, glob, follow_links)
    target = unit_bytes(files)
    units = tuple(ChatUnit(rows, chat_format) for file in files for rows in _rows_of(file, chat_format, target))
    if not units:
        raise DataError("data.path", inputs[0], "has no rows", "give files with rows")
    return Source("chat", {"source": "chat", "format": chat_format}, units)


def _rows_of(file: SourceFile, chat_format: str, target: int) -> Iterator:
    if file.name.lower().endswith(PARQUET_SUFFIXES):
        wanted = ChatFormat(chat_format)
        needed = list(KEYS.values()) if wanted == ChatFormat.auto else [KEYS[wanted]]
        yield from cut_parquet_rows(file, (*COLUMNS, *EXTRA_COLUMNS), needed, target)
        return
    kind = format_of(file)
    if kind == "jsonl":
        yield from cut_records(file, b"\n", "", STRICT, target)
    elif kind == "json":
        yield ArrayUnit(file, "", STRICT)
    else:
        raise DataError(
            "data.path",
            file.path,
            "has no conversations: it is neither JSON Lines (.jsonl) nor a JSON array of rows nor Parquet",
            "leave it out with data.glob (--glob), or read text with data=text",
        )
