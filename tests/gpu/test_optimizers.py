"""The optimizers on a GPU do what they do on a CPU."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import CASES, gradient, make, parameters_of
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = [(34, 49), (49, 34), (40, 40), (3, 64), (40, 40), (7,)]


def trained(name: str, device: str) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    parameters = [nn.Parameter(parameter.detach().to(device)) for parameter in parameters_of(SHAPES)]
    optimizer = make(name, parameters[:-1], parameters[-1:], weight_decay=0.1)
    for step in range(10):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(tuple(parameter.shape), step, index).to(device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters], optimizer


@pytest.mark.parametrize("name", list(CASES))
def test_a_gpu_follows_a_cpu(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    # Newton-Schulz is in bfloat16, whose products are added up in another order.
    atol = 2e-2 if name in ("muon", "cosmos") else 1e-4
    for found, expected in zip(trained(name, "cuda")[0], trained(name, "cpu")[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", list(CASES))
def test_two_runs_on_a_gpu_are_one_to_the_bit(name: str) -> None:
    for one, other in zip(trained(name, "cuda")[0], trained(name, "cuda")[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in CASES if "galore" not in name])
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    """GaLore waits where it finds new directions, once in `update_interval` steps."""
    parameters = [nn.Parameter(parameter.detach().cuda()) for parameter in parameters_of(SHAPES[:-1])]
    optimizer = make(name, parameters, weight_decay=0.1)
    optimizer.param_groups[0]["update_interval"] = 1000
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(tuple(parameter.shape), step, index).cuda()
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", list(CASES))
def test_the_count_of_steps_stays_on_the_host(name: str) -> None:
    _, optimizer = trained(name, "cuda")
    for state in optimizer.state.values():
        assert {key: value.device.type for key, value in state.items() if key == "step"} == {"step": "cpu"}
        assert all(value.device.type == "cuda" for key, value in state.items() if key != "step")
