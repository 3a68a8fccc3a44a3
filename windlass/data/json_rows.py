"""Documents in JSON: the text of a row, and files that are one array of rows. Torch-free."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from windlass.data.source_files import (
    BLOCK_BYTES,
    Document,
    SourceFile,
    check_document,
    not_utf8,
    open_text,
    shortened,
)
from windlass.data.tally import Tally
from windlass.errors import DataError

Refusal = Callable[[str, str], DataError]
"""Rule and fix to the error that names the row."""

_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)
"""No number of a row of text is used, and one of 5,000 digits takes its time."""
ROW_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= 20 else float(digits))
"""Keeps the numbers of a row, which a description of a tool may hold."""


class Row(NamedTuple):
    """A row that is not a document as it is."""

    identity: str
    value: Any
    num_bytes: int
    refused: Refusal


LONGEST_WORD = len("-Infinity") + len("\\ud83d\\ude00")
"""The longest word that may be cut off at the end of a block; its begin is that far before the end, at most."""
AS_TEXT = "set data.format=text (--format text) if the file is a document as it is"


def parse_row(row: str, refused: Refusal, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The JSON value `row`. Raises what `refused` makes."""
    try:
        return decoder.decode(row)
    except json.JSONDecodeError as error:
        raise refused(f"is not JSON ({error.msg})", "mend or remove the line") from None
    except RecursionError:
        raise refused("nests too deep", "mend or remove the line") from None


