"""`windlass train offload=ssd`: whole runs end where those in memory end."""

from __future__ import annotations

import json
from pathlib import Path

from support.runs import assert_same_training, output, run_config, start, undisturbed

from windlass.conf.schema import Config

LARGE = ("model.hidden_size=96", "model.intermediate_size=192", "train.steps=4", "train.max_norm=0.5")
"""Matrices that are large enough to be moved."""
STREAMED = ("offload=ssd", "offload.weights=streamed", "offload.buffer_bytes=1048576")


def last_record(config: Config) -> dict[str, float]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record][-1]


def run_side_by_side(configs: list[Config], num_ranks: int) -> None:
    attempts = [start(config, num_ranks) for config in configs]
    for attempt, config in zip(attempts, configs, strict=True):
        assert set(attempt.join()) == {0}, output(config)


def check_same(run: Config, calm: Config) -> None:
    assert_same_training(run, calm)
    record = last_record(run)
    assert record["offload/read_bytes"] > 0 and record["offload/write_bytes"] > 0
    assert "offload/read_bytes" not in last_record(calm)


def test_runs_that_share_a_disk_end_as_in_memory(tmp_path: Path) -> None:
    """One with its state there, one with its weights too, in halves, and four micro-batches."""
    halves = (*LARGE, "train.dtype=bfloat16", "train.grad_accum_steps=4")
    shared = f"offload.dir={tmp_path / 'tier'}"
    run = run_config(tmp_path, "run", *LARGE, "offload=ssd", shared)
    run_halves = run_config(tmp_path, "run_halves", *halves, *STREAMED, shared)
    run_side_by_side([run, run_halves], 1)
    check_same(run, undisturbed(1, *LARGE))
    check_same(run_halves, undisturbed(1, *halves))
    assert list((tmp_path / "tier").iterdir()) == []


def test_two_workers_end_as_in_memory(tmp_path: Path) -> None:
    cut = (*LARGE, "parallel=zero3", "optim=apollo", "optim.rank=12")
    run = run_config(tmp_path, "run", *cut, *STREAMED)
    run_side_by_side([run], 2)
    check_same(run, undisturbed(2, *cut))
    assert list((tmp_path / "run" / "offload").iterdir()) == []
