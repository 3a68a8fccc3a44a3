"""Finds the state that an optimizer will keep, before it keeps any."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from windlass.parallel.autograd_shim import preserving_version
from windlass.parallel.fragment import local_tensor


@torch.no_grad()
def state_shapes(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The state that `parameters` will have after their first step, or their next one; its values mean nothing.

    An optimizer that says it itself (`empty_state`, as windlass's do) is asked. Any other makes a step on these
    parameters with gradients of zero at a learning rate of zero, and everything is put back, so that it may happen in
    the middle of a backward pass.

    Raises:
        ValueError: the optimizer keeps something for all parameters together in its param groups, which every step on
            some of them would change again: it cannot step in parts.
    """
    empty_state = getattr(optimizer, "empty_state", None)
    if empty_state is not None:
        return [empty_state(parameter) for parameter in parameters]
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.enter_context(preserving_version(parameter))
        return _step_without_effect(optimizer, parameters)


def _step_without_effect(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    gradients = {parameter: parameter.grad for parameter in _all_parameters(optimizer)}
    weights = [local_tensor(parameter).clone() for parameter in parameters]
    states = {p: _copy(optimizer.state[p]) for p in parameters if p in optimizer.state}
    given = [_settings(group) for group in optimizer.param_groups]
    settings = copy.deepcopy(given)
    rng_state = torch.get_rng_state()
    device_rng_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        for parameter in gradients:
            parameter.grad = None
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        type(optimizer).step(optimizer)  # not the instance's, which a scheduler has wrapped to count calls
        _check_settings(optimizer, settings)
        return [dict(optimizer.state[parameter]) for parameter in parameters]
    finally:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        optimizer.state.update(states)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for parameter, weight in zip(parameters, weights, strict=True):
            local_tensor(parameter).copy_(weight)
        for group, values, before in zip(optimizer.param_groups, given, settings, strict=True):
            _put_back(group, values, before)
        torch.set_rng_state(rng_state)
        if device_rng_state is not None:
            torch.cuda.set_rng_state(device_rng_state)


def _all_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}


def _put_back(group: dict[str, Any], given: dict[str, Any], before: dict[str, Any]) -> None:
    """Gives a group the settings that it had: the tensors among them themselves, as others may hold them too."""
    for key in _settings(group).keys() - given.keys():
        del group[key]
    for key, value in given.items():
        group[key] = value.copy_(before[key]) if isinstance(value, Tensor) else before[key]


def _check_settings(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        for key, value in _settings(group).items():
            if key != "lr" and (key not in settings or not _same(settings[key], value)):
                raise ValueError(
                    f"{type(optimizer).__name__} changes {key!r} of its param groups in a step: it keeps something for "
                    "all parameters together, so it cannot step on some of them at a time, which offloading does; "
                    "use an optimizer that treats each parameter by itself"
                )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
