"""What is saved of activations, where ranks cut the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import assert_trained, run, run_config

from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.machine.speeds import Machine, machine_key, save_machine, ssd_key
from windlass.train.config import ActivationCheckpoint

SHAPE = ("model.hidden_size=128", "model.intermediate_size=256", "train.batch_size=8", "train.seq_len=256")
"""A rank's hidden state has 1 MiB, which is enough to be moved."""
FRACTION = ("train.activation_checkpoint=fraction", "train.activation_fraction=0.5")


def config_of(root: Path, name: str, *overrides: str) -> Config:
    settings = ("train.steps=3", "optim.warmup_steps=1", "checkpoint=none", "parallel=zero3")
    return run_config(root, name, *SHAPE, *settings, *overrides)


def losses(config: Config) -> list[float]:
    assert run(config, 2) == [0, 0]
    assert_trained(config)
    lines = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.full
@pytest.mark.parametrize("weights", [pytest.param("memory", marks=pytest.mark.full), "streamed"])
def test_a_fraction_trains_like_the_whole(weights: str, tmp_path: Path) -> None:
    where = ("offload=ssd", f"offload.weights={weights}", "train.grad_accum_steps=2")
    whole, half = (config_of(tmp_path, name, *where, *more) for name, more in (("whole", ()), ("half", FRACTION)))
    assert losses(half) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.full
def test_ranks_decide_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    machine = Machine(machine_key(), matmul_flops={"float32": 1e10}, memcpy_bytes_per_s=1e12)
    machine.ssd[ssd_key(tmp_path)] = {
        "read_bytes_per_s": 8e7,
        "write_bytes_per_s": 8e7,
        "cpu_s_per_byte": 0.0,
        "is_direct": True,
    }
    save_machine(machine)
    moving = ("offload=ssd", "offload.max_activation_bytes=1000000")
    auto = config_of(tmp_path, "auto", *moving, "train.activation_checkpoint=auto")
    found = losses(auto)
    train = load_config(Path(auto.run_dir) / "config.yaml").train
    # Which it is depends on what memory the machine has left.
    assert train.activation_checkpoint != ActivationCheckpoint.auto
    said = [f"train.activation_checkpoint={train.activation_checkpoint}"]
    if train.activation_fraction is not None:
        said.append(f"train.activation_fraction={train.activation_fraction}")
    explicit = config_of(tmp_path, "explicit", *moving, *said)
    assert found == losses(explicit)
