"""A process that tokenises units, and the messages between it and its parent. Torch-free.

Not `multiprocessing.Process`: its children import the parent's main module again, which here is often a
training script that imports torch, or one without the `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import os
import queue
import resource
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from windlass.data.documents import Unit, unit_files
from windlass.data.shard_writer import write_unit
from windlass.data.source_files import max_document_bytes
from windlass.data.tokenizer import Tokenizer
from windlass.errors import DataError, WindlassError

PROGRESS_EVERY_S = 0.1
FREE_BYTES = 2 << 30
BYTES_A_TEXT_BYTE = 256
"""A unit may take so much memory for each byte of its largest document, and `FREE_BYTES` more. Tokenizers keep 50 to
200 bytes a byte; what is made to fill a machine (a normalizer that makes a megabyte of a letter) knows no bound."""


@dataclass(frozen=True)
class Setup:
    """The message that a worker gets once, at its start."""

    tokenizer: Tokenizer
    folder: Path
    validation_fraction: float


@dataclass(frozen=True)
class Task:
    index: int
    unit: Unit
    fingerprint: str


@dataclass(frozen=True)
class Advanced:
    """`num_bytes` more of the input are done."""

    num_bytes: int


@dataclass(frozen=True)
class Finished:
    index: int


@dataclass(frozen=True)
class Failed:
    """`error` is the user's to mend; otherwise `trace` tells what went wrong."""

    error: WindlassError | None
    trace: str


def main(fd: int) -> None:
    """Receive a `Setup` and then `Task`s from the socket; send `Advanced`, `Finished` and `Failed`."""
    connection = Connection(fd)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    try:
        setup: Setup = connection.recv()
    except Exception:  # e.g. a tokenizer whose class only the parent's main module knows
        connection.send(Failed(None, traceback.format_exc()))
        return
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    try:
        while True:
            _run(tasks.get(), setup, connection)
    except OSError:  # the parent is gone
        os._exit(1)


def _receive(connection: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # the parent has ended or was killed: so does this process, even in the middle of a unit


def _run(task: Task, setup: Setup, connection: Connection) -> None:
    pending, reported_at = 0, time.monotonic()

    def on_progress(num_bytes: int) -> None:
        nonlocal pending, reported_at
        pending += num_bytes
        if (now := time.monotonic()) - reported_at >= PROGRESS_EVERY_S:
            connection.send(Advanced(pending))
            pending, reported_at = 0, now

    try:
        _limit_memory(task.unit)
        write_unit(
            task.unit,
            task.index,
            task.fingerprint,
            setup.tokenizer,
            setup.folder,
            setup.validation_fraction,
            on_progress,
        )
    except WindlassError as error:
        connection.send(Failed(error, ""))
    except MemoryError:
        connection.send(Failed(_too_large(task.unit), ""))
    except Exception:  # anything else must reach the parent too, with its traceback
        connection.send(Failed(None, traceback.format_exc()))
    else:
        connection.send(Advanced(pending))
        connection.send(Finished(task.index))


def _limit_memory(unit: Unit) -> None:
    """Has an allocation beyond what text of this size takes fail, before the machine runs out of memory. Linux only."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    largest = max(max_document_bytes(file) for file in unit_files(unit))
    wanted = in_use + FREE_BYTES + BYTES_A_TEXT_BYTE * largest
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _too_large(unit: Unit) -> DataError:
    return DataError(
        "data.path",
        max(unit_files(unit), key=max_document_bytes).path,
        "takes more memory to read and tokenise than text of its size does",
        "leave it out with data.glob (--glob), or give another data.tokenizer (--tokenizer)",
    )
