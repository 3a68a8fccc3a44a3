"""The plots of a report. Needs matplotlib; `windlass.observe.report` imports it only to write one.

Each `_draw_*` draws into an empty figure and says whether there was anything to draw.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from windlass.observe.report_timeline import draw_timeline

if TYPE_CHECKING:
    from windlass.observe.report import RunHistory

_DPI = 144
_WIDTH_INCHES = 10.4
_SMOOTH_FROM = 60
"""Lines from which on the training loss is also drawn smoothed."""
_GIB = 2**30


@dataclass(frozen=True)
class Theme:
    """Colours of the plots on a light or a dark page."""

    paper: str
    ink: str
    faint: str
    grid: str
    first: str
    second: str
    third: str
    alarm: str


LIGHT = Theme("#ffffff", "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#d97706", "#059669", "#dc2626")
DARK = Theme("#161b22", "#e6edf3", "#9aa4b2", "#2d3440", "#6ea8fe", "#fbbf24", "#34d399", "#f87171")


@dataclass(frozen=True)
class Plot:
    """A plot's file name, its title and caption on the page, and how it is drawn."""

    name: str
    title: str
    caption: str
    height_inches: float
    draw: Callable[[Figure, RunHistory, Theme], bool]

    def render(self, run: RunHistory) -> tuple[bytes, bytes] | None:
        """The plot as PNGs for a light and for a dark page; None where the run logged nothing of it."""
        images = []
        for theme in (LIGHT, DARK):
            figure = Figure(figsize=(_WIDTH_INCHES, self.height_inches), dpi=_DPI)
            if not self.draw(figure, run, theme):
                return None
            images.append(_png(figure, theme))
        return images[0], images[1]


def _png(figure: Figure, theme: Theme) -> bytes:
    """The figure in the colours of `theme`."""
    figure.set_layout_engine("constrained", w_pad=0.12, wspace=0.06)
    figure.set_facecolor(theme.paper)
    for ax in figure.axes:
        ax.set_facecolor(theme.paper)
        ax.grid(color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=9, length=3)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(color=theme.ink, fontsize=10)
        if ax.get_legend_handles_labels()[1]:
            legend = ax.legend(frameon=True, fontsize=9, labelcolor=theme.ink, loc="best")
            legend.get_frame().set(facecolor=theme.paper, edgecolor=theme.grid, alpha=0.9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.paper)
    return buffer.getvalue()


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _mark_restarts(ax: Axes, run: RunHistory, theme: Theme) -> None:
    _mark_steps(ax, run.restart_steps(), "resumed here", theme)


def _mark_steps(ax: Axes, steps: list[int], label: str, theme: Theme) -> None:
    """Lines from the foot to the top; one collection, as there may be thousands."""
    if steps:
        whole = ax.get_xaxis_transform()
        ax.vlines(steps, 0, 1, transform=whole, color=theme.alarm, linestyle=":", linewidth=1.2, label=label)


def _mark_checkpoints(ax: Axes, run: RunHistory, theme: Theme) -> None:
    steps = sorted({event["step"] for event in run.of_kind("persisted") if event.get("step") is not None})
    if steps:
        at_the_foot = ax.get_xaxis_transform()
        ax.plot(
            steps,
            [0.025] * len(steps),
            linestyle="none",
            marker="^",
            markersize=6,
            color=theme.third,
            transform=at_the_foot,
            label="checkpoint persisted",
        )


def _line(ax: Axes, run: RunHistory, key: str, color: str, label: str | None = None, scale: float = 1.0) -> bool:
    """Draw `key / scale` against steps; False if there is no finite value."""
    steps, values = run.series(key)
    if all(math.isnan(value) for value in values):
        return False
    marker = "o" if len(values) == 1 else None
    ax.plot(steps, [v / scale for v in values], color=color, linewidth=1.6, marker=marker, label=label)
    return True


