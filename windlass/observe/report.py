"""A run's folder as one page: `report.html`, which needs no other file, and its plots as PNGs. Torch-free."""

from __future__ import annotations

import base64
import errno
import html
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from windlass.errors import ConfigError, RunFolderError
from windlass.files import atomic_file, make_folder, real_path
from windlass.observe.console import duration, number, size
from windlass.observe.metrics import redact
from windlass.observe.metrics_reader import (
    EVENTS_FILE,
    METRICS_FILE,
    Lines,
    Replay,
    merged,
    progress,
    read_lines,
    replays,
)
from windlass.text import printable
from windlass.untrusted import Malformed, read_yaml

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
PLOTS_FOLDER = "report"

_MAX_TABLE_ROWS = 200
_MAX_TEXT = 2_000
_BETWEEN_ATTEMPTS = {"restart", "recovered"}
_ROUTINE_KINDS = {"eval", "snapshot_committed", "snapshot_skipped", "persisted"}

Record = dict[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it."""

    name: str
    records: list[Record]
    events: list[Record]
    progress: list[tuple[float, int]]
    """(unix time, step) of every line of training, also of steps that were trained again."""
    replays: list[Replay]
    config: str | None
    notes: list[str] = field(default_factory=list)
    """Notes on what could not be read."""

    def of_kind(self, *kinds: str) -> list[Record]:
        return [event for event in self.events if event.get("kind") in kinds]

    def series(self, key: str, x: str = "step") -> tuple[list[float], list[float]]:
        """`x` and `key` of the lines that have both, with NaN for what is not finite."""
        pairs = [(record[x], record[key]) for record in self.records if _given(record, x, key)]
        return [a for a, _ in pairs], [b if math.isfinite(b) else math.nan for _, b in pairs]

    def values(self, key: str) -> list[float]:
        return [value for value in self.series(key)[1] if not math.isnan(value)]

    def last(self, key: str) -> float | None:
        """The newest value as it was logged, NaN included; None if there is none."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    @property
    def starts(self) -> list[Record]:
        return self.of_kind("start")

    def from_start(self, key: str) -> Any:
        """The value of `key` in the newest start event that has it; None if none has."""
        return next((event[key] for event in reversed(self.starts) if event.get(key) is not None), None)

    def restart_steps(self) -> list[int]:
        """Steps at which a later attempt, or a recovery within one, went on."""
        again = [event for event in self.starts if event.get("step")] + self.of_kind("recovered")
        return sorted({event["step"] for event in again if event.get("step") is not None})

    def wall_s(self) -> float | None:
        """Seconds between the first and the last sign of each attempt, added up; None without any time."""
        signs = [(event["time"], event.get("kind") or "") for event in self.events if "time" in event]
        signs = sorted(signs + [(record["time"], "") for record in self.records if "time" in record])
        if len(signs) < 2:
            return None
        idle = 0.0
        for i in [i for i, (_, kind) in enumerate(signs) if kind == "start"]:
            first = i  # the events that come with a new attempt, some from its launcher as the old one ends
            while first > 0 and signs[first - 1][1] in _BETWEEN_ATTEMPTS:
                first -= 1
            if first > 0:
                idle += max(signs[k][0] - signs[k - 1][0] for k in range(first, i + 1))
        return signs[-1][0] - signs[0][0] - idle


def _given(record: Record, *keys: str) -> bool:
    return all(record.get(key) is not None for key in keys)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, and its plots as PNGs into `run_dir/report/`; return the page's path.

    The page holds everything that it shows, in colours for light and for dark. Keys that a run did not log
    are left out. Secrets in the configuration are not shown.

    Raises:
        RunFolderError: `run_dir` is no run's folder, has no figures yet, or cannot be written.
        ConfigError: matplotlib is not installed.
    """
    run = _read_run(run_dir)
    try:
        from windlass.observe.report_plots import PLOTS
    except ImportError as error:
        fix = 'pip install "windlass[report]"'
        raise ConfigError("report", run_dir, "needs the package matplotlib", fix) from error
    sections = []
    try:
        make_folder(run_dir / PLOTS_FOLDER, run_dir)
        for plot in PLOTS:
            images = plot.render(run)
            if images is not None:
                with atomic_file(run_dir / PLOTS_FOLDER / f"{plot.name}.png") as file:
                    file.write(images[0])
                sections.append(_figure_html(plot.title, plot.caption, *images))
        page = run_dir / REPORT_FILE
        with atomic_file(page) as file:
            file.write(_page_html(run, sections).encode())
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        fix = "remove that link" if error.errno == errno.ELOOP else "free space or allow writing there"
        raise RunFolderError("run_dir", run_dir, rule, fix) from error
    for note in run.notes:
        logger.warning("%s: %s", printable(str(run_dir)), note)
    return page


def _read_run(run_dir: Path) -> RunHistory:
    has = {name: (run_dir / name).is_file() for name in (METRICS_FILE, EVENTS_FILE, "config.yaml")}
    if not any(has.values()):
        fix = "give the run_dir of a `windlass train`"
        raise RunFolderError("run_dir", run_dir, f"is no run's folder: it has no {METRICS_FILE}", fix)
    figures = read_lines(run_dir, METRICS_FILE) if has[METRICS_FILE] else Lines([])
    events = read_lines(run_dir, EVENTS_FILE) if has[EVENTS_FILE] else Lines([])
    notes = [
        f"{lines.num_unreadable:,} line{'s' * (lines.num_unreadable > 1)} of {name} could not be read"
        for name, lines in ((METRICS_FILE, figures), (EVENTS_FILE, events))
        if lines.num_unreadable
    ]
    if not figures.records:
        rule = "has no figures yet" + (f": {notes[0]}" if figures.num_unreadable else "")
        raise RunFolderError("run_dir", run_dir, rule, "wait until the run has taken train.log_every steps")
    return RunHistory(
        real_path(run_dir).name,
        merged(figures.records),
        events.records,
        progress(figures.records),
        replays(figures.records),
        _read_config(run_dir / "config.yaml") if has["config.yaml"] else None,
        notes,
    )


def _read_config(path: Path) -> str:
    """The configuration as it stands there, without its secrets."""
    try:
        plain = redact(read_yaml(path))
    except Malformed as error:
        fix = "restore config.yaml, or move it away"
        raise RunFolderError("run_dir", path, f"cannot be read: {error}", fix) from error
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise RunFolderError("run_dir", path, rule, "allow reading it, or move it away") from error
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def _summary(run: RunHistory) -> list[tuple[str, str]]:
    """Label and value of the figures at the head of the page."""
    validation = run.values("val/loss")
    validated = number(run.last("val/loss"), ".4f")
    if validation and min(validation) < validation[-1]:
        validated += f" (best {min(validation):.4f})"
    rates, mfus = run.values("throughput/tokens_per_s"), run.values("throughput/mfu")
    stalls = run.values("checkpoint/stall_s")
    device = run.values("memory/device_peak_bytes")
    recoveries = run.of_kind("recovered")
    sources = sorted({str(event["source"]) for event in recoveries if event.get("source")})
    differ = sum(not replay.bit_equal for replay in run.replays)
    steps = [record["step"] for record in run.records]
    tokens = run.last("tokens")
    return [
        ("Training loss", number(run.last("train/loss"), ".4f")),
        ("Validation loss", validated),
        ("Steps", f"{max(steps):,}"),
        ("Tokens", number(tokens, ",.0f")),
        ("Wall time", duration(run.wall_s())),
        ("Tokens/s, median", number(median(rates) if rates else None, ",.0f")),
        ("MFU, median", f"{100 * median(mfus):.1f} %" if mfus else "-"),
        ("Checkpoint stalls", f"{math.fsum(stalls):.2f} s" if stalls else "-"),
        *_offloading(run),
        ("Host memory, peak", size(max(run.values("memory/host_rss_bytes"), default=None))),
        *([("Device memory, peak", size(max(device)))] if device else []),
        ("Restarts", str(len(run.of_kind("restart")))),
        ("Recoveries", f"{len(recoveries)}" + (f" ({', '.join(sources)})" if sources else "")),
        ("Skipped steps", str(len({event.get("step") for event in run.of_kind("skipped_step")}))),
        ("Replayed steps", _replay_text(len(run.replays), differ)),
    ]


def _offloading(run: RunHistory) -> list[tuple[str, str]]:
    """The costs of the tiers; nothing where there were none."""
    stalls = run.values("offload/stall_s")
    if not stalls:
        return []
    read, written = (math.fsum(run.values(f"offload/{kind}_bytes")) for kind in ("read", "write"))
    return [
        ("Offload stalls", f"{math.fsum(stalls):.2f} s"),
        ("Offload traffic", f"{size(read)} read, {size(written)} written"),
    ]


def _replay_text(num_replays: int, num_differing: int) -> str:
    if not num_replays:
        return "none"
    return f"{num_replays:,}, " + (f"{num_differing:,} differ" if num_differing else "all bit-equal")


def _status(run: RunHistory) -> tuple[str, str]:
    """The end of the run as the last event says it, and the class that colours it."""
    last = next(iter(reversed(run.of_kind("start", "restart", "recovered", "preempted", "done"))), None)
    kind = last["kind"] if last else None
    if kind == "done":
        return "done", "good"
    if kind == "preempted":
        return "stopped on request", "fair"
    return ("running, or killed", "fair") if kind else ("no events", "fair")


def _versions(run: RunHistory) -> dict[str, Any]:
    """The `versions` of the newest start event, and whatever key of it ends in `_version`."""
    start: Mapping[str, Any] = run.starts[-1] if run.starts else {}
    versions = start.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    return found | {k.removesuffix("_version"): v for k, v in start.items() if k.endswith("_version")}


def _escaped(value: object) -> str:
    """For the page: text of any length, with anything in it."""
    text = str(value)
    text = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
    return html.escape(printable(text))


def _figure_html(title: str, caption: str, light: bytes, dark: bytes) -> str:
    encoded = (base64.b64encode(png).decode() for png in (light, dark))
    light_url, dark_url = (f"data:image/png;base64,{image}" for image in encoded)
    note = f"<p>{html.escape(caption)}</p>" if caption else ""
    title = html.escape(title)
    return (
        f"<section><h2>{title}</h2>{note}<picture>"
        f'<source srcset="{dark_url}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light_url}" alt="Plot: {title}"></picture></section>'
    )


def _table_html(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def row(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="scroll"><table>{row("th", head)}{body}</table></div>'


def _event_rows(run: RunHistory) -> list[tuple[object, ...]]:
    """Time, kind, step and the other fields of the events that are not routine, oldest first."""
    shown = [event for event in run.events if event.get("kind") not in _ROUTINE_KINDS]
    rows: list[tuple[object, ...]] = []
    for event in shown[-_MAX_TABLE_ROWS:]:
        stamp = event.get("time")
        at = "-" if stamp is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp))
        rest = {k: v for k, v in event.items() if k not in ("time", "kind", "step", "versions")}
        fields = ", ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in rest.items())
        rows.append((at, event.get("kind"), "-" if event.get("step") is None else event["step"], fields))
    return rows


def _details_html(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _page_html(run: RunHistory, sections: list[str]) -> str:
    text, tone = _status(run)
    cards = "".join(
        f"<div><dt>{_escaped(label)}</dt><dd>{_escaped(value)}</dd></div>" for label, value in _summary(run)
    )
    extra = []
    if rows := _event_rows(run):
        extra.append(_details_html("Event log", _table_html(("time", "event", "step", "details"), rows)))
    if run.config is not None:
        lines = map(_escaped, run.config.split("\n"))
        extra.append(_details_html("Configuration", "<pre>" + "\n".join(lines) + "</pre>"))
    if versions := _versions(run):
        extra.append(_details_html("Versions", _table_html(("package", "version"), versions.items())))
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    name = _escaped(run.name)
    notes = "".join(f'<p class="fair">{_escaped(note)}</p>' for note in run.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} - windlass report</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>{name}</h1><span class="{tone}">{html.escape(text)}</span></header>'
        f"{notes}<dl>{cards}</dl>{''.join(sections)}{''.join(extra)}"
        f"<footer>windlass report, written {written}</footer></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f3f4f6; --card: #ffffff; --ink: #1f2937; --faint: #6b7280;
  --edge: #e5e7eb; --good: #047857; --fair: #b45309; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3;
  --faint: #9aa4b2; --edge: #2d3440; --good: #34d399; --fair: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px; max-width: 1120px; background: var(--page);
  color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { display: flex; align-items: center; gap: 14px; flex-wrap: wrap; margin-bottom: 18px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 2px; }
header span { font-size: 13px; padding: 2px 10px; border: 1px solid; border-radius: 99px; }
.good { color: var(--good); } .fair { color: var(--fair); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 10px;
  margin: 0 0 18px; }
dl div, section, details { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
dl div { padding: 10px 14px; }
dt { color: var(--faint); font-size: 12.5px; }
dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; }
section { padding: 16px 18px 10px; margin-bottom: 14px; }
section p { margin: 0 0 8px; color: var(--faint); font-size: 13.5px; }
img { display: block; width: 100%; height: auto; }
details { padding: 12px 18px; margin-bottom: 14px; }
summary { cursor: pointer; font-weight: 600; }
pre, .scroll { overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; margin-top: 10px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; }
td:first-child { white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
footer { color: var(--faint); font-size: 12.5px; }
"""
