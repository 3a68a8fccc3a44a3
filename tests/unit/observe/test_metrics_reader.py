"""Lines of metrics and events that no run has written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windlass.errors import RunFolderError
from windlass.observe.metrics_reader import EVENTS_FILE, METRICS_FILE, read_events, read_lines, read_metrics, replayed
from windlass.observe.report import _page_html, _read_run

SOUND = {
    METRICS_FILE: {"step": 3, "tokens": 30, "time": 1.79e9, "train/loss": None, "train/loss_nonfinite": "nan"},
    EVENTS_FILE: {"time": 1.79e9, "kind": "recovered", "step": 3, "source": "parity", "lost_nodes": [1], "seconds": 1},
}
JUNK: list[Any] = [
    "x",
    "<b>",
    True,
    [1],
    {"a": 1},
    -1,
    1e300,
    -1e300,
    "nan",
    2**62,
    [],
    "$\\frac{",
    "\ud800",
    "\x1b[2J",
]


def write(run_dir: Path, name: str, lines: list[bytes]) -> None:
    (run_dir / name).write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("name", [METRICS_FILE, EVENTS_FILE])
def test_lines_of_a_run_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, [json.dumps(SOUND[name]).encode()] * 2)
    lines = read_lines(tmp_path, name)
    assert lines.num_unreadable == 0
    assert len(lines.records) == 2
    if name == EVENTS_FILE:
        assert lines.records[0] == SOUND[name]
    else:
        assert math.isnan(lines.records[0]["train/loss"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (METRICS_FILE, {"step": None}),
        (METRICS_FILE, {"step": "3"}),
        (METRICS_FILE, {"step": 3.0}),
        (METRICS_FILE, {"step": True}),
        (METRICS_FILE, {"step": -1}),
        (METRICS_FILE, {"step": 2**60}),
        (METRICS_FILE, {"time": "x"}),
        (METRICS_FILE, {"time": None}),
        (METRICS_FILE, {"time": 1e300}),
        (METRICS_FILE, {"throughput/mfu": "<img src=x>"}),
        (METRICS_FILE, {"optim/lr": 1e200}),
        (METRICS_FILE, {"optim/lr": [1]}),
        (METRICS_FILE, {"train/loss_nonfinite": "1e999"}),
        (METRICS_FILE, {"train/loss_nonfinite": None}),
        (EVENTS_FILE, {"time": 1e300}),
        (EVENTS_FILE, {"time": -1.0}),
        (EVENTS_FILE, {"time": None}),
        (EVENTS_FILE, {"kind": 3}),
        (EVENTS_FILE, {"step": "3"}),
        (EVENTS_FILE, {"seconds": "long"}),
        (EVENTS_FILE, {"seconds": -1.0}),
        (EVENTS_FILE, {"ended": 1e300}),
        (EVENTS_FILE, {"copy_s": {}}),
        (EVENTS_FILE, {"source": ["parity"]}),
        (EVENTS_FILE, {"lost_nodes": "many"}),
        (EVENTS_FILE, {"unigram_entropy_nats": "low"}),
    ],
    ids=str,
)
def test_a_line_of_other_types_is_counted_and_left_out(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, name, [json.dumps(SOUND[name] | change).encode(), json.dumps(SOUND[name]).encode()])
    lines = read_lines(tmp_path, name)
    assert (len(lines.records), lines.num_unreadable) == (1, 1)
    with pytest.raises(RunFolderError, match=r"line 1 is not what a run writes: .* Fix: delete that line"):
        (read_metrics if name == METRICS_FILE else read_events)(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"\xff\xfe",
        b"",
        b"3",
        b"[]",
        b'{"step": ' + b"9" * 5000 + b"}",
        b"x" * (2 << 20),
    ],
    ids=lambda line: repr(line[:10]),
)
def test_what_is_no_line_at_all_is_counted_too(line: bytes, tmp_path: Path) -> None:
    write(tmp_path, EVENTS_FILE, [line, json.dumps(SOUND[EVENTS_FILE]).encode()])
    assert read_lines(tmp_path, EVENTS_FILE).num_unreadable == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS_FILE)
    with pytest.raises(RunFolderError, match="cannot be read: it is no regular file"):
        read_metrics(tmp_path)


def test_replays_are_those_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, METRICS_FILE, [json.dumps({"step": 1, "train/loss": loss}).encode() for loss in (0.5, 0.5)])
    (replay,) = replayed(tmp_path)
    assert (replay.step, replay.losses, replay.bit_equal) == (1, (0.5, 0.5), True)


keys = st.sampled_from([*SOUND[METRICS_FILE], *SOUND[EVENTS_FILE], "ended", "versions", "copy_s", "a_version", "<i>"])
values = st.sampled_from(JUNK) | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.none()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.tuples(st.sampled_from([METRICS_FILE, EVENTS_FILE]), st.dictionaries(keys, values, max_size=4))),
    kind=st.sampled_from(
        ["start", "restart", "recovered", "done", "preempted", "persisted", "snapshot_committed", "$x"]
    ),
)
def test_no_lines_break_the_page(lines: list[tuple[str, dict[str, Any]]], kind: str, tmp_path: Path) -> None:
    event = SOUND[EVENTS_FILE] | {"kind": kind, "reason": "\x1b[2J\ud800<b>", "versions": {"<b>": "\x9b"}}
    sound = {METRICS_FILE: SOUND[METRICS_FILE], EVENTS_FILE: event}
    for name, line in sound.items():
        changed = [json.dumps(sound[name] | change).encode() for other, change in lines if other == name]
        write(tmp_path, name, [json.dumps(line).encode(), *changed])
    page = _page_html(_read_run(tmp_path), [])
    page.encode()
    assert "<i>" not in page and "<b>" not in page and "\x1b" not in page
