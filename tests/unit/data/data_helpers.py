"""Helpers for the tests of windlass.data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.prepared import InProcessPool, jsonl_source, prepare_in_process

__all__ = [
    "InProcessPool",
    "folder_bytes",
    "jsonl_source",
    "make_folder",
    "prepare_in_process",
    "run_python",
    "start_python",
    "without_privileges",
    "write_lossy_tokenizer",
    "write_tokenizer",
]

NOBODY = 65534


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A prepared folder with these texts as documents."""

    def make(texts: Sequence[str], fraction: float = 0.3, name: str = "prepared") -> Path:
        prepare_in_process(jsonl_source(tmp_path / f"{name}.jsonl", texts), tmp_path / name, fraction)
        return tmp_path / name

    return make


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start_python(code: str, *args: object, **kwargs: object) -> subprocess.Popen[str]:
    """Another Python that imports what this one does. Its stdout and stderr are text pipes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if "preexec_fn" in kwargs:  # limits on the process would hit the file that coverage writes at its end
        environment = {key: value for key, value in environment.items() if not key.startswith("COVERAGE_")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,  # type: ignore[arg-type]
    )


def run_python(code: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    process = start_python(code, *args, **kwargs)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read and write everything; as another user it is refused like anybody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def write_tokenizer(folder: Path, eos: str = "</s>") -> Path:
    """A small byte-pair tokenizer.json with the special token `eos`."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the windlass lifts the anchor and the anchor holds"] * 20, trainer)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_lossy_tokenizer(folder: Path) -> Path:
    """A byte-pair tokenizer.json of the letters a and b that passes over all others."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = folder / "lossy.json"
    tokenizer.save(str(path))
    return path
