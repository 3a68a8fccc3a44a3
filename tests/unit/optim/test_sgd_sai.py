from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.optimizers import check_golden, golden_settings, gradient, parameters_of, take_steps
from torch import nn

from windlass.optim import SGDSaI
from windlass.optim.config import SGDSaIConfig

SETTINGS = golden_settings()
LR = SETTINGS["learning_rates"]["sgd_sai"]


@pytest.mark.parametrize("shape", [tuple(shape) for shape in SETTINGS["shapes"]])
@pytest.mark.parametrize("weight_decay", SETTINGS["weight_decays"])
def test_it_gives_the_authors_weights(shape: tuple[int, int], weight_decay: float) -> None:
    def make(parameter: nn.Parameter, weight_decay: float) -> SGDSaI:
        return SGDSaI([parameter], lr=LR, weight_decay=weight_decay)

    check_golden("sgd_sai", make, shape, weight_decay)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_any_shape_has_a_momentum_and_one_scale(shape: tuple[int, ...]) -> None:
    parameter = parameters_of([shape])[0]
    optimizer = SGDSaI([parameter])
    take_steps(optimizer, [parameter], range(2))
    state = optimizer.state[parameter]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "momentum_buffer": shape,
        "gsnr": (),
    }
    first = gradient(shape, 0)
    torch.testing.assert_close(state["gsnr"], first.norm() / (first.std() + 1e-8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,)])
def test_elements_without_spread_get_the_scale_of_mean_zero(shape: tuple[int, ...]) -> None:
    """As a thousand elements of mean zero get sqrt(1000)."""
    parameter = parameters_of([shape])[0]
    start = parameter.detach().clone()
    parameter.grad = torch.full(shape, 0.3)
    optimizer = SGDSaI([parameter], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert float(optimizer.state[parameter]["gsnr"]) == pytest.approx(math.sqrt(math.prod(shape)))
    torch.testing.assert_close(parameter.detach(), start - 0.1 * 0.3 * math.sqrt(math.prod(shape)))


def test_a_tensor_whose_first_gradient_is_zero_is_measured_by_the_next() -> None:
    parameters = parameters_of([(4, 3), (4, 3)])
    optimizer = SGDSaI(parameters, weight_decay=0.0)
    start = [parameter.detach().clone() for parameter in parameters]
    for step, scale in enumerate((0.0, 0.0, 1.0, 5.0)):
        parameters[0].grad = scale * gradient((4, 3), step)
        parameters[1].grad = gradient((4, 3), step)
        optimizer.step()
    assert not torch.equal(parameters[0].detach(), start[0])
    for parameter, measured_at in zip(parameters, (2, 0), strict=True):
        used = gradient((4, 3), measured_at)
        torch.testing.assert_close(optimizer.state[parameter]["gsnr"], used.norm() / used.std())


def test_the_scale_survives_a_resume() -> None:
    """Also in an optimizer that has measured its own."""
    parameters = parameters_of([(4, 3)])
    optimizer = SGDSaI(parameters)
    take_steps(optimizer, parameters, range(2))
    others = parameters_of([(4, 3)])
    other = SGDSaI(others)
    take_steps(other, others, range(5, 6))
    other.load_state_dict(optimizer.state_dict())
    expected = optimizer.state[parameters[0]]["gsnr"].clone()
    take_steps(other, others, range(8, 10))
    assert torch.equal(other.state[others[0]]["gsnr"], expected)
    assert int(other.state[others[0]]["step"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "lr=nan"),
        ({"eps": -1.0}, r"eps=-1\.0: must be finite and not negative"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0: must be in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDSaI(parameters_of([(4, 4)]), **settings)


def test_the_configuration_builds_it() -> None:
    optimizer = SGDSaIConfig(lr=0.02, momentum=0.8).build(nn.Linear(3, 4))
    assert isinstance(optimizer, SGDSaI)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["momentum"], matrices["weight_decay"]) == (0.02, 0.8, 1e-2)
    assert (vectors["param_names"], vectors["weight_decay"]) == (["bias"], 0.0)
