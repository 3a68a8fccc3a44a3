"""Small models whose optimizer's state is on a disk, in more buckets than the buffers hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor, nn

from support.trained import assert_finite
from windlass.offload.direct_io import Engine, IOFigures
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tier_file import TierFolder
from windlass.optim import Apollo, Cosmos, GaLore, Muon, NaturalGaLore, SGDSaI

WIDTH = 96
"""Its square is more than what stays in memory."""
LOW_RANK: dict[str, Any] = {"rank": 12, "update_interval": 10}


def net(num_layers: int = 5, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers of two shapes, with and without biases, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [WIDTH + 8 * (number % 3 == 1) for number in range(num_layers)] + [WIDTH]
        layers = [nn.Linear(widths[number], widths[number + 1], bias=number % 2 == 0) for number in range(num_layers)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh()))).to(dtype)


def groups_of(model: nn.Module, matrices: dict[str, Any], rest: dict[str, Any]) -> list[dict[str, Any]]:
    """The first matrix with the vectors and what is not for low ranks, as an embedding is."""
    parameters = list(model.parameters())
    chosen = [parameter for parameter in parameters[1:] if parameter.ndim == 2]
    others = [parameter for parameter in parameters if all(parameter is not other for other in chosen)]
    return [{"params": chosen, **matrices}, {"params": others, **rest}]


ADAMW = {"algorithm": "adamw"}
MINI = LOW_RANK | {"rank": 1, "scale": 16.0, "granularity": "tensor"}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "apollo": lambda model: Apollo(groups_of(model, LOW_RANK, {}), lr=1e-3),
    "apollo_mini": lambda model: Apollo(groups_of(model, MINI, {}), lr=1e-3),
    "galore": lambda model: GaLore(groups_of(model, LOW_RANK, {}), lr=1e-3),
    "natural_galore": lambda model: NaturalGaLore(groups_of(model, LOW_RANK, {}), lr=1e-3),
    "muon": lambda model: Muon(groups_of(model, {}, ADAMW), lr=1e-3),
    "cosmos": lambda model: Cosmos(groups_of(model, {"rank": 12}, ADAMW), lr=1e-3),
    "sgd_sai": lambda model: SGDSaI(model.parameters(), lr=1e-3),
    "lion": lambda model: Lion(model.parameters(), lr=1e-4, weight_decay=0.1),
}


class Training:
    """A model and its optimizer, trained on made-up numbers.

    Args:
        tier: where the state goes; None: it stays in memory.
        kind: a name of `OPTIMIZERS`, or makes the optimizer.
        settings: of `OffloadedOptimizer`.
    """

    def __init__(
        self,
        tier: Path | None,
        kind: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw",
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        self.model = net() if model is None else model
        self.plain = OPTIMIZERS[kind](self.model) if isinstance(kind, str) else kind(self.model)
        self.optimizer: torch.optim.Optimizer = self.plain
        self.step = 0
        if tier is not None:
            self.offload(tier, **settings)

    def offload(self, tier: Path, **settings: Any) -> OffloadedOptimizer:
        """Has the state go to a disk, each layer's to a file of its own, through buffers for AdamW's of two layers."""
        layers = [list(layer.parameters()) for layer in self.model.children()]
        folder = TierFolder(tier, Engine(num_threads=2), "optimizer")
        settings = {"order": layers, "max_host_bytes": 0, "buffer_bytes": 17 * WIDTH * WIDTH} | settings
        self.optimizer = OffloadedOptimizer(self.plain, folder, **settings)
        self.optimizer.owns_folder = True
        return self.optimizer

    @property
    def offloaded(self) -> OffloadedOptimizer:
        assert isinstance(self.optimizer, OffloadedOptimizer)
        return self.optimizer

    @property
    def figures(self) -> IOFigures:
        assert self.offloaded.folder is not None
        return self.offloaded.folder.engine.figures

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.step + number)
        dtype = next(self.model.parameters()).dtype
        inputs, targets = (torch.randn(6, WIDTH, generator=generator) for _ in range(2))
        return inputs.to(dtype), targets.to(dtype)

    def backward(self, num_micro_batches: int = 1) -> float:
        """Leaves the gradients of a step; returns its loss."""
        total = 0.0
        for number in range(num_micro_batches):
            inputs, targets = self.batch(number)
            loss = nn.functional.mse_loss(self.model(inputs), targets) / num_micro_batches
            loss.backward()
            total += loss.item()
        return total

    def run(self, num_steps: int, num_micro_batches: int = 1, max_norm: float = 1.0) -> list[float]:
        """The losses of the steps. Gradients are clipped."""
        losses: list[float] = []
        for _ in range(num_steps):
            losses.append(self.backward(num_micro_batches))
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        if num_steps:
            assert_finite(losses, num_steps)
        return losses

    def close(self) -> None:
        self.offloaded.close()


def assert_same_bits(ours: Training, theirs: Training) -> None:
    """Weights, state and settings."""
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert_same(ours.optimizer.state_dict(), theirs.optimizer.state_dict())


def assert_same(one: Any, other: Any, where: Sequence[Any] = ()) -> None:
    """Two state dicts, to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], [*where, key])
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, [*where, index])
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where
