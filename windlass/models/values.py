"""Tensors with and without values: a plan traces the real code on tensors that have none."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


def has_values(tensor: Tensor) -> bool:
    """False for tensors of the meta device and for fake ones: nothing can be read off them."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def real_tensors() -> AbstractContextManager[Any]:
    """Has tensors that are made meanwhile be real, also while a forecast makes all others without values."""
    return unset_fake_temporarily()
