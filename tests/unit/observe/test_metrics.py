"""The files that a run leaves, line by line."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from windlass.errors import ConfigError, RunFolderError
from windlass.observe.config import MetricsConfig, WandbMode
from windlass.observe.metrics import (
    JsonLines,
    Metrics,
    append_event,
    read_events,
    read_metrics,
    redact,
    replayed,
)

CONTRACT_KEYS = {
    "step",
    "tokens",
    "train/loss",
    "optim/grad_norm",
    "optim/lr",
    "throughput/tokens_per_s",
    "throughput/step_s",
    "throughput/mfu",
    "checkpoint/stall_s",
    "comm/bytes",
    "memory/host_rss_bytes",
    "memory/device_peak_bytes",
}


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def build(run_dir: Path, **overrides: Any) -> Metrics:
    arguments: dict[str, Any] = {
        "config": MetricsConfig(),
        "rank": 0,
        "total_steps": 25,
        "log_every": 10,
        "flops_per_token": 6e6,
        "peak_flops": 1e12,
        "run_config": {},
    }
    arguments.update(overrides)
    return Metrics(run_dir, arguments.pop("config"), **arguments)


def take_step(metrics: Metrics, step: int, loss: float = 1.0, **extra: Any) -> dict[str, Any] | None:
    given = {"grad_norm": 0.5, "lr": 1e-3, "num_tokens": 100, "step_s": 0.25, **extra}
    return metrics.step(step, loss=loss, **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_every_log_every_steps_and_at_the_last(tmp_path: Path) -> None:
    with build(tmp_path) as metrics:
        returned = [take_step(metrics, step) for step in range(1, 26)]
        assert [step for step in range(1, 26) if metrics.due(step)] == [10, 20, 25]
    written = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in written] == [10, 20, 25]
    assert [record["tokens"] for record in written] == [1000, 2000, 2500]
    assert all(set(record) >= CONTRACT_KEYS for record in written)
    assert written == [record for record in returned if record is not None]
    assert written[0]["memory/host_rss_bytes"] > 1 << 20


@pytest.mark.parametrize("umask", [0o000, 0o027])
def test_files_have_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        build(tmp_path / "run").close()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes == {0o666 & ~umask}


def test_rates_cover_the_window_with_stalls_and_without_evaluation(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, log_every=2, total_steps=4, clock=clock)
    clock.now += 50  # building the model
    take_step(metrics, 1, step_s=0.25, **{"checkpoint/stall_s": 0.5, "comm/bytes": 7, "memory/x_bytes": 9})
    clock.now += 0.75  # half a second of it not in step_s: data
    stall = {"checkpoint/stall_s": 0.25, "comm/bytes": 5, "memory/x_bytes": 3, "other/last": 2}
    first = take_step(metrics, 2, step_s=0.75, **stall)
    clock.now += 3
    metrics.evaluated(2, {"loss": 2.5}, 3.0, 640)
    clock.now += 1
    take_step(metrics, 3, step_s=1.0)
    clock.now += 1
    second = take_step(metrics, 4, step_s=1.0)
    metrics.close()
    assert first is not None and second is not None
    assert first["throughput/tokens_per_s"] == 200 / (0.25 + 0.75)
    assert first["throughput/step_s"] == 0.5
    assert first["throughput/mfu"] == pytest.approx(200 * 6e6 / 1e12)
    assert (first["checkpoint/stall_s"], first["comm/bytes"]) == (0.75, 12)
    assert (first["memory/x_bytes"], first["other/last"]) == (9, 2)
    assert second["throughput/tokens_per_s"] == 200 / 2
    assert second["checkpoint/stall_s"] is None
    merged = read_metrics(tmp_path)
    assert [record["step"] for record in merged] == [2, 4]
    assert (merged[0]["val/loss"], merged[0]["train/loss"], merged[0]["eval/seconds"]) == (2.5, 1.0, 3.0)
    assert [event["kind"] for event in read_events(tmp_path)] == ["eval"]


def test_without_a_peak_there_is_no_mfu(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1, peak_flops=None) as metrics:
        record = take_step(metrics, 1)
    assert record is not None and record["throughput/mfu"] is None


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, 1 / 3, 5e-324, math.pi * 1e10]
    with build(tmp_path, log_every=1) as metrics:
        for step, loss in enumerate(losses, start=1):
            take_step(metrics, step, loss)
    assert [record["train/loss"] for record in read_metrics(tmp_path)] == losses


def test_non_finite_figures_stay_json(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1) as metrics:
        take_step(metrics, 1, math.nan, grad_norm=-math.inf)
        take_step(metrics, 2, 2.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first = json.loads(text.splitlines()[0])
    assert first["train/loss"] is None and first["train/loss_nonfinite"] == "nan"
    assert first["optim/grad_norm_nonfinite"] == "-inf"
    read = read_metrics(tmp_path)
    assert math.isnan(read[0]["train/loss"]) and read[0]["optim/grad_norm"] == -math.inf
    assert read[1]["train/loss"] == 2.0 and not any(key.endswith("_nonfinite") for key in read[0])


def test_other_ranks_count_and_write_nothing(tmp_path: Path) -> None:
    with build(tmp_path / "run", rank=1) as metrics:
        records = [take_step(metrics, step) for step in range(1, 11)]
        metrics.evaluated(10, {"loss": 1.0}, 0.1, 64)
        metrics.count_skipped_step(10)
    assert records[-1] is not None and records[-1]["tokens"] == 1000
    assert metrics.skipped_steps == 1
    assert not (tmp_path / "run").exists()


def test_totals_survive_a_resume(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1) as first:
        take_step(first, 1)
        first.count_skipped_step(1, grad_norm=math.inf)
        state = first.state_dict()
        take_step(first, 2, 0.75)
        take_step(first, 3, math.nan)
        take_step(first, 4, 0.5)
    with build(tmp_path, log_every=1, resumed_at=1) as second:
        second.load_state_dict(json.loads(json.dumps(state)))
        with pytest.raises(ValueError, match="steps must rise"):
            take_step(second, 1)
        take_step(second, 2, 0.75)
        take_step(second, 3, math.nan)
        last = take_step(second, 4, math.nextafter(0.5, 1))
    assert last is not None and (last["tokens"], last["optim/skipped_steps"]) == (400, 1)
    assert [(replay.step, replay.bit_equal) for replay in replayed(tmp_path)] == [
        (2, True),
        (3, True),
        (4, False),
    ]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["train/loss"] == math.nextafter(0.5, 1)
    assert read_events(tmp_path)[0]["kind"] == "skipped_step"


def test_loading_rewinds_within_one_attempt(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1) as metrics:
        take_step(metrics, 1)
        state = metrics.state_dict()
        take_step(metrics, 2)
        metrics.load_state_dict(state)
        record = take_step(metrics, 2)
    assert record is not None and record["tokens"] == 200


def test_the_last_checkpoint_is_known(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1) as metrics:
        metrics.event("persisted", 1, seconds=0.1)
        metrics.event("start", 2)
        record = take_step(metrics, 2)
    assert record is not None and record["checkpoint/last_step"] == 1


def test_a_torn_last_line_is_passed_over_and_then_cut_off(tmp_path: Path) -> None:
    with build(tmp_path, log_every=1) as metrics:
        take_step(metrics, 1)
        metrics.event("start", 0)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "kind": "torn"')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert [event["kind"] for event in read_events(tmp_path)] == ["start"]
    with build(tmp_path, log_every=1) as metrics:
        take_step(metrics, 2)
    append_event(tmp_path, "restart", 2, reason="killed")
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [event["kind"] for event in lines(tmp_path / "events.jsonl")] == ["start", "restart"]


@pytest.mark.parametrize("torn", [b"x" * 200_000, b'{"a": 1}\n' + b"y" * 65_536, b""])
def test_cutting_finds_the_last_newline_however_far_back(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(torn)
    JsonLines(path).close()
    assert path.read_bytes() == torn[: torn.rfind(b"\n") + 1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(path)
    with pytest.raises(RunFolderError, match=r"no events\.jsonl"):
        read_events(tmp_path)


WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from windlass.observe.config import MetricsConfig
    from windlass.observe.metrics import Metrics

    metrics = Metrics(Path(sys.argv[1]), MetricsConfig(), rank=0, total_steps=10**9, log_every=1,
                      flops_per_token=1.0, peak_flops=1.0, run_config={})
    for step in range(1, 10**9):
        metrics.step(step, loss=1 / step, grad_norm=1.0, lr=1.0, num_tokens=1, step_s=0.1)
        metrics.event("persisted", step, text="x" * 500)
        if step == 50:
            print("ready", flush=True)
    """
)


