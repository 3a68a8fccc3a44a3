"""`windlass data show`: samples as a model sees them, with what is learned in colour. Torch-free."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from windlass.data.chat import chat_source
from windlass.data.chat_rendering import RowRefused
from windlass.data.chat_tokenizer import ChatTokenizer, Encoded, load_chat_tokenizer
from windlass.data.config import ChatFormat
from windlass.data.prepare import is_prepared
from windlass.data.shards import TokenDataset
from windlass.data.tally import Tally, left_out
from windlass.data.tokenizer import Tokenizer, load_tokenizer
from windlass.errors import require
from windlass.text import printable

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
BEGIN, END = "\u27e6", "\u27e7"
"""Around what is learned where there is no colour."""


@dataclass
class Figures:
    """Counts of rows, and of their tokens."""

    num_rows: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    longest: int = 0
    num_too_long: int = 0

    def add(self, row: Encoded, seq_len: int | None) -> None:
        self.num_rows += 1
        self.num_tokens += len(row.ids)
        self.num_targets += int((row.targets != 0).sum())
        self.longest = max(self.longest, len(row.ids))
        self.num_too_long += seq_len is not None and len(row.ids) > seq_len


def add_parser(subparsers: SubParsers) -> argparse.ArgumentParser:
    """Adds the verb `show` to those of `windlass data`. `run` does what it parses."""
    text = "print samples as a model sees them, with what is learned in colour"
    parser = subparsers.add_parser(
        "show",
        help=text,
        description=f"{text.capitalize()}: of conversations, or of a folder that `windlass data prepare` wrote.",
    )
    parser.add_argument("path", metavar="PATH", help="a file or folder of conversations, or a prepared folder")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the Hugging Face folder (a prepared folder has its own)")
    parser.add_argument("--num", type=int, default=3, metavar="N", help="samples to print (default: 3)")
    parser.add_argument("--split", default="train", choices=("train", "validation"), help="of a prepared folder")
    parser.add_argument("--seq-len", type=int, metavar="T", help="count conversations of more tokens")
    parser.add_argument(
        "--chat-format", default="auto", choices=[choice.value for choice in ChatFormat], help="see data.format"
    )
    parser.add_argument("--glob", default="**/*", metavar="PATTERN", help="files to take from a folder (default: **/*)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints samples and counts. Returns the exit code; raises ConfigError and DataError."""
    require(args.num >= 0, "--num", args.num, "must not be negative", "leave it out")
    require(args.seq_len is None or args.seq_len >= 1, "--seq-len", args.seq_len, "must be at least 1", "leave it out")
    path, tally = Path(args.path).expanduser(), Tally()
    if is_prepared(path):
        require(args.tokenizer is None, "--tokenizer", args.tokenizer, "is in the prepared folder", "leave it out")
        dataset = TokenDataset(path, args.split)
        tally.add(dataset.manifest.tally)
        tokenizer, rows = _tokenizer_of(dataset), _prepared_rows(dataset)
    else:
        chat = load_chat_tokenizer(args.tokenizer)
        tokenizer, rows = chat, _rows(args, chat, tally)
    figures, is_coloured = Figures(), _is_coloured()
    for number, row in enumerate(rows):
        figures.add(row, args.seq_len)
        if number < args.num:
            sys.stdout.write(f"--- {number + 1}: {len(row.ids):,} tokens, {int((row.targets != 0).sum()):,} learned\n")
            sys.stdout.write(shown(row, tokenizer, is_coloured) + "\n")
    sys.stdout.write(_summary(figures, tally, args.seq_len))
    return 0


def shown(row: Encoded, tokenizer: Tokenizer, is_coloured: bool) -> str:
    """The text of a row, with marks or colour for the tokens that are learned; control characters are escaped."""
    parts = []
    for is_target, group in itertools.groupby(range(len(row.ids)), key=lambda i: bool(row.targets[i])):
        text = "\n".join(printable(line) for line in tokenizer.decode(row.ids[list(group)]).split("\n"))
        before, after = (GREEN, PLAIN) if is_coloured else (BEGIN, END)
        parts.append(f"{before}{text}{after}" if is_target else text)
    return "".join(parts)


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _rows(args: argparse.Namespace, tokenizer: ChatTokenizer, tally: Tally) -> Iterator[Encoded]:
    source = chat_source([args.path], glob=args.glob, chat_format=args.chat_format)
    for unit in source.units:
        for document in unit.documents(tally):
            try:
                yield tokenizer.encode_conversation(json.loads(document.text), tally)
            except RowRefused as error:
                assert document.refused is not None
                raise document.refused(error.rule, error.fix) from None


def _prepared_rows(dataset: TokenDataset) -> Iterator[Encoded]:
    starts = dataset.document_starts().tolist()
    for start, stop in itertools.pairwise(starts):
        ids, _ = dataset.window(start, stop - start)
        targets = dataset.targets(start, stop - start)
        yield Encoded(ids, np.ones(len(ids), np.uint8) if targets is None else targets)


def _tokenizer_of(dataset: TokenDataset) -> Tokenizer:
    """The tokenizer that a prepared folder keeps."""
    if dataset.num_targets is not None:
        return load_chat_tokenizer(str(dataset.folder))
    return load_tokenizer(dataset.tokenizer_spec)


def _summary(figures: Figures, tally: Tally, seq_len: int | None) -> str:
    learned = figures.num_targets / max(1, figures.num_tokens)
    rows = [
        ("rows", f"{figures.num_rows:,}"),
        ("tokens", f"{figures.num_tokens:,}, of which {figures.num_targets:,} are learned ({learned:.1%})"),
        ("longest", f"{figures.longest:,} tokens"),
    ]
    if seq_len is not None:
        rows.append(("too long", f"{figures.num_too_long:,} of more than {seq_len:,} tokens (data.too_long)"))
    rows += [("left out", clause) for clause in left_out(tally)]
    return "".join(f"{name + ':':<17}{printable(text)}\n" for name, text in rows)
