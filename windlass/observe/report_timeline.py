"""A run's life in one plot: its steps over time, what snapshots did behind them, and how it went on after each end.

Thousands of snapshots are drawn as the share of time that they took, so that a long run is as readable as a short one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from windlass.observe.console import duration
from windlass.text import printable

if TYPE_CHECKING:
    from windlass.observe.report import RunHistory
    from windlass.observe.report_plots import Theme

NUM_BINS = 400
"""The most bars of a lane; narrower than a pixel of a page nobody sees them."""
PAUSE_SHARE, PAUSE_S = 0.05, 60.0
"""A pause between two attempts is drawn no longer than this share of all attempts together, or so many seconds."""
LABEL_SHARE = 0.1
"""The share of the axis that the words beside a pause take."""
BOUNDARY_KINDS = ("restart", "recovered", "start")
"""Events of an attempt that begins."""
STOP_KINDS = ("preempted", "done")
_LINE = "line"
_LANES = ("copy", "parity, commit", "to disk")
_MARKS = ("eval", "snapshot_skipped", "snapshot_given_up", "persist_failed", "skipped_step", *STOP_KINDS)
_MOST_OTHERS, _LONGEST_LABEL = 12, 40
"""Kinds of events that are not known here and have a row of their own; characters of what an event says."""
_MOST_PAUSES = 300
_SOURCES = {"local_ram": "local memory", "parity": "parity", "durable": "disk"}


@dataclass(frozen=True)
class Bar:
    """Something took from `begin` to `end`, seconds, or in between a share `busy` of the time."""

    begin: float
    end: float
    busy: float = 1.0


@dataclass(frozen=True)
class Pause:
    """The time from the last sign of an attempt to the first step of the next."""

    begin: float
    end: float
    step: int
    """The step at which the next attempt goes on."""
    lost_steps: tuple[int, int]
    """At least and at most; lines are written every so many steps."""
    was_stopped: bool
    """On request, or because the run was done."""
    source: str | None
    """The source that the run went on from; None: nothing said."""
    lost_nodes: int


@dataclass(frozen=True)
class Attempt:
    """Times, and the steps that were done then."""

    times: list[float]
    steps: list[int]


@dataclass(frozen=True)
class _Sign:
    time: float
    kind: str
    step: int
    event: dict[str, Any]


def attempts(run: RunHistory) -> tuple[list[Attempt], list[Pause]]:
    """The attempts of a run and what was between them."""
    signs = sorted(
        [_Sign(time, _LINE, step, {}) for time, step in run.progress]
        + [
            _Sign(event["time"], event["kind"], event.get("step") or 0, event)
            for event in run.events
            if "time" in event and "kind" in event
        ],
        key=lambda sign: sign.time,
    )
    every = min((b - a for (_, a), (_, b) in pairwise(run.progress) if b > a), default=1)
    found, pauses = [Attempt([], [])], []
    beginning: list[_Sign] = []
    before: _Sign | None = None
    for sign in signs:
        if sign.kind in BOUNDARY_KINDS:
            beginning.append(sign)
            continue
        if beginning:
            if before is not None:
                pauses.append(_pause(before, found[-1], beginning, every))
                found.append(Attempt([], []))
            found[-1].times.append(beginning[-1].time)
            found[-1].steps.append(beginning[-1].step)
            beginning = []
        before = sign
        if sign.kind == _LINE:
            found[-1].times.append(sign.time)
            found[-1].steps.append(sign.step)
    return found, pauses


def _pause(before: _Sign, attempt: Attempt, beginning: Sequence[_Sign], every: int) -> Pause:
    recovered = next((sign for sign in reversed(beginning) if sign.kind == "recovered"), None)
    step = (recovered or beginning[-1]).step
    was_stopped = before.kind in STOP_KINDS
    least = max(0, max([*attempt.steps, before.step]) - step)
    return Pause(
        before.time,
        beginning[-1].time,
        step,
        (least, least if was_stopped else least + every - 1),
        was_stopped,
        None if recovered is None else recovered.event.get("source"),
        0 if recovered is None else _count(recovered.event.get("lost_nodes")),
    )


def _count(lost_nodes: Any) -> int:
    return len(lost_nodes) if isinstance(lost_nodes, list) else int(lost_nodes or 0)


def lanes(run: RunHistory) -> dict[str, list[Bar]]:
    """The lanes of snapshots: the copy, then parity and agreement, and the way to disk; those of which there is any."""
    found: dict[str, list[Bar]] = {lane: [] for lane in _LANES}
    for event in run.of_kind("snapshot_committed", "persisted"):
        if "time" not in event or event.get("seconds") is None:
            continue
        end = event.get("ended") or event["time"]
        begin = end - event["seconds"]
        if event["kind"] == "persisted":
            found["to disk"].append(Bar(begin, end))
        else:
            copied = begin + (event.get("copy_s") or 0.0)
            found["copy"].append(Bar(begin, copied))
            found["parity, commit"].append(Bar(copied, end))
    return {lane: bars for lane, bars in found.items() if bars}


def thinned(bars: Sequence[Bar], begin: float, end: float) -> list[Bar]:
    """At most `NUM_BINS` bars: where there are more, the share of each bin's time that they fill."""
    if len(bars) <= NUM_BINS // 2 or end <= begin:
        return list(bars)
    width = (end - begin) / NUM_BINS
    filled = [0.0] * NUM_BINS
    for bar in bars:
        first, last = (min(NUM_BINS - 1, max(0, int((at - begin) / width))) for at in (bar.begin, bar.end))
        for number in range(first, last + 1):
            left = begin + number * width
            filled[number] += max(0.0, min(bar.end, left + width) - max(bar.begin, left))
    return [
        Bar(begin + number * width, begin + (number + 1) * width, min(1.0, seconds / width))
        for number, seconds in enumerate(filled)
        if seconds
    ]


