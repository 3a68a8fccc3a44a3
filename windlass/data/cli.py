"""`windlass data prepare`: text, JSON Lines, Parquet or conversations to a folder of token shards. Torch-free."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.data.chat import chat_source
from windlass.data.chat_tokenizer import load_chat_tokenizer
from windlass.data.config import BYTES, ChatFormat, EncodingErrors
from windlass.data.manifest import SETTINGS, Manifest
from windlass.data.outputs import refuse_inside
from windlass.data.prepare import prepare
from windlass.data.source_files import PARQUET_SUFFIXES
from windlass.data.sources import Source, list_files, parquet_source, text_source
from windlass.data.tally import left_out
from windlass.data.tokenizer import Tokenizer, load_tokenizer
from windlass.errors import ConfigError, require
from windlass.text import override, printable

AS = {"json": "arrays of rows", "jsonl": "a row a line", "text": "text"}

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: SubParsers) -> argparse.ArgumentParser:
    """Add the verb `prepare` to those of `windlass data`. `run` does what it parses."""
    parser = subparsers.add_parser(
        "prepare",
        help="tokenise text, JSON Lines or Parquet into a folder",
        description="Tokenises text into a folder of memory-mapped Arrow shards, in parallel."
        " Interrupted at any time, the same command goes on where it stopped.",
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a file, or a folder of files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|PATH",
        help="UTF-8 bytes, or a Hugging Face tokenizer.json (default: bytes); of conversations the folder of a model",
    )
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", "text", "jsonl", "json", "parquet", "chat"),
        help="text: documents; jsonl: a JSON row a line; json: an array of rows; auto goes by the names of the files,"
        " for .json by how they begin, and takes all others for text. Text and JSON may be packed (.gz, .zst). chat:"
        " conversations, a row each, in JSON Lines, JSON arrays or Parquet, whose answers are learned",
    )
    parser.add_argument(
        "--chat-format",
        default="auto",
        choices=[choice.value for choice in ChatFormat],
        help="what the rows of --format chat are (default: auto, by their keys)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="JSON field or Parquet column of the text (default: text)",
    )
    parser.add_argument("--glob", metavar="PATTERN", help="files to take from folders (default: **/*)")
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="take the files that symbolic links lead to, wherever that is (default: only near INPUT)",
    )
    parser.add_argument(
        "--separator",
        metavar="STRING",
        help=r"what ends a document in a text file, e.g. '<|endoftext|>' or '\n\n' (default: end of file)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents that is kept for validation (default: 0.05)",
    )
    parser.add_argument(
        "--encoding-errors",
        default="strict",
        choices=[choice.value for choice in EncodingErrors],
        help="what to do about text that is not UTF-8 (default: strict, refuse it)",
    )
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one a core)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepare, and print a summary. Returns the exit code; raises ConfigError and DataError."""
    fraction, num_workers = args.validation_fraction, args.num_workers
    require(0 < fraction < 1, "--validation-fraction", fraction, "must be between 0 and 1", "give 0.05")
    require(
        num_workers is None or num_workers >= 1,
        "--num-workers",
        num_workers,
        "must be at least 1",
        "leave it out",
    )
    require(args.separator != "", "--separator", "''", "must not be empty", "leave it out: a file is one document")
    started_at = time.monotonic()
    out_dir = Path(args.out).expanduser()
    refuse_inside(out_dir, args.input, "--out")
    tokenizer = _tokenizer(args)
    source = _source(args)
    is_new = not (out_dir / SETTINGS).exists()
    manifest = prepare(source, tokenizer, out_dir, validation_fraction=fraction, num_workers=num_workers)
    seconds = time.monotonic() - started_at
    sys.stdout.write(_summary(manifest, source, out_dir, seconds, is_new))
    return 0


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.format == "chat":
        return load_chat_tokenizer(None if args.tokenizer == BYTES else args.tokenizer)
    return load_tokenizer(args.tokenizer)


def _source(args: argparse.Namespace) -> Source:
    glob = args.glob or "**/*"
    if args.format == "chat":
        return chat_source(args.input, glob=glob, chat_format=args.chat_format, follow_links=args.follow_links)
    if args.format == "parquet" or (args.format == "auto" and _all_parquet(args.input, glob, args.follow_links)):
        return parquet_source(
            args.input,
            glob=args.glob or "**/*.parquet",
            text_key=args.text_key,
            encoding_errors=args.encoding_errors,
            follow_links=args.follow_links,
        )
    return text_source(
        args.input,
        glob=glob,
        text_key=args.text_key,
        encoding_errors=args.encoding_errors,
        separator=args.separator,
        format=args.format,
        follow_links=args.follow_links,
    )


def _all_parquet(inputs: list[str], glob: str, follow_links: bool) -> bool:
    """True if the files are Parquet, by their names. Raises ConfigError if only some are."""
    are_parquet = [file.name.lower().endswith(PARQUET_SUFFIXES) for file in list_files(inputs, glob, follow_links)]
    if any(are_parquet) and not all(are_parquet):
        raise ConfigError(
            "--format",
            "auto",
            f"{sum(are_parquet)} of the {len(are_parquet)} files are Parquet and the others are not",
            "choose some of them with --glob '**/*.parquet', or say --format parquet",
        )
    return all(are_parquet)


def _summary(manifest: Manifest, source: Source, out_dir: Path, seconds: float, is_new: bool) -> str:
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    num_tokens, num_targets = train.num_tokens + validation.num_tokens, train.num_targets
    answers = f"of {manifest.tally.answers:,} answers"
    learned = f"{num_targets or 0:,} train, {validation.num_targets or 0:,} validation, {answers}"
    num_bytes = sum(shard.num_bytes for split in (train, validation) for shard in split.shards)
    read_as = ", ".join(f"{number:,} .json files as {AS[kind]}" for kind, number in source.formats)
    rows = [
        *([("input", read_as)] if read_as else []),
        ("documents", f"{train.num_documents:,} train, {validation.num_documents:,} validation"),
        ("tokens", f"{train.num_tokens:,} train, {validation.num_tokens:,} validation"),
        *([] if num_targets is None else [("learned", learned)]),
        *((("left out" if number == 0 else ""), clause) for number, clause in enumerate(left_out(manifest.tally))),
        ("tokenizer", f"{manifest.tokenizer['name']}, vocabulary of {manifest.tokenizer['vocab_size']:,}"),
        ("size", f"{source.num_bytes / 1e6:,.1f} MB of text, {num_bytes / 1e6:,.1f} MB of tokens"),
        (
            "speed",
            f"{num_tokens / seconds:,.0f} tokens/s ({seconds:.1f} s)" if is_new else "an earlier run did part or all",
        ),
        (
            "unigram entropy",
            f"{manifest.unigram_entropy_nats:.4f} nats/token on validation: a model must get below it to have"
            " learnt anything from context",
        ),
        (
            "train on it",
            f"windlass train data={'tokens' if num_targets is None else 'chat'} {override('data.path', out_dir)}",
        ),
    ]
    return "".join(f"{name + ':' if name else '':<17}{printable(text)}\n" for name, text in rows)