def test_a_kill_while_writing_leaves_whole_lines(tmp_path: Path) -> None:
    for attempt in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        records = read_metrics(tmp_path)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        assert records[-1]["tokens"] == len(records) >= 50
        assert len(replayed(tmp_path)) >= 50 * attempt
        assert all(replay.bit_equal for replay in replayed(tmp_path))


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    metrics = build(tmp_path)

    def write(kind: str) -> None:
        for step in range(200):
            metrics.event(kind, step, text=kind * 300)

    threads = [threading.Thread(target=write, args=(kind,)) for kind in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics.close()
    events = read_events(tmp_path)
    assert len(events) == 800 and all(event["text"] == event["kind"] * 300 for event in events)


def in_child(work: Callable[[], None]) -> None:
    """Run `work` in a fork, whose limits may be lowered, and fail if it fails."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_disk_that_fills_up_takes_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        file = JsonLines(path)
        file.append({"step": 1, "text": "x" * 100})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, resource.RLIM_INFINITY))
        try:
            file.append({"step": 2, "text": "x" * 100})
        except RunFolderError as error:
            assert "File too large" in str(error) and str(tmp_path) in str(error)
        else:
            raise AssertionError("a line that does not fit was taken")
        file.append({"step": 3})

    in_child(fill)
    assert [record["step"] for record in lines(path)] == [1, 3]


def test_a_full_device_and_a_bad_place_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No space left"):
        JsonLines(Path("/dev/full")).append({"step": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        build(tmp_path / "file" / "run")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFolderError, match="Is a directory"):
        build(tmp_path)


def test_secrets_are_kept_back() -> None:
    config = {
        "hf_token": "s1",
        "apiKey": "s2",
        "data": {"tokenizer": "bytes", "num_tokens": 5, "path": "s3://me:s3cret@host/x", "secret": None},
        "list": [{"aws_access_key": "s4"}],
    }
    clean = redact(config)
    assert clean == {
        "hf_token": "(redacted)",
        "apiKey": "(redacted)",
        "data": {"tokenizer": "bytes", "num_tokens": 5, "path": "s3://(redacted)@host/x", "secret": None},
        "list": [{"aws_access_key": "(redacted)"}],
    }


@pytest.mark.slow
def test_wandb_offline_needs_no_account_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run_dir = tmp_path / "run"
    config = MetricsConfig(wandb=WandbMode.offline)
    secret = "do-not-store-me"
    ids = []
    for attempt in range(2):
        with build(
            run_dir, config=config, log_every=1, run_config={"hf_token": secret, "lr": 0.125}, resumed_at=attempt
        ) as metrics:
            take_step(metrics, 1 + attempt, 0.4375 + attempt)
        ids.append((run_dir / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    wandb.teardown()  # its background process writes behind; it ends with ours, and here now
    folders = sorted((run_dir / "wandb").glob(f"offline-run-*-{ids[0]}*"))
    logs = [log.read_bytes() for folder in folders for log in folder.glob("*.wandb")]
    assert len(logs) == 2 and not any(secret.encode() in log for log in logs)
    content = b"".join(logs)
    assert b"0.4375" in content and b"1.4375" in content and b"0.125" in content
    assert not (tmp_path / "elsewhere").exists()


def test_wandb_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'pip install "windlass\[wandb\]"'):
        build(tmp_path, config=MetricsConfig(wandb=WandbMode.online))


def test_wandb_online_without_an_account_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"metrics\.wandb=offline"):
        build(tmp_path / "run", config=MetricsConfig(wandb=WandbMode.online))
