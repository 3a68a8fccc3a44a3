"""Runs that save some of their activations, move some, and have it chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_trained, checkpoints, newest_digest, run_config

from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.launch.worker import run_worker
from windlass.machine import measure as speed
from windlass.machine import memory
from windlass.machine.speeds import Machine, load_machine, machine_key, save_machine, ssd_key
from windlass.train import activation_choice, mock_step
from windlass.train.activation_choice import decision_before
from windlass.train.activation_costs import layer_costs
from windlass.train.config import ActivationCheckpoint

MIB = 1 << 20
SHAPE = ("model.hidden_size=128", "model.intermediate_size=256", "train.batch_size=16", "train.seq_len=128")
"""A hidden state of the batch has 1 MiB, which is enough to be moved."""
BUFFER_BYTES = 96 * MIB


def tiny(root: Path, run_dir: str, *overrides: str) -> Config:
    settings = ("model.vocab_size=320", "train.steps=4", "optim.warmup_steps=1", "checkpoint=durable")
    return run_config(root, run_dir, *SHAPE, *settings, f"offload.buffer_bytes={BUFFER_BYTES}", *overrides)


def train(config: Config, after: int = 0) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that have a loss, of all attempts so far, which began after a step."""
    assert run_worker(config) == 0
    assert_trained(config, after)
    lines = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines]


def written(lines: list[dict[str, Any]]) -> int:
    return lines[-1]["offload/write_bytes"]


