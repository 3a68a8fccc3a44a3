"""The step on made-up tokens leaves everything as it was."""

from __future__ import annotations

import copy
import functools
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.trained import assert_finite, assert_moved

from windlass.conf.compose import compose
from windlass.conf.schema import GROUPS, Config
from windlass.errors import DoesNotFit
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.optim.scheduler import WarmupScheduler
from windlass.outcome import OUTCOME_FILE
from windlass.train import mock_step as module
from windlass.train.build import StepParts, build_model, build_optimizer, build_tiers, modules_of_units
from windlass.train.mock_step import mock_step

TINY = (
    "model.vocab_size=32",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.dropout=0.1",
    "train.batch_size=2",
    "train.seq_len=8",
    "train.device=cpu",
    "parallel=none",
    "checkpoint=none",
    "optim=adamw",
)


@functools.cache
def composed(overrides: tuple[str, ...]) -> Config:
    return compose([*TINY, *overrides])


def make_parts(*overrides: str) -> tuple[StepParts, WarmupScheduler]:
    """What `mock_step` uses of a run, as `windlass.train.session` builds it."""
    config = copy.deepcopy(composed(overrides))
    mesh = config.parallel.build(torch.device("cpu"))
    tiers = build_tiers(config, mesh)
    model, sharder = build_model(config, mesh, tiers)
    optimizer = build_optimizer(config, model, tiers)
    in_backward = config.optim.build_in_backward(optimizer, config.train.max_norm, ())
    if tiers is not None:
        tiers.attend(model, modules_of_units(model), is_cut=False)
    scheduler = config.optim.build_scheduler(optimizer, 10)
    return StepParts(config, mesh, model, sharder, optimizer, in_backward, tiers), scheduler


def all_of(run: StepParts, scheduler: WarmupScheduler) -> dict[str, Any]:
    if isinstance(run.optimizer, OffloadedOptimizer):
        run.optimizer.settle()
        with run.optimizer.weights_loaded(list(run.model.parameters())):
            return all_in_memory(run, scheduler)
    return all_in_memory(run, scheduler)


def all_in_memory(run: StepParts, scheduler: WarmupScheduler) -> dict[str, Any]:
    state = run.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.view(torch.int32).tolist() for name, value in run.model.state_dict().items()},
        "gradients": [parameter.grad for parameter in run.model.parameters()],
        "state": {i: {key: torch.as_tensor(x).tolist() for key, x in s.items()} for i, s in state.items()},
        "groups": run.optimizer.state_dict()["param_groups"],
        "in_backward": None if run.in_backward is None else run.in_backward.state_dict(),
        "scheduler": (scheduler.state_dict(), scheduler.get_last_lr()),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "training": run.model.training,
    }


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
@pytest.mark.parametrize("borders", ["loss", "attention"])
@pytest.mark.parametrize("in_backward", ["none", "previous_norm"])
def test_nothing_has_changed(grad_accum_steps: int, borders: str, in_backward: str) -> None:
    run, scheduler = make_parts(
        f"train.grad_accum_steps={grad_accum_steps}", f"data.borders={borders}", f"optim.in_backward={in_backward}"
    )
    before = all_of(run, scheduler)
    mock_step(run)
    assert all_of(run, scheduler) == before
    assert not run.optimizer.state


