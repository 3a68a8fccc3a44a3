"""The report of runs that are written here as a run writes them."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from windlass.errors import ConfigError, RunFolderError
from windlass.observe import metrics as metrics_module
from windlass.observe.config import MetricsConfig
from windlass.observe.metrics import JsonLines, Metrics, append_event
from windlass.observe.report import write_report

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def unix(self) -> float:
        return 1_790_000_000.0 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "time", clock.unix)
    return clock


def live(run_dir: Path, clock: Clock, first: int, last: int, state: dict[str, int] | None = None) -> Metrics:
    """One attempt of a run of 100 steps, a second each, from step `first` to `last`."""
    run = Metrics(
        run_dir,
        MetricsConfig(),
        rank=0,
        total_steps=100,
        log_every=5,
        flops_per_token=1e6,
        peak_flops=2e9,
        run_config={},
        resumed_at=first - 1,
        clock=clock,
    )
    if state:
        run.load_state_dict(state)
    if state:
        run.event("recovered", first - 1, source="parity", lost_nodes=[1], seconds=0.5)
        clock.now += 0.25  # still nothing that counts
    run.event("start", first - 1, unigram_entropy_nats=3.25, versions={"torch": "2.13.0", "python": "3.11.7"})
    for step in range(first, last + 1):
        clock.now += 1.0
        run.step(
            step, loss=5 - step / 50, grad_norm=1.0, lr=1e-3, num_tokens=1000, step_s=0.9,
            **{"checkpoint/stall_s": 0.125, "memory/host_rss_bytes": 3 << 30},
        )  # fmt: skip
    return run


def two_lives(run_dir: Path, clock: Clock) -> None:
    with live(run_dir, clock, 1, 60) as run:
        run.count_skipped_step(33, grad_norm=math.inf)
        run.event("persisted", 50)
        run.evaluated(60, {"loss": 2.5}, 0.0, 64)
    append_event(run_dir, "restart", 60, reason="rank 1 <was> killed")
    clock.now += 1000.0  # nobody was there
    state = {"step": 50, "tokens": 50_000, "skipped_steps": 1}
    with live(run_dir, clock, 51, 100, state) as run:
        run.evaluated(100, {"loss": 2.75}, 0.0, 64)
        run.event("done", 100)
    (run_dir / "config.yaml").write_text("optim:\n  lr: 0.01\n  name: '<b>'\nhf_token: s3cret\nrun_dir: ${oc.env:X}\n")


class Page(html.parser.HTMLParser):
    """What the page shows, and all that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.depth: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "source", "img"):
            self.depth.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.depth and self.depth[-1] != "style":
            self.words.append(data)

    def card(self, label: str) -> str:
        return self.words[self.words.index(label) + 1]


def report(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_page_sums_the_run_up(tmp_path: Path, clock: Clock) -> None:
    two_lives(tmp_path / "tiny", clock)
    page = report(tmp_path / "tiny")
    expected = {
        "Training loss": "3.0000",
        "Validation loss": "2.7500 (best 2.5000)",
        "Steps": "100",
        "Tokens": "100,000",
        # 60 s, and 50 s with what came before their start; the 1000 s between two attempts are nobody's
        "Wall time": "0:01:50",
        "Tokens/s, median": "1,000",
        "MFU, median": "50.0 %",
        # 20 lines of five steps: the steps that were trained again count once
        "Checkpoint stalls": "12.50 s",
        "Host memory, peak": "3.0 GiB",
        "Restarts": "1",
        "Recoveries": "1 (parity)",
        "Skipped steps": "1",
        "Replayed steps": "2, all bit-equal",
    }
    assert {label: page.card(label) for label in expected} == expected
    assert "done" in page.words
    text = " ".join(page.words)
    assert "reason=rank 1 <was> killed" in text and "source=parity, lost_nodes=[1], seconds=0.5" in text
    assert "name: <b>" in text and "hf_token: (redacted)" in text and "${oc.env:X}" in text
    assert "s3cret" not in (tmp_path / "tiny" / "report.html").read_text()
    assert page.card("torch") == "2.13.0"


@pytest.mark.slow
def test_the_page_stands_alone_and_has_each_plot_in_two_colours(tmp_path: Path, clock: Clock) -> None:
    two_lives(tmp_path, clock)
    page = report(tmp_path)
    assert len(page.sources) == 10 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://|url\(|<script|@import", (tmp_path / "report.html").read_text())
    images = [base64.b64decode(source.split(",")[1]) for source in page.sources]
    assert all(image.startswith(PNG) for image in images) and len(set(images)) == 10
    plots = {path.stem: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(plots) == {"loss", "optimizer", "throughput", "memory", "timeline"}
    assert all(plot in images for plot in plots.values())


@pytest.mark.slow
def test_replayed_steps_that_differ_are_counted(tmp_path: Path, clock: Clock) -> None:
    two_lives(tmp_path, clock)
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 100, "train/loss": 2.9999})
    file.close()
    page = report(tmp_path)
    assert page.card("Replayed steps") == "3, 1 differ"
    assert page.card("Training loss") == "2.9999"


