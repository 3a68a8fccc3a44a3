"""Matrices that are updated together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from windlass.parallel.fragment import local_tensor
from windlass.parallel.layout import Layout

MAX_STACKED_NUMEL = 1 << 13
"""On a CPU a product of larger matrices costs more than its launch, and copying them together is not worth it: measured
at 65,536 elements, chosen well below."""


@dataclass
class Batch:
    """k matrices of one shape and layout, k >= 1, at the same step of the same param group.

    Their state lies in one piece of memory a key, of which each parameter's state tensor is a part, so that kernels
    run over all of them at once. Weights and gradients lie where the model has them.
    """

    group: dict[str, Any]
    step: int
    """Of this update, from 1."""
    layout: Layout
    parameters: list[Tensor]
    states: list[dict[str, Tensor]] = field(repr=False)
    owners: list[int] = field(default_factory=list)
    """The rank that each matrix is gathered at, where the optimizer gathers (`MatrixOptimizer.gathered`)."""

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def cost(self) -> int:
        """Multiplications of the Gram matrix over the short dim of one matrix: what owners compute grows with it."""
        return math.prod(self.layout.shape) * min(self.layout.shape)

    @property
    def lr(self) -> float:
        return float(self.group["lr"])

    @property
    def is_wide(self) -> bool:
        """More columns than rows. Low-rank algorithms work on the tall view, whose rows are the longer dim."""
        rows, columns = self.layout.shape
        return rows < columns

    @property
    def tall_layout(self) -> Layout:
        """The layout of the tall view (L, s)."""
        if not self.is_wide:
            return self.layout
        rows, columns = self.layout.shape
        return self.layout.of((columns, rows), None if self.layout.dim is None else 1 - self.layout.dim)

    @property
    def _is_stacked(self) -> bool:
        """Whether kernels over weights and gradients run once over a copy of all, and not once a matrix."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return len(self) > 1 and not (on_cpu and math.prod(self.layout.shape) > MAX_STACKED_NUMEL)

    def weights(self) -> list[Tensor]:
        """This rank's parts of the weights, to be changed in place."""
        return [local_tensor(parameter) for parameter in self.parameters]

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, float32. Not to be written to."""
        return [local_gradient(parameter).float() for parameter in self.parameters]

    def gradient(self) -> Tensor:
        """`gradients` as one tensor [k, rows, columns]; a copy where k is above 1."""
        return _stack(self.gradients())

    def tall_gradient(self) -> Tensor:
        gradient = self.gradient()
        return gradient.mT if self.is_wide else gradient

    def project(self, projector: Tensor) -> Tensor:
        """The tall gradients times `projector` [s, r] or [k, s, r]: [k, L, r]."""
        return self.project_and(lambda rows: rows.new_empty(()), projector)[0]

    def project_and(self, measure: Callable[[Tensor], Tensor], projector: Tensor) -> tuple[Tensor, Tensor]:
        """`project`, and what `measure` finds of the tall gradients [k, L, s], while each is in the cache."""
        if self._is_stacked:
            gradient = self.tall_gradient()
            return gradient @ projector, measure(gradient)
        projected, measured = [], []
        projectors = projector.expand(len(self), *projector.shape[-2:])
        for gradient, own_projector in zip(self.gradients(), projectors, strict=True):
            rows = gradient.mT if self.is_wide else gradient
            projected.append(rows @ own_projector)
            measured.append(measure(rows))
        return _stack(projected), _stack(measured)

    def state(self, *keys: str) -> list[Tensor]:
        """This rank's part of the state tensors of each key, [k, ...], to be changed in place."""
        return [self._packed(key) for key in keys]

    def _packed(self, key: str) -> Tensor:
        parts = [local_tensor(state[key]) for state in self.states]
        first, size = parts[0], parts[0].numel()
        if len(parts) == 1:
            return first.unsqueeze(0)
        memory, offset = first.untyped_storage().data_ptr(), first.storage_offset()
        if all(
            part.untyped_storage().data_ptr() == memory and part.storage_offset() == offset + index * size
            for index, part in enumerate(parts)
        ):
            return first.as_strided((len(parts), *first.shape), (size, *first.stride()))
        # New state, or restored, or in another batch before: from now on it is together.
        packed = torch.stack(parts)
        for state, part in zip(self.states, packed, strict=True):
            state[key] = _with_memory(state[key], part)
        return packed

    def subtract(self, step: Tensor) -> None:
        """weights -= step, [k, rows, columns]."""
        torch._foreach_sub_(self.weights(), list(step.unbind(0)))

    def subtract_scaled_gradient(self, scale: Tensor) -> None:
        """weights -= gradient * scale; `scale` [k, ...] is broadcast."""
        if self._is_stacked:
            self.subtract(self.gradient() * scale)
            return
        for weight, gradient, own_scale in zip(self.weights(), self.gradients(), scale, strict=True):
            weight.addcmul_(gradient, own_scale, value=-1)

    def subtract_product(self, left: Tensor, right: Tensor, scale: float) -> None:
        """weights -= scale * left @ right^T, of [k, rows, r] and [k, columns, r]."""
        weights = self.weights()
        if self._is_stacked or weights[0].dtype != left.dtype:
            torch._foreach_sub_(weights, list((left @ right.mT).unbind(0)), alpha=scale)
            return
        for weight, own_left, own_right in zip(weights, left, right, strict=True):
            weight.addmm_(own_left, own_right.mT, alpha=-scale)

    def decay(self) -> None:
        """weights *= 1 - lr * weight_decay: decoupled weight decay."""
        factor = 1 - self.lr * self.group["weight_decay"]
        if factor != 1:
            torch._foreach_mul_(self.weights(), factor)


def local_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "parameters without a gradient are passed over"
    return local_tensor(parameter.grad)


def row_squares(rows: Tensor) -> Tensor:
    """Sums of squares [..., L, 1] over the rows of [..., L, s]."""
    if rows.device.type == "cpu" and rows.stride(-1) != 1:
        return rows.square().sum(-1, keepdim=True)  # torch's norm over strided rows is 10 times slower
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()


def matrix_squares(rows: Tensor) -> Tensor:
    """Sums of squares [..., 1, 1] over the matrices [..., L, s]."""
    return torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True).square_()


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _with_memory(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor like `tensor` whose part in this process is `local`."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