PLACES = {
    "memory": [],
    "memory, in backward": ["optim.in_backward=previous_norm"],
    "cpu": ["offload=cpu"],
    "ssd": ["offload=ssd"],
    "ssd, in backward": ["offload=ssd", "optim.in_backward=previous_norm"],
    "streamed": ["offload=ssd", "offload.weights=streamed"],
}
USUAL_PLACES = ("memory", "cpu", "ssd, in backward")


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place in USUAL_PLACES else pytest.mark.full) for place in PLACES]
)
@pytest.mark.parametrize("optim", GROUPS["optim"])
def test_no_optimizer_changes_a_bit(optim: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what is saved nor of what the steps that follow make of it."""
    monkeypatch.setattr("windlass.offload.optimizer.RESIDENT_NUMEL", 64)  # what is larger goes to the tier
    monkeypatch.setattr("windlass.offload.weights.RESIDENT_NUMEL", 64)
    overrides = [f"optim={optim}", *PLACES[place], f"run_dir={tmp_path}", "offload.buffer_bytes=1048576"]
    if optim == "cosmos":
        overrides.append("optim.rank=4")  # a part of each matrix is outside of the basis
    after = []
    for is_tried in (False, True):
        torch.manual_seed(0)
        run, scheduler = make_parts(*overrides)
        if is_tried:
            before = all_of(run, scheduler)
            mock_step(run)
            assert all_of(run, scheduler) == before
        after.append(trained(run, scheduler))
        if run.tiers is not None:
            run.tiers.close()
    assert after[0] == after[1]


def trained(run: StepParts, scheduler: WarmupScheduler) -> dict[str, Any]:
    """All there is after two steps on the same tokens, which have changed the weights."""
    ids, losses, before = torch.arange(16).view(2, 8), [], weights_of(all_of(run, scheduler))
    for _ in range(2):
        run.sharder.begin_micro_step(run.model, is_last=True)
        if run.in_backward is not None:
            run.in_backward.begin_micro_step(is_last=True)
        with run.activations_offloaded():
            loss = run.model(ids).square().mean()
        losses.append(loss.item())
        loss.backward()
        if run.in_backward is not None:
            assert run.in_backward.finish() > 0
        run.optimizer.step()
        run.optimizer.zero_grad()
        scheduler.step()
    after = all_of(run, scheduler)
    assert_finite(losses, 2)
    assert_moved(before, weights_of(after))
    return after


def weights_of(everything: dict[str, Any]) -> list[torch.Tensor]:
    """Of `all_of`, which has their bits."""
    return [torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in everything["weights"].values()]


def test_it_says_what_the_optimizer_takes_and_what_is_left_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([9 << 30, 7 << 30, 5 << 30])
    monkeypatch.setattr(module, "host_memory", lambda: (next(left, 8 << 30), 16 << 30))
    run, _ = make_parts()
    run.model.register_forward_hook(lambda *_: time.sleep(0.2))  # as long as several looks at the memory take
    memory = mock_step(run)
    numel = sum(parameter.numel() for parameter in run.model.parameters())
    assert 8 * numel <= memory.optimizer_bytes <= 8 * numel + 4 * len(list(run.model.parameters()))
    assert memory.free_bytes == 5 << 30


def test_where_weights_are_streamed_all_micro_batches_share_a_pass(tmp_path: Path) -> None:
    overrides = ["offload=ssd", "offload.weights=streamed", "train.grad_accum_steps=5", f"run_dir={tmp_path}"]
    run, _ = make_parts(*overrides)
    sizes: list[int] = []
    run.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    mock_step(run)
    assert sizes == [5], "what they save is there at the same time"
    assert run.tiers is not None
    run.tiers.close()


def test_forward_backward_and_optimizer_run_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_parts("train.grad_accum_steps=3")
    shapes, states = [], []
    run.model.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    clear = run.optimizer.zero_grad

    def look(*args: object, **kwargs: object) -> None:
        states.append([parameter.grad is not None for parameter in run.model.parameters()])
        clear(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "zero_grad", look)
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped.append)
    mock_step(run)
    assert shapes == [(2, 8), (2, 8)], "two micro-steps stand for all: from the second on, gradients are there"
    assert stepped == [run.optimizer]
    assert all(states[0])


def test_the_scheduler_does_not_think_that_the_optimizer_was_called(recwarn: pytest.WarningsRecorder) -> None:
    run, scheduler = make_parts()
    mock_step(run)
    run.model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    run.optimizer.step()
    scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_device_without_room_is_said_with_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_parts()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.model.register_forward_hook(fail)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 << 30))
    state = torch.get_rng_state()
    with pytest.raises(DoesNotFit, match=r"train\.batch_size=2: .*8\.0 GiB.*Fix: lower train\.batch_size"):
        mock_step(run)
    assert torch.equal(torch.get_rng_state(), state)


STARVED = """
import time
from windlass.train import mock_step as module
module.host_memory = lambda: (1 << 20, 1 << 30)
with module._host_memory_watched():
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_launcher", [False, True])
def test_a_host_without_room_ends_the_process_with_a_message(has_launcher: bool, tmp_path: object) -> None:
    outcome = f"{tmp_path}/outcome"
    environment = {key: value for key, value in os.environ.items() if key != OUTCOME_FILE}
    if has_launcher:
        environment[OUTCOME_FILE] = outcome
    result = subprocess.run(
        [sys.executable, "-c", STARVED], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stderr.startswith("windlass: error: train.batch_size=...: the first step had used ")
    assert "of the host's 1.0 GiB were left. Fix: lower train.batch_size" in result.stderr
    assert result.returncode == 2, "the agent must see it, to end the ranks that wait for this one"
    assert os.path.exists(outcome) == has_launcher  # noqa: PTH110


def test_enough_memory_ends_nothing_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(module, "host_memory", lambda: (1 << 30, 1 << 30))
    with module._host_memory_watched():
        assert "windlass-memory-watch" in [thread.name for thread in threading.enumerate()]
    assert "windlass-memory-watch" not in [thread.name for thread in threading.enumerate()]
