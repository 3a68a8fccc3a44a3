"""Where documents come from: lists the files of a source and cuts them into units of work. Torch-free.

The list, and with it the order of the documents, depends only on the names, sizes and contents below the
given path: not on the machine, the file system's order or the number of processes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import pyarrow as pa

from windlass.errors import ConfigError, DataError
from windlass.train.config import (
    DataConfig,
    ParquetDataConfig,
    PreparedDataConfig,
    StdlibDataConfig,
    TextDataConfig,
)
from windlass.train.data.documents import (
    SKIP,
    FilesUnit,
    ParquetUnit,
    RecordsUnit,
    SourceFile,
    Unit,
    open_parquet,
    unit_identity,
    unreadable,
)

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Installed packages are not the standard library, and distributions differ in which tests they ship."""
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS_AIMED_AT = 64


@dataclass(frozen=True)
class Source:
    """What is to be tokenised.

    Args:
        settings: what besides the files decides what the documents are, for people to read.
        units: the work, in the order of the documents.
    """

    name: str
    settings: dict[str, str]
    units: tuple[Unit, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names, sizes and modification times of the files and over how they are read."""
        digest = sha256(json.dumps(self.settings, sort_keys=True).encode())
        for unit in self.units:
            digest.update(json.dumps(unit_identity(unit), sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


def source_from_config(cfg: DataConfig) -> Source:
    """The source that `cfg` describes. Raises ConfigError and DataError."""
    if isinstance(cfg, StdlibDataConfig):
        return stdlib_source()
    if isinstance(cfg, TextDataConfig):
        return text_source(
            [_given(cfg.path)],
            glob=cfg.glob,
            text_key=cfg.text_key,
            encoding_errors=cfg.encoding_errors.value,
            separator=cfg.separator,
        )
    if isinstance(cfg, ParquetDataConfig):
        return parquet_source(
            [_given(cfg.path)],
            glob=cfg.glob,
            text_key=cfg.text_key,
            encoding_errors=cfg.encoding_errors.value,
        )
    kind = "PreparedDataConfig" if isinstance(cfg, PreparedDataConfig) else "DataConfig"
    raise ConfigError("data", cfg.name, f"a plain {kind} has no source", "use data=stdlib, text or parquet")


def stdlib_source() -> Source:
    """The `.py` files of the running Python's standard library without its tests and per-build files.

    Files that are not UTF-8 are left out (CPython ships none outside its tests).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        SourceFile(file.path, file.name, file.size, 0)  # installations of one Python differ in times only
        for file in _walk(root, STDLIB_EXCLUDED)
        if file.name.endswith(".py") and not file.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
    ]
    if not files:
        raise DataError(
            "data",
            "stdlib",
            f"this Python has no standard library in source below {root}",
            "use data=text data.path=FOLDER",
        )
    files.sort(key=lambda file: file.name)
    settings = {"source": "stdlib", "python": platform.python_version()}
    return Source("stdlib", settings, tuple(_cut_files(files, SKIP, _unit_bytes(files))))


def text_source(
    inputs: Sequence[str | Path],
    *,
    glob: str = "**/*",
    text_key: str = "text",
    encoding_errors: str = "strict",
    separator: str | None = None,
    jsonl: bool | None = None,
) -> Source:
    """Text and JSON Lines files.

    Args:
        inputs: files, and folders of which the files that match `glob` are taken. Hidden ones are not.
        text_key: the field of a JSON line that holds the text.
        encoding_errors: `strict`, `replace` or `ignore`, for bytes that are not UTF-8.
        separator: what ends a document inside a text file; None: a file is one document. In it `\\n` and
            `\\t` are a line feed and a tab.
        jsonl: whether the files are JSON Lines; None: those named .jsonl or .ndjson.
    """
    files = list_files(inputs, glob)
    target = _unit_bytes(files)
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    settings = {
        "source": "text",
        "text_key": text_key,
        "encoding_errors": encoding_errors,
        "separator": repr(separator),
        "jsonl": str(jsonl),
    }
    units: list[Unit] = []
    whole: list[SourceFile] = []
    for file in files:
        is_jsonl = file.name.lower().endswith(JSONL_SUFFIXES) if jsonl is None else jsonl
        if not is_jsonl and not separator:
            whole.append(file)
            continue
        units.extend(_cut_files(whole, encoding_errors, target))
        whole.clear()
        if is_jsonl:
            units.extend(_cut_records(file, b"\n", text_key, encoding_errors, target))
        elif separator:
            units.extend(_cut_records(file, separator.encode("utf-8"), None, encoding_errors, target))
    units.extend(_cut_files(whole, encoding_errors, target))
    return Source("text", settings, tuple(units))


def parquet_source(
    inputs: Sequence[str | Path],
    *,
    glob: str = "**/*.parquet",
    text_key: str = "text",
    encoding_errors: str = "strict",
) -> Source:
    """Parquet files; a document a row of the string column `text_key`. Reads the footer of every file."""
    files = list_files(inputs, glob)
    target = _unit_bytes(files)
    units = [unit for file in files for unit in _cut_parquet(file, text_key, encoding_errors, target)]
    if not units:
        raise DataError("data.path", inputs[0], f"its {len(files)} Parquet files have no rows", "give files with rows")
    settings = {"source": "parquet", "text_key": text_key, "encoding_errors": encoding_errors}
    return Source("parquet", settings, tuple(units))


