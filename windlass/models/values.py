"""Tensors with and without values: a plan traces the real code on tensors that have none."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """False for tensors of the meta device and for fake ones: nothing can be read off them."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
