"""A small model whose optimizer state is on a disk, in several buckets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.trained import assert_moved
from windlass.checkpoint.manager import Checkpointer
from windlass.offload.direct_io import Engine
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tier_file import HEADER_BYTES, TierFolder
from windlass.optim import Apollo, GaLore
from windlass.parallel.mesh import Mesh

WIDTH = 112
"""Its square is more than what stays in memory."""


class ThirdParty(torch.optim.Optimizer):
    """Keeps float64 and integers, and a number."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["count"] = 0
                    state["signs"] = torch.zeros(parameter.shape, dtype=torch.int32)
                    state["wide"] = torch.zeros(parameter.shape, dtype=torch.float64)
                state["count"] += 1
                state["signs"] += parameter.grad.sign().int()
                state["wide"].mul_(0.9).add_(parameter.grad.double(), alpha=0.1)
                parameter.sub_((state["wide"] * group["lr"]).to(parameter.dtype))


def _low_rank(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return kind([{"params": matrices, "rank": 16, "update_interval": 2}, {"params": rest}], lr=1e-3)  # type: ignore


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw_fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "adam_amsgrad": lambda model: torch.optim.Adam(model.parameters(), amsgrad=True),
    "sgd_momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "apollo": lambda model: _low_rank(Apollo, model),
    "galore": lambda model: _low_rank(GaLore, model),
    "third_party": lambda model: ThirdParty(model.parameters()),
}


def net(seed: int = 0, num_layers: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)), nn.Dropout(0.2), nn.BatchNorm1d(WIDTH))


class Offloaded:
    """A model, its optimizer and their training.

    Args:
        tier: a folder for the optimizer's state; None: it stays in memory.
        in_host_memory: the state goes to the tier of host memory instead.
    """

    def __init__(
        self,
        tier: Path | None,
        kind: str = "adamw_fused",
        seed: int = 0,
        *,
        in_host_memory: bool = False,
        num_layers: int = 3,
    ) -> None:
        self.model = net(seed, num_layers)
        self.first = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.num_steps = 0
        self.optimizer = OPTIMIZERS[kind](self.model)
        if tier is not None or in_host_memory:
            folder = None if tier is None else TierFolder(tier, Engine(), "optimizer")
            layers = [list(layer.parameters()) for layer in self.model]
            max_host_bytes = None if folder is None else 0
            self.optimizer = OffloadedOptimizer(self.optimizer, folder, order=layers[:2], max_host_bytes=max_host_bytes)
            self.optimizer.owns_folder = True

    def run(self, num_steps: int) -> None:
        self.num_steps += num_steps
        for _ in range(num_steps):
            if isinstance(self.optimizer, OffloadedOptimizer):
                self.optimizer.update(self.model.parameters())  # as a forward pass does
            self.model(torch.randn(8, WIDTH)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def checkpointer(self, directory: Path | str, mesh: Mesh, **settings: Any) -> Checkpointer:
        return Checkpointer({"model": self.model, "optimizer": self.optimizer}, directory, mesh, **settings)

    def bits(self) -> dict[str, Any]:
        """All that training mutates, but the generators."""
        optimizer = self.optimizer.state_dict()  # makes updates that were put off
        if self.num_steps:
            assert_moved(self.first, self.model.parameters())
        state: dict[str, Any] = {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()}
        for index, entries in optimizer["state"].items():
            state |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
        return {**state, "groups": optimizer["param_groups"]}

    def close(self) -> None:
        if isinstance(self.optimizer, OffloadedOptimizer):
            self.optimizer.close()


def is_pinned(chunk: Path) -> bool:
    """Whether a chunk was a file of the tier: its header is as long as they leave room for."""
    with chunk.open("rb") as file:
        return int.from_bytes(file.read(8), "little") == HEADER_BYTES - 8


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
