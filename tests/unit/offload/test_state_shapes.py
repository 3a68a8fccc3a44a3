"""The state of a first step is known before the step, and nothing remembers that it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from support.optimizers import CASES, make, parameters_of
from torch import Tensor

from windlass.offload.state_shapes import state_shapes

SHAPES: list[tuple[int, ...]] = [(24, 32), (32, 24), (40,)]
OTHERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd_plain": lambda params: torch.optim.SGD(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True, momentum=0.5),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "lion": lambda params: Lion(params, lr=0.1),
}


def build(name: str, params: list) -> torch.optim.Optimizer:
    return OTHERS[name](params) if name in OTHERS else make(name, params[:2], params[2:])


def shapes_of(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (value.shape, value.dtype) if isinstance(value, Tensor) else type(value) for key, value in state.items()
    }


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_it_is_the_state_of_the_first_step_and_leaves_no_trace(name: str) -> None:
    params = parameters_of(SHAPES)
    optimizer = build(name, params)
    other = params[2]
    other.grad = gradient = torch.ones_like(other)
    weights, settings = [parameter.detach().clone() for parameter in params], settings_of(optimizer)
    rng_state = torch.get_rng_state()
    found = state_shapes(optimizer, params[:2])

    assert torch.equal(torch.get_rng_state(), rng_state)
    assert settings_of(optimizer) == settings
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(params, weights, strict=True))
    assert [parameter.grad for parameter in params] == [None, None, gradient] and gradient.eq(1).all()
    assert not optimizer.state

    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer = build(name, params)
    optimizer.step()
    assert [shapes_of(state) for state in found] == [shapes_of(optimizer.state[parameter]) for parameter in params[:2]]


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.AdamW])
def test_state_that_is_there_already_stays(kind: type[torch.optim.Optimizer]) -> None:
    """Adagrad makes its state when it is made, and cannot step without."""
    params = parameters_of(SHAPES)
    optimizer = kind(params)
    if kind is torch.optim.AdamW:
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    before = {
        parameter: {key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in params
    }
    found = state_shapes(optimizer, params)
    assert all(found) and [state.keys() for state in found] == [found[0].keys()] * len(params)
    for parameter, state in before.items():
        assert optimizer.state[parameter].keys() == state.keys()
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())


def test_it_may_be_asked_for_in_the_middle_of_a_backward_pass() -> None:
    """Where the first step is made there, autograd still needs the weights that come later."""
    params = parameters_of([(24, 24)] * 3)
    optimizer = torch.optim.AdamW(params)
    found = []
    params[2].register_post_accumulate_grad_hook(lambda _: found.extend(state_shapes(optimizer, params)))
    (torch.ones(2, 24) @ params[0] @ params[1] @ params[2]).sum().backward()
    assert all(parameter.grad is not None for parameter in params) and len(found) == 3


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    """Whoever holds it too may set it."""
    params, lr = parameters_of([(24, 32)]), torch.tensor(0.1)
    optimizer = torch.optim.AdamW(params, lr=lr)
    state_shapes(optimizer, params)
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == float(torch.tensor(0.1))


def test_a_scheduler_does_not_take_it_for_a_step() -> None:
    (parameter,) = params = parameters_of([(24, 32)])
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state_shapes(optimizer, params)
    parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
        scheduler.step()


class Counting(torch.optim.Optimizer):
    """Keeps a count of steps for all parameters together, as Prodigy and schedule-free optimizers do.

    Args:
        count: None: it is put into the param groups by the first step.
    """

    def __init__(self, params: Iterable[Tensor], count: Any = 0) -> None:
        super().__init__(params, {"lr": 0.1} if count is None else {"lr": 0.1, "count": count})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad + 1, alpha=-group["lr"] / group["count"])


@pytest.mark.parametrize("count", [0, torch.tensor(0.0), None])
def test_an_optimizer_that_keeps_something_for_all_parameters_together_is_refused(count: Any) -> None:
    params = parameters_of([(24, 32), (3,)])
    optimizer = Counting(params, count)
    settings, weight = settings_of(optimizer), params[0].detach().clone()
    with pytest.raises(
        ValueError, match=r"Counting changes 'count' of its param groups in a step: .* use an optimizer"
    ):
        state_shapes(optimizer, params)
    assert settings_of(optimizer) == settings
    assert torch.equal(params[0], weight) and params[0].grad is None