def _smoothed(values: list[float]) -> list[float]:
    """Means over a fortieth of the run, centred, so that a fall is not drawn late; narrower at both ends."""
    reach = max(1, len(values) // 80)
    means = []
    for i in range(len(values)):
        half = min(i, len(values) - 1 - i, reach)
        near = [value for value in values[i - half : i + half + 1] if not math.isnan(value)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    return means


def _from_zero(ax: Axes, values: list[float]) -> None:
    """Let the vertical axis begin at zero and leave air above the highest of `values`."""
    top = max(values, default=0.0)
    ax.set_ylim(0, 1.18 * top if top > 0 else 1.0)


def _draw_loss(figure: Figure, run: RunHistory, theme: Theme) -> bool:
    if not run.values("train/loss") and not run.values("val/loss"):
        return False
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, x in ((left, "step"), (right, "tokens")):
        at, losses = run.series("train/loss", x)
        smooth = len(losses) >= _SMOOTH_FROM
        if not smooth:
            ax.plot(at, losses, color=theme.first, linewidth=1.6, label="train")
        else:
            ax.plot(at, losses, color=theme.first, linewidth=1.0, alpha=0.35)
            ax.plot(at, _smoothed(losses), color=theme.first, linewidth=1.8, label="train, smoothed")
        at, losses = run.series("val/loss", x)
        if losses:
            ax.plot(at, losses, "o-", color=theme.second, linewidth=1.6, markersize=4.5, label="validation")
        entropy = run.from_start("unigram_entropy_nats")
        if entropy is not None:
            label = f"unigram entropy {entropy:.2f}"
            ax.axhline(entropy, color=theme.faint, linestyle="--", linewidth=1.2, label=label)
    _step_axis(left)
    _mark_restarts(left, run, theme)
    left.set_ylabel("loss (nats a token)")
    right.set_xlabel("tokens")
    right.xaxis.set_major_locator(MaxNLocator(nbins=6))
    right.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return True


def _draw_optimizer(figure: Figure, run: RunHistory, theme: Theme) -> bool:
    left, right = figure.subplots(1, 2)
    drawn = _line(left, run, "optim/lr", theme.first)
    left.set_ylabel("learning rate")
    _from_zero(left, run.values("optim/lr"))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    drawn |= _line(right, run, "optim/grad_norm", theme.second)
    norms = run.values("optim/grad_norm")
    right.set_ylabel("gradient norm before clipping")
    if norms and min(norms) > 0 and max(norms) > 30 * min(norms):
        right.set_yscale("log")
    else:
        _from_zero(right, norms)
    skipped = [event["step"] for event in run.of_kind("skipped_step") if event.get("step") is not None]
    _mark_steps(right, skipped, "skipped step", theme)
    for ax in (left, right):
        _step_axis(ax)
    return drawn


def _draw_throughput(figure: Figure, run: RunHistory, theme: Theme) -> bool:
    left, right = figure.subplots(1, 2)
    drawn = _line(left, run, "throughput/tokens_per_s", theme.first)
    left.set_ylabel("tokens/s, stalls included")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    drawn |= _line(right, run, "throughput/step_s", theme.second)
    right.set_ylabel("time of a step (s)")
    _from_zero(left, run.values("throughput/tokens_per_s"))
    _from_zero(right, run.values("throughput/step_s"))
    for ax in (left, right):
        _step_axis(ax)
        _mark_checkpoints(ax, run, theme)
    _mark_restarts(left, run, theme)
    return drawn


def _draw_memory(figure: Figure, run: RunHistory, theme: Theme) -> bool:
    ax = figure.subplots()
    drawn = _line(ax, run, "memory/host_rss_bytes", theme.first, "host, resident set of rank 0", _GIB)
    drawn |= _line(ax, run, "memory/device_peak_bytes", theme.second, "device, peak", _GIB)
    ax.set_ylabel("memory (GiB)")
    values = run.values("memory/host_rss_bytes") + run.values("memory/device_peak_bytes")
    _from_zero(ax, [value / _GIB for value in values])
    _step_axis(ax)
    return drawn


PLOTS = [
    Plot("loss", "Loss", "Cross-entropy in training and on the validation set.", 3.9, _draw_loss),
    Plot("optimizer", "Optimizer", "Learning rate, and the global gradient norm.", 3.3, _draw_optimizer),
    Plot("throughput", "Throughput", "Means over each line's steps.", 3.3, _draw_throughput),
    Plot("memory", "Memory", "", 2.9, _draw_memory),
    Plot(
        "timeline",
        "Timeline",
        "Steps over time. Behind them the snapshots: their copy, parity and agreement, and the way to disk; faint "
        "where they take little of the time. Bands reach from the last sign of an attempt to the start of the next, "
        "and say where that went on, how many steps and nodes were lost, and how long it took.",
        3.5,
        draw_timeline,
    ),
]
