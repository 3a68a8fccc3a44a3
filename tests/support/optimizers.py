"""The optimizers as the tests make them, and the trajectories of the authors' implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import windlass.optim

GOLDEN = Path(__file__).parents[1] / "golden"

LOW_RANK: dict[str, Any] = {"rank": 2, "update_interval": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "apollo": ("Apollo", LOW_RANK),
    "apollo_mini": ("Apollo", LOW_RANK | {"rank": 1, "scale": 128.0, "granularity": "tensor"}),
    "galore": ("GaLore", LOW_RANK),
    "natural_galore": ("NaturalGaLore", LOW_RANK | {"history": 5}),
    "muon": ("Muon", {}),
    "cosmos": ("Cosmos", {"rank": 2}),
    "sgd_sai": ("SGDSaI", {}),
}
"""Name -> class of windlass.optim, keys of the param group of matrices."""


def make(name: str, matrices: list, rest: list | None = None, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a case over `matrices`, and over `rest` with AdamW."""
    kind, keys = CASES[name]
    groups = [{"params": matrices, **keys}]
    if rest:
        groups.append({"params": rest, "algorithm": "adamw"} if kind in ("Muon", "Cosmos") else {"params": rest})
    return getattr(windlass.optim, kind)(groups, **({"lr": 1e-2} | options))


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(shape: tuple[int, ...], step: int, index: int = 0) -> torch.Tensor:
    """The gradient that a parameter gets at a step, whatever its value."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + 1000 * step + index))


def take_steps(optimizer: torch.optim.Optimizer, parameters: list, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(tuple(parameter.shape), step, index).to(parameter.dtype)
        optimizer.step()


def state_numel(optimizer: torch.optim.Optimizer) -> int:
    """Elements of this rank's part of the state, without the counts of steps."""
    tensors = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    return sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel() for tensor in tensors)


def golden_settings() -> dict[str, Any]:
    return json.loads((GOLDEN / "optimizers.json").read_text())


def check_golden(name: str, make_optimizer: Any, shape: tuple[int, int], weight_decay: float) -> None:
    """Runs the recorded gradients and compares the weights at every kept step.

    Args:
        make_optimizer: (parameter, weight_decay) -> the optimizer.
    """
    arrays, prefix = np.load(GOLDEN / "optimizers.npz"), f"{shape[0]}x{shape[1]}"
    parameter = nn.Parameter(torch.from_numpy(arrays[f"{prefix}/weight0"]).clone())
    optimizer = make_optimizer(parameter, weight_decay)
    kept = golden_settings()["kept_steps"]
    compared = 0
    for step, recorded in enumerate(arrays[f"{prefix}/grads"], start=1):
        parameter.grad = torch.from_numpy(recorded).clone()
        optimizer.step()
        if step in kept:
            expected = arrays[f"{prefix}/{name}/wd{weight_decay}/step{step}"]
            np.testing.assert_allclose(
                parameter.detach().numpy(), expected, rtol=1e-4, atol=1e-6, err_msg=f"{name} at step {step}"
            )
            compared += 1
    assert compared == len(kept)
