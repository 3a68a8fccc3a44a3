"""Prepared folders, made in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from windlass.data import prepare as prepare_module
from windlass.data.manifest import Manifest
from windlass.data.shard_writer import write_unit
from windlass.data.sources import Source, text_source
from windlass.data.tokenizer import ByteTokenizer, Tokenizer
from windlass.data.worker import Finished, Setup, Task


class InProcessPool:
    """What `WorkerPool` does, without the half second that its processes need to start."""

    def __init__(self, setup: Setup, num_workers: int) -> None:
        self._setup = setup

    def __enter__(self) -> InProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        setup = self._setup
        for task in tasks:
            write_unit(
                task.unit,
                task.index,
                task.fingerprint,
                setup.tokenizer,
                setup.folder,
                setup.validation_fraction,
            )
            yield Finished(task.index)


def prepare_in_process(
    source: Source, out_dir: Path, fraction: float = 0.3, tokenizer: Tokenizer | None = None
) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "WorkerPool", InProcessPool)
        return prepare_module.prepare(
            source, tokenizer or ByteTokenizer(), out_dir, validation_fraction=fraction, progress=False
        )


def jsonl_source(path: Path, texts: Sequence[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return text_source([path])
