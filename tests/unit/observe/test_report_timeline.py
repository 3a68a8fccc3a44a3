"""The timeline of a run: what it takes from the files of a run, and that long runs stay readable."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from windlass.observe.report import RunHistory
from windlass.observe.report_plots import LIGHT, _png
from windlass.observe.report_timeline import (
    NUM_BINS,
    Bar,
    Pause,
    attempts,
    draw_timeline,
    lanes,
    thinned,
    without_long_pauses,
)

T0 = 1_790_000_000.0


def event(time: float, kind: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"time": T0 + time, "kind": kind, "step": step, **fields}


def run_of(events: list[dict[str, Any]], progress: list[tuple[float, int]]) -> RunHistory:
    records = [{"step": step, "train/loss": 1.0, "time": T0 + time} for time, step in progress]
    return RunHistory("a run", records, events, [(T0 + time, step) for time, step in progress], [], None)


def killed_run(steps: int = 20, every: int = 2, num_kills: int = 1, log_every: int = 1) -> RunHistory:
    """Attempts of `steps` steps of a second, each killed half a second after its last one; the next is up 5 s later."""
    events, progress, now, step = [event(0, "start", 0)], [], 0.0, 0
    for attempt in range(num_kills + 1):
        if attempt:
            step -= step % every
            source = ("local_ram", "parity", "durable")[attempt % 3]
            events += [
                event(now + 4.9, "recovered", step, source=source, lost_nodes=attempt % 2, seconds=1.0),
                event(now + 4.95, "restart", step, count=attempt),
                event(now + 5, "start", step),
            ]
            now += 5
        for _ in range(steps):
            now, step = now + 1, step + 1
            if step % log_every == 0:
                progress.append((now, step))
            if step % every == 0:
                events.append(
                    event(now + 0.9, "snapshot_committed", step, seconds=0.5, copy_s=0.2, encode_s=0.2,
                          ended=T0 + now + 0.6)
                )  # fmt: skip
    return run_of(events, progress)


def test_a_kill_is_a_pause_with_what_it_cost() -> None:
    # 21 steps: the last snapshot that counts is of step 20.
    found, pauses = attempts(killed_run(21, num_kills=1))
    assert [(attempt.steps[0], attempt.steps[-1]) for attempt in found] == [(0, 21), (20, 41)]
    assert [(pause.begin - T0, pause.end - T0) for pause in pauses] == [(21.0, 26.0)]
    pause = pauses[0]
    assert (pause.step, pause.lost_steps, pause.was_stopped) == (20, (1, 1), False)
    assert (pause.source, pause.lost_nodes) == ("parity", 1)


def test_steps_that_no_line_tells_of_are_a_range() -> None:
    run = run_of(
        [event(0, "start", 0), event(30, "recovered", 20, source="durable"), event(31, "start", 20)],
        [(10, 10), (20, 20), (25, 25), (40, 30)],
    )
    assert attempts(run)[1][0].lost_steps == (5, 9)


def test_a_stop_on_request_loses_nothing() -> None:
    events = [event(0, "start", 0), event(11, "preempted", 10), event(500, "recovered", 10), event(501, "start", 10)]
    (pause,) = attempts(run_of(events, [(5, 5), (10, 10), (510, 15)]))[1]
    assert pause.was_stopped and pause.lost_steps == (0, 0)
    assert (pause.begin - T0, pause.end - T0) == (11.0, 501.0)


def test_a_snapshot_is_drawn_when_it_was_and_not_when_it_was_heard_of() -> None:
    found = lanes(killed_run(2, num_kills=0))
    assert set(found) == {"copy", "parity, commit"}
    (copy,), (commit,) = found["copy"], found["parity, commit"]
    assert (copy.begin - T0, copy.end - T0) == pytest.approx((2.1, 2.3))
    assert (commit.begin - T0, commit.end - T0) == pytest.approx((2.3, 2.6))


def test_an_older_persist_without_its_end_is_drawn_up_to_its_event() -> None:
    found = lanes(run_of([event(10, "persisted", 5, seconds=2.0)], []))
    assert [(bar.begin - T0, bar.end - T0) for bar in found["to disk"]] == [(8.0, 10.0)]


def test_many_bars_become_the_share_of_time_that_they_fill() -> None:
    bars = [Bar(second, second + 0.25) for second in range(5000)]
    few = thinned(bars, 0.0, 5000.0)
    assert len(few) <= NUM_BINS
    assert sum((bar.end - bar.begin) * bar.busy for bar in few) == pytest.approx(5000 * 0.25)
    assert all(bar.busy == pytest.approx(0.25, rel=0.1) for bar in few)
    assert thinned(bars[:10], 0.0, 10.0) == bars[:10]


def test_a_long_pause_takes_little_of_the_axis() -> None:
    day = Pause(T0 + 3600, T0 + 90_000, 5, (0, 0), True, None, 0)
    place, longest = without_long_pauses([day], T0, T0 + 93_600)
    assert longest == pytest.approx(0.05 * 7200)
    assert place(T0 + 3600) == 3600 and place(T0 + 90_000) == pytest.approx(3600 + longest)
    assert place(T0 + 93_600) == pytest.approx(7200 + longest)
    assert place(T0 + 3600) <= place(T0 + 50_000) <= place(T0 + 90_000)


@pytest.mark.slow
def test_a_run_of_thousands_of_snapshots_is_drawn_with_few_shapes() -> None:
    run = killed_run(steps=400, every=1, num_kills=6)
    assert len(run.of_kind("snapshot_committed")) == 2800
    figure = Figure()
    assert draw_timeline(figure, run, LIGHT)
    top, foot = figure.axes
    assert len(foot.patches) <= 2 * NUM_BINS + 6 and len(top.lines) == 7 + 6
    assert [label.get_text() for label in foot.get_yticklabels()] == ["copy", "parity, commit"]
    legend = top.get_legend_handles_labels()[1]
    assert legend == ["went on from parity", "went on from disk", "went on from local memory"]
    texts = [text.get_text() for text in top.texts]
    assert texts[0] == "step 400, lost 0, 1 node\n4.1 s" and 3 <= len(texts) <= 6


def test_every_other_event_has_a_row_of_its_own() -> None:
    run = killed_run(4)
    run.events.extend([event(3, "persist_failed", 2), event(3.5, "eval", 3), event(3.6, "something_new", 3)])
    figure = Figure()
    draw_timeline(figure, run, LIGHT)
    rows = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert rows == ["copy", "parity, commit", "eval", "persist failed", "something new"]


def test_a_run_without_events_has_no_timeline() -> None:
    assert not draw_timeline(Figure(), run_of([], [(1, 1)]), LIGHT)


@pytest.mark.slow
def test_words_of_events_are_drawn_as_they_are() -> None:
    run = killed_run()
    run.events.append(event(3, "$\\frac{$ a $b$", 3))
    for recovered in run.of_kind("recovered"):
        recovered["source"] = "$\\bad{$\x1b" + 500 * "x"
    figure = Figure()
    assert draw_timeline(figure, run, LIGHT)
    assert _png(figure, LIGHT)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert "\\$\\frac{\\$ a \\$b\\$" in labels  # matplotlib's escapes for text that is no formula
    assert all(len(text) < 100 for text in figure.axes[0].get_legend_handles_labels()[1])