def without_long_pauses(pauses: Sequence[Pause], begin: float, end: float) -> tuple[Callable[[float], float], float]:
    """Unix time -> seconds on the axis, on which long pauses are cut short; and how long they are there."""
    up_s = end - begin - math.fsum(pause.end - pause.begin for pause in pauses)
    longest = max(PAUSE_S, PAUSE_SHARE * up_s)

    def place(time: float) -> float:
        cut = 0.0
        for pause in pauses:
            if pause.end - pause.begin > longest:
                cut += max(0.0, min(time, pause.end) - pause.begin - longest)
        return time - begin - cut

    return place, longest


# --- Drawing. ---


def draw_timeline(figure: Figure, run: RunHistory, theme: Theme) -> bool:
    times = [event["time"] for event in run.events if "time" in event and "kind" in event]
    if not times:
        return False
    times += [time for time, _ in run.progress]
    found, pauses = attempts(run)
    pauses = sorted(sorted(pauses, key=lambda pause: pause.end - pause.begin)[-_MOST_PAUSES:], key=lambda p: p.begin)
    place, longest = without_long_pauses(pauses, min(times), max(times))
    span = max(place(max(times)), 1e-3)
    unit, seconds = ("h", 3600) if span > 2 * 3600 else ("min", 60) if span > 180 else ("s", 1)
    bars, marks = lanes(run), _marks(run)
    rows = [*bars, *marks]
    figure.set_figheight(3.0 + 0.3 * len(rows))
    top, foot = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, max(0.6, 0.3 * len(rows))])

    def at(time: float) -> float:
        return place(time) / seconds

    _draw_attempts(top, found, pauses, at, span / seconds, theme)
    colors = dict(zip(_LANES, (theme.first, theme.third, theme.second), strict=True))
    for row, (lane, of_lane) in enumerate(bars.items()):
        for bar in thinned([Bar(at(bar.begin), at(bar.end)) for bar in of_lane], 0.0, span / seconds):
            width = max(bar.end - bar.begin, span / seconds / 1000)  # else too narrow to be seen
            foot.barh(row, width, left=bar.begin, height=0.6, color=colors[lane], alpha=0.15 + 0.85 * bar.busy)
    for row, (kind, events) in enumerate(marks.items(), start=len(bars)):
        color = theme.faint if kind in ("eval", "done") else theme.alarm
        _draw_marks(foot, row, [(at(event["time"]), event.get("step")) for event in events], span / seconds, color)
    for pause in pauses:
        foot.axvspan(at(pause.begin), at(pause.end), color=_pause_color(pause, theme), alpha=0.12, linewidth=0)
    foot.set_yticks(range(len(rows)), [_label(row.replace("_", " ")) for row in rows])
    foot.set_ylim(max(1, len(rows)) - 0.4, -0.7)
    foot.margins(x=0.02)
    is_cut = any(pause.end - pause.begin > longest for pause in pauses)
    note = f"; pauses of more than {longest / seconds:.3g} {unit} are cut" if is_cut else ""
    foot.set_xlabel(f"time since the first start ({unit}); small figures are steps{note}")
    return True


