"""Names that users and their scripts rely on: they may be joined by others, and not renamed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from support import runs

import windlass.checkpoint
import windlass.offload
import windlass.optim
from windlass import errors
from windlass.cli import main
from windlass.conf.compose import compose
from windlass.conf.dotted_keys import flatten
from windlass.conf.store import to_plain

CHOICES = {
    "model": "tiny llama_60m llama_130m llama_350m llama_1b llama_7b",
    "data": "stdlib text parquet tokens",
    "optim": "adamw apollo apollo_mini galore natural_galore cosmos sgd_sai muon",
    "parallel": "none ddp zero1 zero2 zero3 hsdp",
    "offload": "none cpu ssd",
    "checkpoint": "none durable lazy erasure",
    "launch": "local torchrun ray",
}
KEYS = """
run_dir resume train.steps train.seed train.deterministic train.batch_size train.seq_len
train.grad_accum_steps train.max_norm train.dtype train.activation_checkpoint train.compile train.eval_every
train.log_every optim.lr optim.weight_decay optim.rank optim.update_interval optim.scale offload.dir
offload.max_host_bytes checkpoint.snapshot_every checkpoint.persist_every checkpoint.dir
checkpoint.num_parity_shards checkpoint.keep launch.nproc_per_node launch.nnodes launch.max_restarts
launch.address metrics.wandb metrics.console metrics.report
"""
COMMANDS = [
    "train",
    "plan",
    "doctor",
    "report",
    "ckpt list",
    "ckpt verify",
    "ckpt export",
    "ckpt import",
    "data prepare",
]
METRICS = """
step tokens train/loss optim/grad_norm optim/lr throughput/tokens_per_s throughput/step_s throughput/mfu
checkpoint/stall_s comm/bytes memory/host_rss_bytes memory/device_peak_bytes
"""
SIGNATURES: dict[Any, str] = {
    windlass.optim.Apollo: "lr betas eps weight_decay compat",
    windlass.optim.GaLore: "lr betas eps weight_decay compat",
    windlass.optim.NaturalGaLore: "lr betas eps weight_decay compat",
    windlass.optim.Cosmos: "lr betas eps rank gamma ratio weight_decay compat",
    windlass.optim.SGDSaI: "lr momentum eps weight_decay",
    windlass.optim.Muon: "lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
    windlass.optim.low_rank_param_groups: "rank",
    windlass.offload.offload_optimizer: "tier dir",
    windlass.checkpoint.Checkpointer: "dir num_parity_shards",
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in CHOICES for name in CHOICES[group].split()])
def test_each_choice_of_a_group_is_there(group: str, name: str) -> None:
    path = ["data.path=/somewhere"] if name in ("tokens", "text", "parquet") else []
    assert to_plain(compose([f"{group}={name}", *path]))[group]["name"] == name


def test_each_key_is_there() -> None:
    known = flatten(to_plain(compose(["optim=apollo", "data=text", "data.path=/somewhere"])))
    assert [key for key in KEYS.split() if key not in known] == []


def test_the_exit_codes() -> None:
    codes = (errors.EXIT_DONE, errors.EXIT_FAILURE, errors.EXIT_USER_ERROR, errors.EXIT_STOPPED)
    assert codes == (0, 1, 2, 75)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([*command.split(), "--help"]) == errors.EXIT_DONE
    except SystemExit as ending:
        assert ending.code == errors.EXIT_DONE
    assert "windlass" in capsys.readouterr().out


@pytest.mark.parametrize("target", SIGNATURES, ids=lambda target: target.__name__)
def test_each_call_takes_its_arguments(target: Any) -> None:
    parameters = inspect.signature(target).parameters
    assert [name for name in SIGNATURES[target].split() if name not in parameters] == []


@pytest.mark.slow
def test_the_files_of_a_run_and_their_lines() -> None:
    config = runs.undisturbed(1)
    folder = Path(config.run_dir)
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints", "logs/rank0.log"):
        assert (folder / name).exists(), name
    records = runs.metrics(config)
    steps = [record for record in records if "train/loss" in record]
    assert [key for key in METRICS.split() if key not in steps[-1]] == []
    assert any("val/loss" in record for record in records)
    assert runs.events(config, "start") and runs.events(config, "persisted") and runs.events(config, "done")
    assert all({"time", "kind", "step"} <= event.keys() for event in runs.events(config, "persisted"))
