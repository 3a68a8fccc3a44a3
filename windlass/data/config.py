"""The settings of the data that a run trains on. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, cast

from windlass.bounds import bounded, check_bounds
from windlass.errors import require
from windlass.registry import Registry

if TYPE_CHECKING:
    from windlass.data.sources import Source

SOURCES = Registry("data")
BYTES = "bytes"
"""The tokenizer that needs no file."""


class Borders(StrEnum):
    """The ways to respect borders between the documents that are packed into one sequence."""

    none = "none"
    loss = "loss"
    attention = "attention"


class EncodingErrors(Enum):
    """The ways to treat bytes that are not UTF-8: an error, U+FFFD, nothing."""

    strict = "strict"
    replace = "replace"
    ignore = "ignore"


class TextFormat(Enum):
    """The ways to read text files: by their names, as documents, as a JSON row a line, as a JSON array of rows."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    json = "json"


class ChatFormat(Enum):
    """The ways to read a row of conversations: by its keys, or as one of them says."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"


class TooLong(StrEnum):
    """The ways to treat documents that are longer than a sample."""

    truncate = "truncate"
    drop = "drop"
    error = "error"


class Packing(StrEnum):
    """The ways to make samples of whole documents: as many as fit into each, or one each."""

    documents = "documents"
    none = "none"


@dataclass
class DataConfig:
    """The settings of a data group. `borders`: see `Borders`; a label across a border does not count unless `none`."""

    name: str = "stdlib"
    borders: Borders = Borders.loss
    prefetch: int = bounded(4, at_least=1)
    """Micro-batches that a rank's background thread keeps ready."""
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_bounds(self, "data")


@dataclass
class PreparedDataConfig(DataConfig):
    """A group whose text is tokenised before the run, once, into `cache_dir`."""

    tokenizer: str | None = None
    """`bytes`, or the path of a Hugging Face `tokenizer.json`; null is the folder of the model, `bytes` where it has
    none."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null is `$XDG_CACHE_HOME/windlass` or `~/.cache/windlass`."""
    validation_fraction: float = bounded(0.05, above=0, below=1)
    num_workers: int | None = bounded(None, at_least=1, fix="leave it null for one process a core")
    """Processes that tokenise; null is one a core."""

    def source(self) -> Source:
        """The documents that are to be tokenised. Raises ConfigError and DataError."""
        return cast("Source", SOURCES.build(self))


@dataclass
class StdlibDataConfig(PreparedDataConfig):
    """The `.py` files of the running Python's standard library, split into train and validation by file."""


@dataclass
class TextDataConfig(PreparedDataConfig):
    """Text files (a document each) and JSON files (a document a row) in `path`, a file or folder; `.gz`, `.zst` too."""

    name: str = "text"
    path: str = "???"
    glob: str = "**/*"
    format: TextFormat = TextFormat.auto
    """`auto` goes by the names: `.jsonl` and `.ndjson` have a JSON row a line; `.json` files that begin with `[` are an
    array of rows, those whose first line is a row have a row a line; all others are text."""
    follow_links: bool = False
    """Take the files that symbolic links lead to, wherever; else only of relative links to near `path`."""
    text_key: str = "text"
    """The field of a JSON line that holds the text."""
    encoding_errors: EncodingErrors = EncodingErrors.strict
    """The way to treat text that is not UTF-8."""
    separator: str | None = None
    """The separator of documents in a text file, e.g. `<|endoftext|>` or `\\n\\n`; null: a file is one document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.separator != "", "data.separator", "''", "must not be empty", "leave it null")


@dataclass
class ParquetDataConfig(PreparedDataConfig):
    """Parquet files in `path`, a file or folder; a document a row of the column `text_key`."""

    name: str = "parquet"
    path: str = "???"
    glob: str = "**/*.parquet"
    follow_links: bool = False
    text_key: str = "text"
    encoding_errors: EncodingErrors = EncodingErrors.strict


@dataclass
class ChatDataConfig(PreparedDataConfig):
    """Conversations, a row each, in JSON Lines, JSON arrays and Parquet; answers alone are learned.

    `path` is a file, a folder, or what `windlass data prepare --format chat` wrote.
    """

    name: str = "chat"
    borders: Borders = Borders.attention
    tokenizer: str | None = None
    """The Hugging Face folder with the tokenizer and its chat template; null is the folder of the model."""
    path: str = "???"
    glob: str = "**/*"
    follow_links: bool = False
    format: ChatFormat = ChatFormat.auto
    """`auto` goes by the keys of each row."""
    packing: Packing = Packing.documents
    too_long: TooLong = TooLong.truncate
    """The way to treat conversations of more than `train.seq_len` tokens."""


@dataclass
class TokensDataConfig(DataConfig):
    """A folder that `windlass data prepare` wrote."""

    name: str = "tokens"
    path: str = "???"


SOURCES.add("stdlib", StdlibDataConfig, "windlass.data.sources:build_stdlib")
SOURCES.add("text", TextDataConfig, "windlass.data.sources:build_text")
SOURCES.add("parquet", ParquetDataConfig, "windlass.data.sources:build_parquet")
SOURCES.add("chat", ChatDataConfig, "windlass.data.chat:build_chat")
SOURCES.add("tokens", TokensDataConfig)