def text_of_row(value: object, text_key: str, encoding_errors: str, tally: Tally, refused: Refusal) -> str:
    """The text of a row, which is to be an object that has it under `text_key`. Raises what `refused` makes."""
    if not isinstance(value, dict):
        raise refused(f"must be a JSON object, not {json_type(value)}", f"mend the line, or {AS_TEXT}")
    if text_key not in value:
        keys = _printable(shortened(", ".join(value) or "none"))
        raise refused(
            f"has no key data.text_key={text_key!r}; its keys are: {keys}",
            "set data.text_key (--text-key) to the one that holds the text",
        )
    text = value[text_key]
    if not isinstance(text, str):
        raise refused(
            f"must hold a string under data.text_key={text_key!r}, not {json_type(text)}",
            "mend the line, or set data.text_key (--text-key) to the key that holds the text",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # only an escape can smuggle in half of a surrogate pair
        try:
            text = text.encode("utf-8", encoding_errors).decode("utf-8")
        except UnicodeEncodeError:
            raise refused(
                "escapes half of a surrogate pair, which no UTF-8 text can hold",
                "mend the line, or set data.encoding_errors=replace (--encoding-errors replace)",
            ) from None
        tally.mended_documents += 1
    return text


@dataclass(frozen=True)
class ArrayUnit:
    """A file that is one JSON array; a document is an object of it."""

    file: SourceFile
    text_key: str
    encoding_errors: str

    @property
    def num_bytes(self) -> int:
        return self.file.size

    def documents(self, tally: Tally) -> Iterator[Document]:
        for row in self._elements(tally, _DECODER):
            text = text_of_row(row.value, self.text_key, self.encoding_errors, tally, row.refused)
            if text:
                yield Document(row.identity, text, row.num_bytes)
            else:
                tally.empty_documents += 1

    def rows(self, tally: Tally) -> Iterator[Row]:
        return self._elements(tally, ROW_DECODER)

    def _elements(self, tally: Tally, decoder: json.JSONDecoder) -> Iterator[Row]:
        for index, (value, size) in enumerate(self._values(tally, decoder)):
            yield Row(f"{self.file.name}\0{index}", value, size, self._refusal(f"{self.file.path}[{index}]"))

    def _values(self, tally: Tally, decoder: json.JSONDecoder) -> Iterator[tuple[Any, int]]:
        """Each element, and about how many bytes it takes. One is in memory at a time, and a block of the file."""
        refused = self._refusal(self.file.path)
        with open_text(self.file) as stream:
            text = _Text(self.file, stream, self.encoding_errors, tally, decoder)
            if text.next_character() != "[":
                raise refused("is not a JSON array, as its beginning said", "mend the file")
            text.position += 1
            closing = text.next_character() == "]"
            while not closing:
                yield text.next_value(refused)
                end = text.next_character()
                if end not in (",", "]"):
                    raise refused("is not JSON (a comma or the end of the array is missing)", f"mend it, or {AS_TEXT}")
                closing = end == "]"
                text.position += not closing
            text.position += 1
            if text.next_character():
                raise refused("has more after the end of its JSON array", f"mend it, or {AS_TEXT}")

    def _refusal(self, place: str) -> Refusal:
        return lambda rule, fix: DataError("data.path", place, rule, fix)


class _Text:
    """The part of a file's text that is not parsed yet, read a block at a time."""

    def __init__(
        self, file: SourceFile, stream: BinaryIO, encoding_errors: str, tally: Tally, decoder: json.JSONDecoder
    ) -> None:
        self._file, self._stream, self._errors, self._tally = file, stream, encoding_errors, tally
        self._row_decoder = decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._num_read, self._is_over, self._is_mended = 0, False, False
        self._text, self.position = "", 0
        while not self._text and self._more(BLOCK_BYTES):
            pass
        self._text = self._text.removeprefix("\ufeff")

    def next_character(self) -> str:
        """Goes to the next character that is no blank, and returns it; empty at the end. It is at `position` then."""
        while True:
            while self.position < len(self._text):
                if self._text[self.position] not in " \t\r\n":
                    return self._text[self.position]
                self.position += 1
            if not self._more(BLOCK_BYTES):
                return ""

    def next_value(self, refused: Refusal) -> tuple[Any, int]:
        """The JSON value that comes next, and its length. What is cut off is read on, in blocks that double."""
        self.next_character()
        size = BLOCK_BYTES
        while True:
            try:
                value, end = self._row_decoder.raw_decode(self._text, self.position)
                length = end - self.position
                if end < len(self._text) or not self._more(size):  # a number may go on behind its end
                    self.position += length
                    return value, length
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_WORD
                if not is_cut or not self._more(size):
                    raise refused(f"is not JSON ({error.msg})", f"mend it, or {AS_TEXT}") from None
            except RecursionError:
                raise refused("nests too deep", f"mend it, or {AS_TEXT}") from None
            check_document(self._file, len(self._text) - self.position)
            size *= 2

    def _more(self, size: int) -> bool:
        """Reads on, and forgets what was parsed. False at the end."""
        if self._is_over:
            return False
        block = self._stream.read(size)
        self._is_over = not block
        pending, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(block, final=self._is_over)
        except UnicodeDecodeError as error:
            if self._errors == "strict":
                raise not_utf8(self._file, self._num_read - len(pending) + error.start) from None
            if not self._is_mended:  # once a file: which of its documents they are in is not known here
                self._tally.mended_documents += 1
                self._is_mended = True
            self._decoder = codecs.getincrementaldecoder("utf-8")(self._errors)
            text = self._decoder.decode(pending + block, final=self._is_over)
        self._num_read += len(block)
        self._text, self.position = self._text[self.position :] + text, 0
        return not self._is_over or bool(text)


def json_type(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def looks_like(file: SourceFile) -> str:
    """The way to read a `.json` file: `json`, an array of rows; `jsonl`, where its first line is a row; else `text`."""
    with open_text(file) as stream:
        start = stream.read(BLOCK_BYTES).decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    if start.startswith("["):
        return "json"
    line, newline, _ = start.partition("\n")
    try:
        is_row = isinstance(_DECODER.decode(line.strip()), dict)
    except (json.JSONDecodeError, RecursionError):
        is_row = not newline and start.startswith("{") and len(start) > BLOCK_BYTES // 2
    return "jsonl" if is_row else "text"