def list_files(inputs: Sequence[str | Path], glob: str) -> list[SourceFile]:
    """The non-empty files among `inputs`, input by input and then by name.

    Raises:
        DataError: an input is missing or not readable, or has no matching or only empty files.
        ConfigError: a file is reached twice.
    """
    files: list[SourceFile] = []
    for given in map(Path, inputs):
        path = given.expanduser().absolute()
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            raise unreadable(given, error) from None
        found = _matching(path, glob) if is_folder else [_stat(path, path.name)[0]]
        if not found:
            raise DataError(
                "data.path",
                given,
                f"has no files that match data.glob={glob!r}",
                "check the path and data.glob (--glob)",
            )
        prefix = f"{path.name}/" if len(inputs) > 1 and is_folder else ""
        files += [SourceFile(f.path, prefix + f.name, f.size, f.mtime_ns) for f in found]
    _refuse_doubles(files)
    if not any(file.size for file in files):
        raise DataError(
            "data.path", inputs[0], f"has no text: all {len(files)} files are empty", "give files with text"
        )
    return [file for file in files if file.size]


def _given(path: str) -> str:
    if path in ("", "???"):
        raise ConfigError("data.path", path, "must name the file or folder to train on", "set data.path=FOLDER")
    return path


def _matching(root: Path, glob: str) -> list[SourceFile]:
    pattern = _glob_pattern(glob)
    return sorted((file for file in _walk(root) if pattern.fullmatch(file.name)), key=lambda file: file.name)


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[SourceFile]:
    """The regular files below `root` that are not hidden. Folders that are symbolic links are not entered.

    Unlike `Path.glob`, does not pass over what it may not read.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                file, is_regular = _stat(path, path.relative_to(root).as_posix())
                if is_regular:
                    yield file


def _stat(path: Path, name: str) -> tuple[SourceFile, bool]:
    """The file, and whether it is a regular one."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return SourceFile(str(path), name, status.st_size, status.st_mtime_ns), stat.S_ISREG(status.st_mode)


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay inside a folder, `**/` is any number of folders, `[...]` one character."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", glob, flags=re.DOTALL)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for token in tokens:
        if len(token) > 1 and token.startswith("["):
            negated = token.startswith("[!")
            members = token[2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            parts.append(f"[{'^' if negated else ''}{members}]")
        else:
            parts.append(special.get(token) or re.escape(token))
    try:
        return re.compile("".join(parts), flags=re.DOTALL)
    except re.error as error:
        raise ConfigError("data.glob", glob, f"is not a glob pattern ({error})", "set data.glob='**/*'") from None


def _refuse_doubles(files: Iterable[SourceFile]) -> None:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise ConfigError(
                "data.path",
                file.path,
                "must be given once: the inputs reach this file twice",
                "give each file or folder once; a copy in train would leak into validation",
            )
        seen.add(real)


def _unit_bytes(files: Sequence[SourceFile]) -> int:
    """Large enough to be worth a file each; small enough for all cores, and to lose little when killed."""
    total = sum(file.size for file in files)
    return min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, total // UNITS_AIMED_AT))


def _cut_files(files: Sequence[SourceFile], encoding_errors: str, target: int) -> Iterator[FilesUnit]:
    group: list[SourceFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size
        if size >= target:
            yield FilesUnit(tuple(group), encoding_errors)
            group, size = [], 0
    if group:
        yield FilesUnit(tuple(group), encoding_errors)


def _cut_records(
    file: SourceFile, separator: bytes, text_key: str | None, encoding_errors: str, target: int
) -> Iterator[RecordsUnit]:
    # Where a separator can overlap itself ("\n\n" in "\n\n\n"), its places depend on where the search began:
    # no cuts.
    overlaps = any(separator[:i] == separator[-i:] for i in range(1, len(separator)))
    step = file.size if overlaps else target
    for start in range(0, file.size, step):
        yield RecordsUnit(file, start, min(start + step, file.size), separator, text_key, encoding_errors)


def _cut_parquet(file: SourceFile, column: str, encoding_errors: str, target: int) -> Iterator[ParquetUnit]:
    with open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if column not in schema.names:
        raise DataError(
            "data.text_key",
            column,
            f"must be a column of {file.path}, which has: {', '.join(schema.names)}",
            "set data.text_key (--text-key) to the column that holds the text",
        )
    if not _is_string(schema.field(column).type):
        strings = [field.name for field in schema if _is_string(field.type)]
        raise DataError(
            "data.text_key",
            column,
            f"must be a string column of {file.path}, not {schema.field(column).type}",
            f"set data.text_key (--text-key) to a string column, of: {', '.join(strings) or 'it has none'}",
        )
    first_group = first_row = row = size = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        chunks = (row_group.column(i) for i in range(row_group.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
        row += row_group.num_rows
        if size >= target or group + 1 == metadata.num_row_groups:
            if row > first_row:
                yield ParquetUnit(
                    file, first_group, group + 1, first_row, row - first_row, size, column, encoding_errors
                )
            first_group, first_row, size = group + 1, row, 0


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