def _marks(run: RunHistory) -> dict[str, list[dict[str, Any]]]:
    """The events that are moments, by kind, known ones first."""
    others = {event["kind"] for event in run.events if "kind" in event}
    drawn = {*BOUNDARY_KINDS, "snapshot_committed", "persisted", *_MARKS}
    found = {
        kind: [event for event in run.of_kind(kind) if "time" in event] for kind in [*_MARKS, *sorted(others - drawn)]
    }
    if len(others := [kind for kind in found if kind not in _MARKS]) > _MOST_OTHERS:
        found["other events"] = [event for kind in others for event in found.pop(kind)]
    # A snapshot of which nobody said how long it took is a moment too.
    for kind in ("snapshot_committed", "persisted"):
        found[kind] = [event for event in run.of_kind(kind) if "time" in event and event.get("seconds") is None]
    return {kind: events for kind, events in found.items() if events}


def _draw_attempts(
    ax: Axes, found: Sequence[Attempt], pauses: Sequence[Pause], at: Callable[[float], float], span: float, theme: Theme
) -> None:
    for attempt in found:
        ax.plot([at(time) for time in attempt.times], attempt.steps, color=theme.first, linewidth=1.6)
    labelled, highest = -math.inf, max((max(attempt.steps, default=0) for attempt in found), default=0)
    named: set[str] = set()
    for pause in pauses:
        name = "stopped and resumed" if pause.was_stopped else f"went on from {_source(pause)}"
        color = _pause_color(pause, theme)
        label = None if name in named else name
        named.add(name)
        end = at(pause.end)
        ax.axvspan(at(pause.begin), end, color=color, alpha=0.25, linewidth=0, label=label)
        ax.axvline(end, color=color, linewidth=1.2)  # of a long run all that is seen of a short pause
        if end - labelled > LABEL_SHARE * span:
            is_last = end > (1 - LABEL_SHARE) * span
            ax.annotate(
                _pause_text(pause),
                (end, max(pause.step, 0.17 * highest)),  # else the words would stand below the axis
                (-4 if is_last else 4, -2),
                textcoords="offset points",
                va="top",
                ha="right" if is_last else "left",
                fontsize=7.5,
                color=theme.ink,
            )
            labelled = end
    ax.set_ylabel("step")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _source(pause: Pause) -> str:
    return "the start" if pause.source is None else _SOURCES.get(pause.source, _label(pause.source))


def _label(text: str) -> str:
    """Text of an event as matplotlib draws it as it is: without formulas, which may be none, and not too long."""
    return printable(text[:_LONGEST_LABEL]).replace("$", r"\$")


def _pause_text(pause: Pause) -> str:
    least, most = pause.lost_steps
    nodes = f", {pause.lost_nodes} node{'s' * (pause.lost_nodes > 1)}" if pause.lost_nodes else ""
    if pause.was_stopped:
        return f"step {pause.step:,}\n{duration(pause.end - pause.begin)}"
    steps = f"{least:,}" if least == most else f"{least:,}..{most:,}"
    return f"step {pause.step:,}, lost {steps}{nodes}\n{pause.end - pause.begin:.1f} s"


def _pause_color(pause: Pause, theme: Theme) -> str:
    if pause.was_stopped:
        return theme.faint
    return {"local_ram": theme.third, "parity": theme.second}.get(pause.source or "", theme.alarm)


def _draw_marks(ax: Axes, row: int, moments: Sequence[tuple[float, int | None]], span: float, color: str) -> None:
    """One dot a bin, and the steps of those that have room."""
    last_bin, labelled = -1, -math.inf
    kept = []
    for x, step in sorted(moments, key=lambda moment: moment[0]):
        number = int(x / span * NUM_BINS)
        if number == last_bin:
            continue
        last_bin = number
        kept.append(x)
        if step is not None and x - labelled > 0.06 * span:
            ax.annotate(f"{step:,}", (x, row), (0, 4), textcoords="offset points", ha="center", fontsize=7, color=color)
            labelled = x
    ax.plot(kept, [row] * len(kept), "o", color=color, markersize=5)
