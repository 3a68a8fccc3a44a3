"""Matrices that are updated together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from windlass.parallel.fragment import local_tensor, with_local
from windlass.parallel.layout import Layout

ALIGNMENT = 64
"""Bytes. MKL rounds a product in another order where an operand or the result begins at an address that is no multiple
of 16; torch allocates at multiples of 64."""


@dataclass
class MatrixStack:
    """k matrices of one shape and layout, k >= 1, at the same step of the same param group.

    On a CPU what becomes of a matrix must not depend, to the bit, on which others are in its stack, nor on where
    tensors lie in memory. What is elementwise may run over all at once; products, decompositions and sums over a matrix
    run one matrix at a time (`one_by_one`, `of_each`), their operands at addresses like any other's (`aligned`).

    Their state lies in one piece of memory a key, of which each parameter's state tensor is a part, so that kernels
    run over all of them at once. Weights and gradients lie where the model has them.
    """

    group: dict[str, Any]
    step: int
    """The number of this update, from 1."""
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
        """True if kernels over weights and gradients run once over a copy of all, and not once a matrix.

        Not on a CPU: besides the bits, copying costs about what the launches do even where matrices are small.
        """
        return len(self) > 1 and self.parameters[0].device.type != "cpu"

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
            rows = aligned(gradient.mT if self.is_wide else gradient)
            projected.append(rows @ aligned(own_projector))
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
            part.untyped_storage().data_ptr() == memory
            and part.storage_offset() == offset + index * size
            and part.is_contiguous()
            for index, part in enumerate(parts)
        ):
            return first.as_strided((len(parts), *first.shape), (size, *first.stride()))
        # New state, or restored, or in another stack before: from now on it is together.
        packed = torch.stack(parts)
        for state, part in zip(self.states, packed, strict=True):
            state[key] = with_local(state[key], part)
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
            product = of_each(lambda left, right: left @ right.mT, left, right)
            torch._foreach_sub_(weights, list(product.unbind(0)), alpha=scale)
            return
        for weight, own_left, own_right in zip(weights, left, right, strict=True):
            target = aligned(weight)
            target.addmm_(aligned(own_left), aligned(own_right).mT, alpha=-scale)
            if target is not weight:
                weight.copy_(target)

    def decay(self) -> None:
        """weights *= 1 - lr * weight_decay: decoupled weight decay."""
        factor = 1 - self.lr * self.group["weight_decay"]
        if factor != 1:
            torch._foreach_mul_(self.weights(), factor)


def local_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "parameters without a gradient are passed over"
    return local_tensor(parameter.grad)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it at an address where products of it have the bits that they have anywhere else."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def one_by_one(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the stacks [k, ...] that may be computed with at once: [1, ...] each on a CPU, else all of them."""
    if stacks[0].device.type != "cpu":
        yield stacks
        return
    yield from zip(*(stack.split(1) for stack in stacks), strict=True)


def of_each(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """`function` of stacks [k, ...], computed `one_by_one`."""
    return join([function(*map(aligned, parts)) for parts in one_by_one(*stacks)])


def join(parts: list[Tensor]) -> Tensor:
    """One contiguous stack of several: kernels may round by strides, and LAPACK leaves its results column by column."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


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