def start_events(config: Config) -> list[dict[str, Any]]:
    events = map(json.loads, (Path(config.run_dir) / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == "start"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """This machine, as if it had been measured: with a disk that is never waited for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    machine = Machine(machine_key(), matmul_flops={"float32": 1e10, "bfloat16": 1e10}, memcpy_bytes_per_s=1e10)
    machine.ssd[ssd_key(tmp_path)] = {
        "read_bytes_per_s": 1e12,
        "write_bytes_per_s": 1e12,
        "cpu_s_per_byte": 0.0,
        "is_direct": True,
    }
    save_machine(machine)
    return machine


def with_room(monkeypatch: pytest.MonkeyPatch, config: Config, share: float) -> int:
    """Leaves memory for the layers' inputs, the attention's outputs and `share` of the rest; returns its bytes."""
    train, layers = config.train, config.model.num_layers
    costs = layer_costs(config.model, torch.float32, train.batch_size, train.seq_len, torch.device("cpu"))
    room = layers * (costs.input_bytes + costs.attention_bytes + share * costs.rest_bytes)
    numel = sum(parameter.numel() for parameter in config.model.build().parameters())
    state, weights = 8 * numel, 4 * numel
    buffers = BUFFER_BYTES // 3 if config.offload.name == "ssd" else 0
    in_memory = (0 if buffers else 2 * state) + weights  # the optimizer's state, and a checkpoint's copy of all
    free = (room - layers * costs.input_bytes) / (1 - activation_choice.MARGIN) + in_memory + buffers
    num_bytes = int(free / (1 - memory.LOW_WATER_FRACTION))
    for module in (mock_step, activation_choice):
        monkeypatch.setattr(module, "host_memory", lambda: (num_bytes, num_bytes))
    return int(room)


@pytest.mark.slow
def test_a_fraction_trains_like_the_whole_and_resumes_to_the_bit(tmp_path: Path) -> None:
    fraction = ("train.activation_checkpoint=fraction", "train.activation_fraction=0.5", "checkpoint.persist_every=2")
    whole, half = tiny(tmp_path, "whole"), tiny(tmp_path, "half", *fraction)
    assert losses(train(half)) == pytest.approx(losses(train(whole)), rel=1e-4)
    resumed = tiny(tmp_path, "resumed", *fraction, f"resume={checkpoints(half) / 'step-00000002'}")
    assert losses(train(resumed, after=2)) == losses(train(half))[2:]
    assert newest_digest(resumed) == newest_digest(half)


@pytest.mark.full
@pytest.mark.slow
def test_what_moves_to_the_disk_comes_back_with_its_bits(tmp_path: Path) -> None:
    moved = tiny(tmp_path, "moved", "offload=ssd", "offload.max_activation_bytes=1000000")
    kept, state_only = tiny(tmp_path, "kept"), tiny(tmp_path, "state_only", "offload=ssd")
    lines = train(moved)
    assert losses(lines) == losses(train(kept))
    assert newest_digest(moved) == newest_digest(kept)
    assert written(lines) > written(train(state_only)) + 10 * MIB


@pytest.mark.slow
def test_where_there_is_room_all_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto, explicit = tiny(tmp_path, "auto", "train.activation_checkpoint=auto"), tiny(tmp_path, "explicit")
    assert losses(train(auto)) == losses(train(explicit))
    assert "saved   all activations are kept (train.activation_checkpoint=auto)" in capsys.readouterr().out
    saved = load_config(Path(auto.run_dir) / "config.yaml")
    assert saved.train == load_config(Path(explicit.run_dir) / "config.yaml").train
    assert saved.offload.max_activation_bytes is None


@pytest.mark.slow
def test_where_half_has_room_half_is_kept_and_the_run_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = ("train.activation_checkpoint=auto", "checkpoint.persist_every=2")
    config = tiny(tmp_path, "auto", *auto)
    with monkeypatch.context() as patch:
        with_room(patch, config, 0.5)
        first = train(config)
    saved = load_config(Path(config.run_dir) / "config.yaml")
    assert saved.train.activation_checkpoint == ActivationCheckpoint.fraction
    assert saved.train.activation_fraction is not None and 0.45 <= saved.train.activation_fraction <= 0.5
    said = capsys.readouterr().out
    [event] = start_events(config)
    assert event["activations"]["activation_fraction"] == saved.train.activation_fraction
    assert len(event["activations"]["reasons"]) == 4
    assert all(reason in said for reason in event["activations"]["reasons"])

    longer = tiny(tmp_path, "auto", *auto, "train.steps=6")  # there is room for all by now
    assert len(train(longer)) == len(first) + 2
    assert "saved   fraction, as in the attempt before" in (said := capsys.readouterr().out)
    assert "changed train.steps: 4 -> 6" in said and "changed train.activation" not in said
    assert (
        load_config(Path(config.run_dir) / "config.yaml").train.activation_fraction == saved.train.activation_fraction
    )
    assert start_events(config)[1]["activations"]["activation_checkpoint"] == "fraction"

    explicit = ("train.activation_checkpoint=fraction", f"train.activation_fraction={saved.train.activation_fraction}")
    other = tiny(tmp_path, "explicit", *explicit, "checkpoint.persist_every=2")
    assert losses(train(other)) == losses(first), "chosen or said, the bits are the same"


@pytest.mark.full
@pytest.mark.slow
def test_a_disk_takes_what_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, "auto", "train.activation_checkpoint=auto", "offload=ssd")
    room = with_room(monkeypatch, config, 0.5)
    lines = train(config)
    saved = load_config(Path(config.run_dir) / "config.yaml")
    assert saved.train.activation_checkpoint == ActivationCheckpoint.none
    assert saved.offload.max_activation_bytes == pytest.approx(room, rel=0.05)
    monkeypatch.undo()
    assert losses(lines) == losses(train(tiny(tmp_path, "kept")))
    assert written(lines) > written(train(tiny(tmp_path, "state_only", "offload=ssd"))) + MIB


@pytest.mark.slow
def test_a_limit_that_is_given_holds_and_a_slow_disk_is_spared(tmp_path: Path, machine: Machine) -> None:
    machine.ssd[ssd_key(tmp_path)] |= {"read_bytes_per_s": 1e6, "write_bytes_per_s": 1e6}
    save_machine(machine)
    given = ("train.activation_checkpoint=auto", "offload=ssd", "offload.max_activation_bytes=1000000")
    config = tiny(tmp_path, "auto", *given)
    train(config)
    saved = load_config(Path(config.run_dir) / "config.yaml")
    assert saved.train.activation_checkpoint == ActivationCheckpoint.full
    assert saved.offload.max_activation_bytes == 1000000


@pytest.mark.slow
def test_a_machine_that_was_not_measured_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(speed, "SSD_BYTES", 8 * MIB)
    for name, said in (("first", 1), ("second", 0)):
        train(tiny(tmp_path, name, "train.activation_checkpoint=auto", "train.steps=1", "checkpoint=none"))
        assert capsys.readouterr().out.count("measuring this machine's disk, memory and matrix products, once") == said
    assert load_machine().matmul_flops.keys() == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("kind", "before", "expected"),
    [
        ("auto", {"activation_checkpoint": "fraction", "activation_fraction": 0.25}, ("fraction", 0.25)),
        ("auto", {"activation_checkpoint": "full"}, ("full", None)),  # of a version that knew no fractions
        ("full", {"activation_checkpoint": "none"}, None),
    ],
)
def test_only_auto_takes_over_what_a_run_has_chosen(
    kind: str, before: dict[str, Any], expected: tuple[str, float | None] | None, tmp_path: Path
) -> None:
    config = tiny(tmp_path, "run", f"train.activation_checkpoint={kind}")
    kept = decision_before(config, {"train": before, "offload": {"max_activation_bytes": 5}})
    found = None if kept is None else (kept.activation_checkpoint, kept.activation_fraction)
    assert found == expected
    assert kept is None or kept.max_activation_bytes is None, "without a disk there is nothing to limit"
