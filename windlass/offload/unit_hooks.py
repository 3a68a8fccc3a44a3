"""Hooks around the forward and the backward pass of each unit of a model: its weights come and go, and updates
that were put off are made just before the forward that needs them.

A unit is a list of modules that run one after another, such as a layer, or a norm and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.weights import Weights
from windlass.parallel.autograd_shim import is_in_backward

LOOK_AHEAD_UNITS = 2


def parameters_by_unit(model: nn.Module, units: Sequence[Sequence[nn.Module]]) -> list[list[nn.Parameter]]:
    """The parameters of each unit; last, those of `model` that are in none."""
    found = [[parameter for module in unit for parameter in module.parameters()] for unit in units]
    of_units = {id(parameter) for unit in found for parameter in unit}
    return [*found, [parameter for parameter in model.parameters() if id(parameter) not in of_units]]


class UnitHooks:
    """The base of hooks on units: it knows which units' weights are in memory, and which come next.

    Args:
        model: what no unit names belongs to it as a whole.
        units: in the order of the forward pass.
        weights: None where they stay in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[nn.Module]],
        optimizer: OffloadedOptimizer,
        weights: Weights | None,
    ) -> None:
        self._optimizer, self._weights = optimizer, weights
        self._units = parameters_by_unit(model, units)
        self._root = len(units)
        """The number of what no unit names."""
        self._acquired: set[int] = set()
        for number, unit in enumerate([*units, [model]]):
            self._attach(number, unit)

    def _attach(self, number: int, modules: Sequence[nn.Module]) -> None:
        """Hooks on a unit's modules."""
        raise NotImplementedError

    def _acquire(self, number: int) -> None:
        if self._weights is not None and number not in self._acquired:
            self._acquired.add(number)
            self._weights.acquire(self._units[number])

    def _let_go(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if self._weights is not None and number in self._acquired:
                self._acquired.remove(number)
                self._weights.release(self._units[number])

    def _look_ahead(self, number: int, direction: int, with_rest: bool) -> None:
        """Begins to bring the weights of the units that come after `number`, and state.

        Args:
            direction: 1 in the forward pass, -1 in backward.
            with_rest: they are updated in this pass.
        """
        if self._weights is not None:
            near = [number + direction * distance for distance in range(LOOK_AHEAD_UNITS + 1)]
            if direction > 0:
                del near[0]  # it has been updated; in backward it is about to be
            parameters = (p for unit in near if 0 <= unit < self._root for p in self._units[unit])
            self._weights.look_ahead(parameters, with_rest)
        self._optimizer.look_ahead()


class UnshardedUnitHooks(UnitHooks):
    """Hooks on a model that is not sharded. What no unit names is there from forward to the end of backward.

    Args: as `UnitHooks`.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[nn.Module]],
        optimizer: OffloadedOptimizer,
        weights: Weights | None,
    ) -> None:
        self._passed: list[int] = []
        """Units whose forward is over, and whose weights are let go when the next one begins."""
        self._missing: dict[int, int] = {}  # unit -> gradients that its backward pass has still to bring
        self._hooks: list[Any] = []
        super().__init__(model, units, optimizer, weights)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _attach(self, number: int, modules: Sequence[nn.Module]) -> None:
        is_kept = number >= self._root - 1  # backward comes right after its forward, or there is no telling

        @torch.compiler.disable
        def before(*_: Any) -> None:
            self._before_forward(number)

        @torch.compiler.disable
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._after_forward(number, output, is_kept)

        def arrived(parameter: Tensor) -> None:
            self._arrived(number)

        for module in modules:
            self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
        self._hooks.append(modules[-1].register_forward_hook(after))
        for parameter in self._units[number]:
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))

    def _before_forward(self, number: int) -> None:
        if is_in_backward():  # a checkpoint computes it again
            self._before_backward(number)
            return
        if number == self._root:  # what the last backward has left: units of which some weight got no gradient
            self._missing.clear()
            self._let_go(list(self._acquired))
        self._acquire(number)
        self._optimizer.update(self._units[number])
        self._let_go([passed for passed in self._passed if passed != number])
        self._passed = [passed for passed in self._passed if passed == number]
        self._look_ahead(number, 1, with_rest=self._optimizer.has_pending)

    def _after_forward(self, number: int, output: Any, is_kept: bool) -> None:
        if is_in_backward():
            return
        tensors = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if tensors:
            register_multi_grad_hook(tensors, lambda _: self._before_backward(number), mode="any")
        if not (tensors and is_kept) and number not in self._passed:
            self._passed.append(number)
        if number == self._root:
            self._let_go(self._passed)
            self._passed = []

    def _before_backward(self, number: int) -> None:
        # Of a frozen unit no gradient says that its backward is over; that another's begins does.
        ended = [other for other, missing in self._missing.items() if missing == 0]
        self._let_go([other for other in ended if other not in (number, self._root)])
        self._acquire(number)
        if number not in self._missing:
            self._missing[number] = sum(parameter.requires_grad for parameter in self._units[number])
        self._look_ahead(number, -1, with_rest=not self._optimizer.is_deferring)

    def _arrived(self, number: int) -> None:
        """A gradient of the unit is whole."""
        if number not in self._missing:  # its output had no gradient of its own, as an embedding's under a checkpoint
            self._missing[number] = sum(parameter.requires_grad for parameter in self._units[number])
        self._missing[number] -= 1
        if self._missing[number] == 0:
            del self._missing[number]
            self._let_go([number])
            self._optimizer.look_ahead()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
