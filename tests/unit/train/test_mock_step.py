"""The step on made-up tokens leaves everything as it was."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from windlass.errors import DoesNotFit
from windlass.optim.config import AdamWConfig, Schedule
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.zero import Sharder
from windlass.train import mock_step as module
from windlass.train.config import ModelConfig, TrainConfig
from windlass.train.mock_step import host_memory, mock_step
from windlass.train.outcome import OUTCOME_FILE


def make_run(grad_accum_steps: int = 1, mask_documents: bool = False) -> SimpleNamespace:
    """What `mock_step` uses of a run."""
    parallel = ParallelConfig(name=Sharding.none)
    mesh = parallel.build(torch.device("cpu"))
    model = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, dropout=0.1
    ).build()
    model.materialize(mesh.device, seed=0)
    optimizer = AdamWConfig(schedule=Schedule.constant).build(model)
    scheduler = AdamWConfig().build_scheduler(optimizer, num_steps=10)
    train = TrainConfig(batch_size=2, seq_len=8, grad_accum_steps=grad_accum_steps)
    return SimpleNamespace(
        config=SimpleNamespace(train=train),
        mesh=mesh,
        model=model,
        sharder=Sharder(parallel, mesh),
        optimizer=optimizer,
        scheduler=scheduler,
        mask_documents=mask_documents,
    )


def all_of(run: SimpleNamespace) -> dict[str, object]:
    return {
        "weights": {name: value.view(torch.int32).tolist() for name, value in run.model.state_dict().items()},
        "gradients": [parameter.grad for parameter in run.model.parameters()],
        "optimizer": run.optimizer.state_dict(),
        "scheduler": (run.scheduler.state_dict(), run.scheduler.get_last_lr()),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "training": run.model.training,
    }


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_nothing_has_changed(grad_accum_steps: int, mask_documents: bool) -> None:
    run = make_run(grad_accum_steps, mask_documents)
    before = all_of(run)
    mock_step(run)  # type: ignore[arg-type]
    assert all_of(run) == before
    assert not run.optimizer.state


def test_forward_backward_and_optimizer_run_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(grad_accum_steps=3)
    shapes, states = [], []
    run.model.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    clear = run.optimizer.zero_grad

    def look(*args: object, **kwargs: object) -> None:
        states.append([parameter.grad is not None for parameter in run.model.parameters()])
        clear(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "zero_grad", look)
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped.append)
    mock_step(run)  # type: ignore[arg-type]
    assert shapes == [(2, 8), (2, 8)], "two micro-steps stand for all: from the second on, gradients are there"
    assert stepped == [run.optimizer]
    assert all(states[0])


def test_the_scheduler_does_not_think_that_the_optimizer_was_called(recwarn: pytest.WarningsRecorder) -> None:
    run = make_run()
    mock_step(run)  # type: ignore[arg-type]
    run.model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    run.optimizer.step()
    run.scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_device_without_room_is_said_with_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "forward_loss_sum", fail)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 << 30))
    state = torch.get_rng_state()
    with pytest.raises(DoesNotFit, match=r"train\.batch_size=2: .*8\.0 GiB.*Fix: lower train\.batch_size"):
        mock_step(run)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


STARVED = """
import time
from windlass.train import mock_step as module
module.host_memory = lambda: (1 << 20, 1 << 30)
with module._host_memory_watched():
    time.sleep(60)
"""


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


def test_the_hosts_memory_is_plausible() -> None:
    available, total = host_memory()
    assert 0 < available <= total
