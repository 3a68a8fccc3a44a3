"""A small model, its training, and what the tests do to checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from windlass.checkpoint.durable.chunk_file import chunk_name
from windlass.checkpoint.durable.manifest import Manifest
from windlass.checkpoint.manager import Checkpointer
from windlass.parallel.mesh import Mesh

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Counter:
    """A `Stateful`."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)


class Training:
    """A model with dropout and batch norm, so that generators and buffers matter."""

    def __init__(self, seed: int = 0, width: int = 6, make_optimizer: MakeOptimizer = adamw) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 3))
        self.optimizer = make_optimizer(self.model)
        self.counter = Counter()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.model(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.counter.value += 1

    def checkpointer(self, directory: Path | str, mesh: Mesh, **settings: Any) -> Checkpointer:
        objects = {"model": self.model, "optimizer": self.optimizer, "counter": self.counter}
        return Checkpointer(objects, directory, mesh, **settings)

    def bits(self) -> dict[str, bytes]:
        """All that training mutates."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
        return {name: bits_of(value) for name, value in state.items()} | {
            "hyperparameters": json.dumps(self.optimizer.state_dict()["param_groups"]).encode(),
            "counter": str(self.counter.value).encode(),
        }


def bits_of(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return f"{value.dtype} {list(value.shape)} ".encode() + bytes(value.reshape(-1).view(torch.uint8).tolist())


def chunks_of(folder: Path) -> list[Path]:
    """The files of a checkpoint's chunks."""
    return [folder.parent / chunk_name(sha256) for sha256 in Manifest.read(folder).chunks]


def own_chunk(folder: Path) -> Path:
    """A chunk that no other checkpoint has."""
    others = {path for other in folder.parent.glob("step-????????") if other != folder for path in chunks_of(other)}
    return next(path for path in chunks_of(folder) if path not in others)
