"""Reads `metrics.jsonl` and `events.jsonl`, which may be damaged, or somebody else's. Torch-free."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from windlass.errors import RunFolderError
from windlass.untrusted import Malformed, convert, parse_json, read_bytes

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
NONFINITE = "_nonfinite"
"""`"train/loss": NaN` is no JSON; it is written as `"train/loss": null, "train/loss_nonfinite": "nan"`."""

_MAX_FILE_BYTES, _MAX_LINE_BYTES = 4 << 30, 1 << 20
_MAX_STEP, _MAX_FIGURE, _MAX_TIME = 1 << 53, 1e100, float(1 << 33)
"""The largest figures that a run logs: dates and axes do not take larger ones."""
_EVENT_FIELDS: dict[str, Any] = {"kind": str, "source": str, "lost_nodes": list[Any] | int}
_EVENT_NUMBERS = ("seconds", "copy_s", "unigram_entropy_nats")


@dataclass(frozen=True)
class Lines:
    """The lines of a file that are what a run writes, and how many are not: folders are found, and files damaged."""

    records: list[dict[str, Any]]
    num_unreadable: int = 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The figures of each step, by rising step: the lines of a step merged key by key, the last line winning.

    A step that was trained again after a recovery has its newest figures. Non-finite floats are floats again.

    Args:
        path: `metrics.jsonl`, or the run's folder.

    Raises:
        RunFolderError: the file is missing, or a line other than a torn last one is not what a run writes.
    """
    return merged(read_lines(path, METRICS_FILE, skip=False).records)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events as they were written. `path` and errors as in `read_metrics`, with `events.jsonl`."""
    return read_lines(path, EVENTS_FILE, skip=False).records


def merged(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """See `read_metrics`."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record)
    return [steps[step] for step in sorted(steps)]


def progress(records: Iterable[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """(unix time, step) of every line of training as it was written."""
    return [(line["time"], line["step"]) for line in records if "train/loss" in line and "time" in line]


@dataclass(frozen=True)
class Replay:
    """A step that was trained more than once: a recovery runs the steps since the checkpoint again."""

    step: int
    losses: tuple[float | None, ...]
    """`train/loss` of each time, oldest first."""
    bit_equal: bool
    """True if all the losses are the same float, bit for bit."""


def replayed(path: Path) -> list[Replay]:
    """The steps with more than one training line, by rising step. `path` and errors as in `read_metrics`."""
    return replays(read_lines(path, METRICS_FILE, skip=False).records)


def replays(records: Iterable[Mapping[str, Any]]) -> list[Replay]:
    """See `replayed`."""
    losses: dict[int, list[float | None]] = {}
    for record in records:
        if "train/loss" in record:
            losses.setdefault(record["step"], []).append(record["train/loss"])
    return [
        Replay(step, tuple(values), len({_bits(value) for value in values}) == 1)
        for step, values in sorted(losses.items())
        if len(values) > 1
    ]


def _bits(value: float | None) -> bytes | None:
    """Tells -0.0 from 0.0, and finds NaN equal to NaN."""
    return None if value is None else struct.pack("<d", value)


def read_lines(path: Path, name: str, skip: bool = True) -> Lines:
    """Reads the file `name` of the run's folder `path`, or `path` itself.

    Args:
        name: `METRICS_FILE` or `EVENTS_FILE`.
        skip: leave out, and count, the lines that are not what a run writes; a torn last line counts for nothing.

    Raises:
        RunFolderError: the file is missing or cannot be read, or has such a line and they are not to be skipped.
    """
    file = path / name if path.is_dir() else path
    try:
        content = read_bytes(file, _MAX_FILE_BYTES)
    except FileNotFoundError as error:
        fix = "give the folder of a run that has logged a step"
        raise RunFolderError("run_dir", file.parent, f"has no {name}", fix) from error
    except (Malformed, OSError) as error:
        rule = f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        raise RunFolderError("run_dir", file, rule, "mend its permissions, or move it away") from error
    check = _check_figures if name == METRICS_FILE else _check_event
    records: list[dict[str, Any]] = []
    num_unreadable = 0
    lines = content.split(b"\n")[:-1]  # what follows the last newline is torn
    for number, line in enumerate(lines, start=1):
        try:
            record = _restored(convert(parse_json(line, _MAX_LINE_BYTES), dict[str, Any]))
            check(record)
            records.append(record)
        except ValueError as error:
            if not skip:
                rule = f"line {number} is not what a run writes: {error}"
                raise RunFolderError("run_dir", file, rule, "delete that line") from error
            num_unreadable += 1
    return Lines(records, num_unreadable)


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the floats that JSON cannot hold put back under their keys."""
    for key in [key for key in record if key.endswith(NONFINITE)]:
        record[key.removesuffix(NONFINITE)] = float(convert(record.pop(key), Literal["nan", "inf", "-inf"], key))
    return record


def _check_figures(record: Mapping[str, Any]) -> None:
    """Raises Malformed unless these are figures of a step."""
    _check_step(record.get("step"))
    for key, value in record.items():
        if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            _check_number(key, value, -_MAX_FIGURE, _MAX_FIGURE)
    _check_moments(record)


def _check_event(record: Mapping[str, Any]) -> None:
    """Raises Malformed unless this is an event whose fields are what a report takes them for."""
    for key, kind in _EVENT_FIELDS.items():
        if record.get(key) is not None:
            convert(record[key], kind, key)
    for key in _EVENT_NUMBERS:
        if record.get(key) is not None:
            _check_number(key, record[key], 0.0, _MAX_FIGURE)
    if record.get("step") is not None:
        _check_step(record["step"])
    _check_moments(record)


def _check_moments(record: Mapping[str, Any]) -> None:
    for key in ("time", "ended"):
        if key in record:
            _check_number(key, record[key], 0.0, _MAX_TIME)


def _check_step(step: Any) -> None:
    if not 0 <= convert(step, int, "step") < _MAX_STEP:
        raise Malformed(f"`step` is {step}")


def _check_number(key: str, value: Any, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise Malformed(f"`{key[:200]}` is {str(value)[:40]}, not a number from {least:g} to {most:g}")
