"""Lists the files of a source of documents and cuts them into units of work. Torch-free.

The list, and with it the order of the documents, depends only on the names, sizes and contents below the
given path: not on the machine, the file system's order or the number of processes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from windlass.data.config import ParquetDataConfig, StdlibDataConfig, TextDataConfig
from windlass.data.documents import SKIP, FilesUnit, RecordsUnit, Unit, unit_identity
from windlass.data.json_rows import ArrayUnit, looks_like
from windlass.data.parquet import cut_parquet
from windlass.data.source_files import (
    CODECS,
    OTHER_ARCHIVES,
    OTHER_TABLES,
    PARQUET_SUFFIXES,
    SourceFile,
    unreadable,
)
from windlass.errors import ConfigError, DataError
from windlass.files import real_path

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Installed packages are not the standard library, and distributions differ in which tests they ship."""
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS_AIMED_AT = 64
LINK_LEVELS = 2
"""A symbolic link in a folder may lead to files below the folder so many levels above it: as those of the cache of
Hugging Face do, and not into the home or the system of whoever unpacked what a stranger has packed."""


@dataclass(frozen=True)
class Source:
    """The text to be tokenised.

    Args:
        settings: what besides the files decides what the documents are, for people to read.
        units: the work, in the order of the documents.
    """

    name: str
    settings: dict[str, str]
    units: tuple[Unit, ...]
    formats: tuple[tuple[str, int], ...] = ()
    """The number of files that are read in each way, where names leave it open."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash over places, names, sizes, times and inodes of the files and over how they are read.

        The content is not read for it: two files that differ and have all of these in common are not met by accident.
        """
        digest = sha256(json.dumps(self.settings, sort_keys=True).encode())
        for unit in self.units:
            digest.update(json.dumps(unit_identity(unit), sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


def build_stdlib(config: StdlibDataConfig) -> Source:
    return stdlib_source()


def build_text(config: TextDataConfig) -> Source:
    return text_source(
        [given_path(config.path)],
        glob=config.glob,
        text_key=config.text_key,
        encoding_errors=config.encoding_errors.value,
        separator=config.separator,
        format=config.format.value,
        follow_links=config.follow_links,
    )


def build_parquet(config: ParquetDataConfig) -> Source:
    return parquet_source(
        [given_path(config.path)],
        glob=config.glob,
        text_key=config.text_key,
        encoding_errors=config.encoding_errors.value,
        follow_links=config.follow_links,
    )


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
    content = sha256()
    for file in files:
        content.update(f"{file.name}\0{file.size}\0".encode())
        try:
            content.update(Path(file.path).read_bytes())
        except OSError as error:
            raise unreadable(file.path, error) from None
    settings = {"source": "stdlib", "python": platform.python_version(), "content": content.hexdigest()}
    return Source("stdlib", settings, tuple(_cut_files(files, SKIP, unit_bytes(files))))


def text_source(
    inputs: Sequence[str | Path],
    *,
    glob: str = "**/*",
    text_key: str = "text",
    encoding_errors: str = "strict",
    separator: str | None = None,
    format: str = "auto",
    follow_links: bool = False,
) -> Source:
    """Text and JSON files, which may be packed with gzip or zstd.

    Args:
        inputs: files, and folders of which the files that match `glob` are taken. Hidden ones are not.
        text_key: the field of a JSON row that holds the text.
        encoding_errors: `strict`, `replace` or `ignore`, for bytes that are not UTF-8.
        separator: what ends a document inside a text file; None: a file is one document. In it `\\n`, `\\r` and
            `\\t` are a line feed, a carriage return and a tab.
        format: `text`; `jsonl`, a row a line; `json`, an array of rows; `auto`: by the name of each file, and of those
            named .json by how they begin.
        follow_links: see `list_files`.

    Raises:
        DataError: as `list_files`; or a file is of a kind that is not read.
    """
    files = list_files(inputs, glob, follow_links)
    target = unit_bytes(files)
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    settings = {
        "source": "text",
        "text_key": text_key,
        "encoding_errors": encoding_errors,
        "separator": repr(separator),
        "format": format,
    }
    units: list[Unit] = []
    whole: list[SourceFile] = []
    formats: dict[str, int] = {}
    for file in files:
        kind = format_of(file) if format == "auto" else format
        if file.unpacked_name.endswith(JSON_SUFFIX):
            formats[kind] = formats.get(kind, 0) + 1
        if kind == "text" and not separator:
            whole.append(file)
            continue
        units.extend(_cut_files(whole, encoding_errors, target))
        whole.clear()
        if kind == "json":
            units.append(ArrayUnit(file, text_key, encoding_errors))
        elif kind == "jsonl":
            units.extend(cut_records(file, b"\n", text_key, encoding_errors, target))
        elif separator:
            units.extend(cut_records(file, separator.encode("utf-8"), None, encoding_errors, target))
    units.extend(_cut_files(whole, encoding_errors, target))
    return Source("text", settings, tuple(units), tuple(sorted(formats.items())))


def format_of(file: SourceFile) -> str:
    """`text`, `jsonl` or `json`. Raises DataError for a file whose name says that it is something else."""
    name = file.unpacked_name
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if name.endswith(JSON_SUFFIX):
        return looks_like(file)
    if name.endswith(OTHER_ARCHIVES):
        raise DataError(
            "data.path",
            file.path,
            f"is a compressed file or an archive, of which only {' and '.join(CODECS)} are read",
            "unpack it, or leave it out with data.glob (--glob)",
        )
    if name.endswith((*PARQUET_SUFFIXES, *OTHER_TABLES)):
        raise DataError(
            "data.path",
            file.path,
            "is a table and no text",
            "read Parquet with data=parquet (--format parquet), or leave it out with data.glob (--glob)",
        )
    return "text"


def parquet_source(
    inputs: Sequence[str | Path],
    *,
    glob: str = "**/*.parquet",
    text_key: str = "text",
    encoding_errors: str = "strict",
    follow_links: bool = False,
) -> Source:
    """Parquet files; a document a row of the string column `text_key`. Reads the footer of every file."""
    files = list_files(inputs, glob, follow_links)
    target = unit_bytes(files)
    units = [unit for file in files for unit in cut_parquet(file, text_key, encoding_errors, target)]
    if not units:
        raise DataError("data.path", inputs[0], f"its {len(files)} Parquet files have no rows", "give files with rows")
    settings = {"source": "parquet", "text_key": text_key, "encoding_errors": encoding_errors}
    return Source("parquet", settings, tuple(units))


def list_files(inputs: Sequence[str | Path], glob: str, follow_links: bool = False) -> list[SourceFile]:
    """The non-empty files among `inputs`, input by input and then by name.

    Args:
        follow_links: take files that symbolic links in a folder lead to, wherever they are. Otherwise a link must be
            relative and lead to near the folder: see `LINK_LEVELS`.

    Raises:
        DataError: an input is missing or not readable, or has no matching or only empty files; or a link leads away.
        ConfigError: a file is reached twice.
    """
    files: list[SourceFile] = []
    for given in map(Path, inputs):
        path = given.expanduser().absolute()
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            raise unreadable(given, error) from None
        found = _matching(path, glob) if is_folder else [_regular(path, given)]
        if is_folder and not follow_links:
            _refuse_links_away(path, found)
        if not found:
            raise DataError(
                "data.path",
                given,
                f"has no files that match data.glob={glob!r}",
                "check the path and data.glob (--glob)",
            )
        prefix = f"{path.name}/" if len(inputs) > 1 and is_folder else ""
        files += [replace(file, name=prefix + file.name) for file in found]
    _refuse_doubles(files)
    if not any(file.size for file in files):
        raise DataError(
            "data.path", inputs[0], f"has no text: all {len(files)} files are empty", "give files with text"
        )
    return [file for file in files if file.size]


def given_path(path: str) -> str:
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
    file = SourceFile(str(path), name, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)
    return file, stat.S_ISREG(status.st_mode)


def _regular(path: Path, given: str | Path) -> SourceFile:
    file, is_regular = _stat(path, path.name)
    if not is_regular:
        raise DataError("data.path", given, "is neither a file nor a folder", "give a file or a folder of files")
    return file


def _refuse_links_away(folder: Path, files: Iterable[SourceFile]) -> None:
    """Raises DataError for a symbolic link that is absolute or leads further away than `LINK_LEVELS`."""
    near = real_path(folder)
    for _ in range(LINK_LEVELS):
        near = near.parent
    for file in files:
        path = Path(file.path)
        if not path.is_symlink():
            continue
        target = path.readlink()
        if target.is_absolute() or not real_path(path).is_relative_to(near):
            raise DataError(
                "data.path",
                file.path,
                f"is a symbolic link that leads away from its folder, to {target}",
                "set data.follow_links=true (--follow-links) if you trust all links there, or give the file itself",
            )


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


def unit_bytes(files: Sequence[SourceFile]) -> int:
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


def cut_records(
    file: SourceFile, separator: bytes, text_key: str | None, encoding_errors: str, target: int
) -> Iterator[RecordsUnit]:
    # Where a separator can overlap itself ("\n\n" in "\n\n\n"), its places depend on where the search began:
    # no cuts.
    overlaps = any(separator[:i] == separator[-i:] for i in range(1, len(separator)))
    if file.codec is not None:  # how long it is unpacked is not known, and no place in it is reached without the rest
        yield RecordsUnit(file, 0, sys.maxsize, separator, text_key, encoding_errors)
        return
    step = file.size if overlaps else target
    for start in range(0, file.size, step):
        yield RecordsUnit(file, start, min(start + step, file.size), separator, text_key, encoding_errors)
