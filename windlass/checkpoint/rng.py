"""The state of a rank's random number generators, as tensors of bytes."""

from __future__ import annotations

import json
import random
from typing import cast

import numpy as np
import torch

from windlass.untrusted import parse_json


def capture_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators of the CPU and of `device`, Python's and NumPy's; uint8, 1-D."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  # the global one is what users use
    kind, keys, position, has_gauss, cached = cast("tuple[str, np.ndarray, int, int, float]", numpy_state)
    states = {
        "torch_cpu": torch.get_rng_state(),
        "python": _to_bytes([version, words, gauss]),
        "numpy": _to_bytes([kind, keys.tolist(), position, has_gauss, cached]),
    }
    if device.type == "cuda":
        states["torch_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of `capture_rng`. A generator that the checkpoint lacks (another kind of device) is left alone.

    Raises:
        KeyError, TypeError, ValueError: they are no states of these generators.
    """
    try:
        torch.set_rng_state(states["torch_cpu"])
    except RuntimeError as error:  # of another size
        raise ValueError(str(error)) from error
    version, words, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = _from_bytes(states["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    if device.type == "cuda" and "torch_cuda" in states:
        torch.cuda.set_rng_state(states["torch_cuda"], device)


def _to_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: torch.Tensor) -> list:
    return parse_json(tensor.numpy().tobytes())