def rows(run_dir: Path, *records: dict[str, Any]) -> Path:
    run_dir.mkdir(exist_ok=True)
    file = JsonLines(run_dir / "metrics.jsonl")
    for record in records:
        file.append(record)
    file.close()
    return run_dir


@pytest.mark.slow
def test_an_old_run_with_few_keys_has_a_report(tmp_path: Path) -> None:
    page = report(rows(tmp_path, {"step": 5, "train/loss": 2.0}))
    assert page.card("Training loss") == "2.0000" and page.card("Wall time") == "-"
    assert page.card("Replayed steps") == "none" and "no events" in page.words
    assert "Memory" not in page.words
    assert [path.stem for path in (tmp_path / "report").iterdir()] == ["loss"]


@pytest.mark.slow
def test_a_run_that_diverged_or_was_only_evaluated_has_a_report(tmp_path: Path) -> None:
    lines = [
        {"step": step, "tokens": step, "train/loss": math.nan if step > 40 else 2.0, "optim/grad_norm": math.inf}
        for step in range(1, 100)
    ]
    assert report(rows(tmp_path / "a", *lines)).card("Training loss") == "nan"
    page = report(rows(tmp_path / "b", {"step": 3, "val/loss": 1.5}))
    assert page.card("Validation loss") == "1.5000" and page.card("Training loss") == "-"


@pytest.mark.slow
def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    rows(tmp_path, {"step": 5, "train/loss": 2.0})
    append_event(tmp_path, "start", 0)
    assert "running, or killed" in report(tmp_path).words
    append_event(tmp_path, "preempted", 5)
    assert "stopped on request" in report(tmp_path).words


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFolderError, match="is no run's folder"):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match="is no run's folder"):
        write_report(tmp_path / "nowhere")
    append_event(tmp_path, "start", 0)
    with pytest.raises(RunFolderError, match="has no figures yet"):
        write_report(tmp_path)
    rows(tmp_path, {"step": 5, "train/loss": 2.0})
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(RunFolderError, match=r"config\.yaml: cannot be read: it is not YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(RunFolderError, match="File exists"):
        write_report(tmp_path)
    monkeypatch.delitem(sys.modules, "windlass.observe.report_plots", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'pip install "windlass\[report\]"'):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_strangers_folder_is_drawn_with_what_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    figures = [{"step": step, "time": 1.79e9 + step, "train/loss": 2.0, "tokens": 2**62} for step in range(1, 9)]
    figures += [{"step": 9, "train/loss": 9e99, "optim/grad_norm": -9e99, "memory/host_rss_bytes": 9e99, "time": 0}]
    kinds = ["$\\frac{", "a $x$ b", "\x1b[2J", "\ud800", "_legend", "k" * 5000, "", *(f"kind {i}" for i in range(3000))]
    events = [{"time": 8e9 * (i % 2), "kind": kind, "step": i} for i, kind in enumerate(kinds)]
    events += [
        {"time": 1.79e9 + i, "kind": kind, "step": 2**52 + i, "source": "$\\bad{", "lost_nodes": 2**60, "seconds": 1e99}
        for i, kind in enumerate(["start", "recovered", "persisted", "snapshot_committed", "skipped_step"] * 200)
    ]
    for name, lines in (("metrics.jsonl", figures), ("events.jsonl", events)):
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": "<script>"}, [1]])
        (tmp_path / name).write_text(text)
    (tmp_path / "config.yaml").write_text("wandb_project: ${oc.env:HOME}\n'<script>': \"\\e[31m\"\n")
    page = write_report(tmp_path).read_text()
    assert "2 lines of metrics.jsonl could not be read" in page and "2 lines of events.jsonl could not" in page
    assert "2 lines of metrics.jsonl could not be read" in caplog.text
    assert "${oc.env:HOME}" in page and "<script" not in page and "\x1b" not in page
    assert len(base64.b64decode(re.findall(r'src="data:image/png;base64,([^"]*)', page)[-1])) < 1 << 20


def test_a_folder_whose_links_lead_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows(run_dir, {"step": 5, "train/loss": 2.0})
    (run_dir / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=r"report is a symbolic link.*Fix: remove that link"):
        write_report(run_dir)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (run_dir / "report").unlink()
    (run_dir / "report").mkdir()
    for name in ("report.html", "report.new", "report/loss.png"):
        (run_dir / name).symlink_to(victim)
    write_report(run_dir)
    assert victim.read_text() == "precious"
    assert "<html" in (run_dir / "report.html").read_text()
