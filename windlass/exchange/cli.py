"""`windlass ckpt export` and `import`: their arguments, and what they print. Torch-free until they run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.errors import EXIT_DONE, require
from windlass.text import printable

if TYPE_CHECKING:
    from windlass.exchange.convert import Exchanged

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

FORMATS = ("hf", "dcp")
FORMAT_HELP = (
    "hf: safetensors and config.json, as Hugging Face transformers has them; dcp: a folder of "
    "torch.distributed.checkpoint"
)
DTYPES = ("float32", "bfloat16")
MAX_SHARD_BYTES = 5_000_000_000


def add_parsers(actions: SubParsers) -> None:
    """Adds `export` and `import` to the actions of `windlass ckpt`."""
    _add_export(actions)
    _add_import(actions)


def _add_export(actions: SubParsers) -> None:
    parser = actions.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face or a torch.distributed.checkpoint folder",
        description="Writes a checkpoint as other programs read it, a tensor at a time, so that a small machine exports"
        " a large model. hf has the weights of a Llama; dcp has everything.",
    )
    parser.add_argument("path", help="a checkpoint, or a run's folder, of which the newest is taken")
    _add_shared(parser, "the folder to write, new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (hf only; default: as in the checkpoint)")
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        metavar="N",
        help=f"most bytes of tensors in one file (hf only; default: {MAX_SHARD_BYTES})",
    )
    parser.set_defaults(run=run_export)


def _add_import(actions: SubParsers) -> None:
    parser = actions.add_parser(
        "import",
        help="make a checkpoint of a Hugging Face or a torch.distributed.checkpoint folder",
        description="Makes a checkpoint from which `windlass train resume=DIR` begins. What a folder does not have"
        " (optimizer state, schedule, data cursor) begins anew with that run. Nothing is unpickled.",
    )
    parser.add_argument("path", type=Path, help="the folder to import")
    _add_shared(parser, "the folder of the new checkpoint, new or empty")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the step at which a run begins from it: its count and its schedule (default: 0)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: float32, in which windlass trains; dcp: as they are)"
    )
    parser.add_argument(
        "--optimizer-class",
        metavar="NAME",
        help="take the folder's optimizer state, as that of this class, e.g. AdamW (dcp only; DCP does not record it)",
    )
    parser.set_defaults(run=run_import)


def _add_shared(parser: argparse.ArgumentParser, output_help: str) -> None:
    parser.add_argument("--format", required=True, choices=FORMATS, help=FORMAT_HELP)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=output_help)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_export(options: argparse.Namespace) -> int:
    """Exports, and says what was written. Raises WindlassError."""
    is_hf = options.format == "hf"
    _refuse_unless(is_hf, options, "--dtype", options.dtype)
    _refuse_unless(is_hf, options, "--max-shard-bytes", options.max_shard_bytes)
    max_shard_bytes = MAX_SHARD_BYTES if options.max_shard_bytes is None else options.max_shard_bytes
    require(max_shard_bytes >= 1, "--max-shard-bytes", max_shard_bytes, "must be at least 1", "leave it out")
    from windlass.exchange import convert as exchange

    if is_hf:
        done = exchange.export_huggingface(options.path, options.output, options.dtype, max_shard_bytes)
    else:
        done = exchange.export_dcp(options.path, options.output)
    return _print(done, "exported", options.json)


def run_import(options: argparse.Namespace) -> int:
    """Imports, and says what was written. Raises WindlassError."""
    step = options.step
    require(step is None or step >= 0, "--step", step, "must not be negative", "leave it out")
    _refuse_unless(options.format == "dcp", options, "--optimizer-class", options.optimizer_class)
    from windlass.exchange import convert as exchange

    if options.format == "hf":
        done = exchange.import_huggingface(options.path, options.output, step, options.dtype)
    else:
        done = exchange.import_dcp(options.path, options.output, step, options.dtype, options.optimizer_class)
    return _print(done, "imported", options.json)


def _refuse_unless(is_right: bool, options: argparse.Namespace, flag: str, value: object) -> None:
    require(is_right or value is None, flag, value, f"says nothing with --format {options.format}", "leave it out")


def _print(done: Exchanged, verb: str, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(done.to_json(), indent=2) + "\n")
        return EXIT_DONE
    size = f"{done.num_tensors} tensors, {done.num_bytes / 2**20:.1f} MiB"
    lines = [f"{verb}  step {done.step} of {done.source} to {done.output} ({size})"]
    lines += [f"note      {note}" for note in done.notes]
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
    return EXIT_DONE
