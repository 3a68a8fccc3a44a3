"""Parameters that are frozen, or have two bytes, or get no gradient in some steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.out_of_core import Training, assert_same_bits, net
from torch import nn

NUM_BUCKETS = 5


def test_frozen_parameters_take_no_part(tmp_path: Path) -> None:
    runs = []
    for tier in (None, tmp_path):
        model = net()
        for parameter in model[2].parameters():
            parameter.requires_grad_(False)
        runs.append(Training(tier, model=model))
        runs[-1].run(4)
    calm, run = runs
    assert_same_bits(run, calm)
    assert run.offloaded.reserve() == 8 * sum(
        p.numel() for p in run.model.parameters() if p.ndim == 2 and p.requires_grad
    )
    run.close()


def run_sparsely(run: Training, num_steps: int) -> None:
    """Some parameters have no gradient in some steps, and one layer has none before the third, as experts have."""
    parameters = list(run.model.parameters())
    for step in range(num_steps):
        run.backward()
        for number, parameter in enumerate(parameters):
            if (step + number) % 3 == 0 or (number < 2 and step < 2):
                parameter.grad = None
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1


@pytest.mark.parametrize("kind", ["adamw", "apollo", "sgd_sai"])
@pytest.mark.parametrize("layers_of_a_bucket", [1, NUM_BUCKETS])
def test_parameters_without_a_gradient_wait(kind: str, layers_of_a_bucket: int, tmp_path: Path) -> None:
    calm = Training(None, kind)
    run_sparsely(calm, 7)
    order = {} if layers_of_a_bucket == 1 else {"order": None}
    run = Training(tmp_path, kind, **order)
    assert len(run.offloaded.bucket_parameters()) == NUM_BUCKETS // layers_of_a_bucket
    run_sparsely(run, 7)
    assert_same_bits(run, calm)
    run.close()


def test_a_bucket_without_gradients_is_left_on_the_disk(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.run(2)
    run.offloaded.state_dict()  # all is written
    before = run.figures.write_bytes
    weight = run.model[4].weight
    weight.grad = torch.ones_like(weight)
    run.optimizer.step()
    run.offloaded.state_dict()
    assert run.figures.write_bytes - before == pytest.approx(8 * weight.numel(), abs=4096)
    run.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_parameters_of_two_bytes(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    calm = Training(None, kind, net(dtype=dtype))
    calm.run(4)
    run = Training(tmp_path, kind, net(dtype=dtype))
    run.run(4)
    assert_same_bits(run, calm)
    run.close()


def test_parameters_of_several_dtypes_share_a_bucket(tmp_path: Path) -> None:
    def mixed() -> nn.Sequential:
        model = net()
        model[2].bfloat16()
        model[6].double()
        return model

    runs = [Training(None, model=mixed()), Training(tmp_path, model=mixed(), order=None)]
    for run in runs:
        for step in range(4):
            for number, parameter in enumerate(run.model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            run.optimizer.step()
    assert len(runs[1].offloaded.bucket_parameters()) == 1
    assert_same_bits(runs[1], runs[0])
    runs[1].close()


def test_state_that_is_there_from_the_start(tmp_path: Path) -> None:
    """Adagrad makes its state when it is made."""
    runs = [Training(tier, lambda model: torch.optim.Adagrad(model.parameters())) for tier in (None, tmp_path)]
    for run in runs:
        run.run(4)
    assert_same_bits(runs[1], runs[0])
    runs[1].close()


def test_an_optimizer_without_state_touches_no_disk(tmp_path: Path) -> None:
    runs = [Training(tier, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)) for tier in (None, tmp_path)]
    for run in runs:
        run.run(3)
    assert runs[1].offloaded.reserve() == 0 and runs[1].figures.write_bytes == 0
    assert_same_bits(runs[1], runs[0])
    runs[1].close()


def test_an_optimizer_of_which_some_parameters_have_state_already(tmp_path: Path) -> None:
    """Experts that were not asked before it was offloaded are asked later, as others of their bucket were."""
    runs = [Training(None), Training(None)]
    for run in runs:
        run_sparsely(run, 2)
    assert runs[1].model[0].weight not in runs[1].plain.state
    runs[1].offload(tmp_path, order=None)
    for run in runs:
        run_sparsely(run, 5)
    assert_same_bits(runs[1], runs[0])
    runs[1].close()
