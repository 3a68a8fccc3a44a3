"""A small optimizer whose state has other shapes than its parameters, and matrices cut any way to try it on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed.tensor as distributed
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from support.toy import digest
from windlass.parallel.fragment import fragment_of, local_tensor
from windlass.parallel.mesh import Mesh


class RowMoment(torch.optim.Optimizer):
    """Momentum of each row of G P, where G is the gradient with its longer dim L first and P (s, rank) was drawn once.

    Vectors have plain momentum. Everything is computed whole on every rank, so that any cut gives the same bits.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rank: int = 2,
        lr: float = 0.1,
        seed: int = 0,
        cuts_projector: bool = False,
        limits_norm: bool = True,
        projector_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`cuts_projector`: P is cut along s rather than the same on every rank; `limits_norm`: see `limited`."""
        self.cuts_projector, self.limits_norm, self.projector_dtype = cuts_projector, limits_norm, projector_dtype
        super().__init__(params, {"lr": lr, "rank": rank, "seed": seed})

    def empty_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        group = next(group for group in self.param_groups if any(parameter is one for one in group["params"]))
        state = {"step": torch.zeros(())}
        if self.limits_norm:
            state["prev_norm"] = torch.zeros(())
        if parameter.ndim == 1:
            return {**state, "exp_avg": zeros_over(parameter, tuple(parameter.shape))}
        short, long = sorted(parameter.shape)
        rank = min(group["rank"], short)
        projector = zeros_over(parameter, (short, rank), self.cuts_projector).to(self.projector_dtype)
        return {**state, "projector": projector, "exp_avg": zeros_over(parameter, (long, rank))}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.empty_state(parameter), num_limited=0)
                    if "projector" in state:
                        generator = torch.Generator().manual_seed(100 * group["seed"] + index)
                        drawn = torch.randn(state["projector"].shape, generator=generator)
                        own_part(state["projector"], drawn)
                self.update(group["lr"], parameter, state)

    def update(self, lr: float, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        gradient = whole(parameter.grad).float()
        is_wide = gradient.ndim == 2 and gradient.shape[0] < gradient.shape[1]
        gradient = gradient.T.contiguous() if is_wide else gradient
        projector = whole(state["projector"]).float() if "projector" in state else None
        rows = gradient if projector is None else gradient @ projector
        own_part(state["exp_avg"], whole(state["exp_avg"]).lerp(rows, 0.3))
        direction = whole(state["exp_avg"]) if projector is None else whole(state["exp_avg"]) @ projector.T
        state["step"] += 1
        direction = direction / (1 - 0.7 ** float(state["step"]))
        if self.limits_norm:
            direction = self.limited(direction, state)
        direction = direction.T if is_wide else direction
        own_part(parameter, whole(parameter) - (lr * direction).to(parameter.dtype))

    def limited(self, direction: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """At most 1% longer than the last one, and shorter from the third time that this was needed."""
        norm, previous = direction.norm(), state["prev_norm"]
        if previous > 0 and norm > 1.01 * previous:
            state["num_limited"] += 1
            direction = direction * (1.01 * previous / norm) * (0.5 if state["num_limited"] > 2 else 1.0)
        state["prev_norm"].copy_(direction.norm())
        return direction


def zeros_over(parameter: torch.Tensor, shape: tuple[int, ...], is_cut: bool = True) -> torch.Tensor:
    """Float32, cut along dim 0 over the mesh axis that `parameter` is cut over, or plain."""
    if not is_cut or not isinstance(parameter, DTensor):
        return torch.zeros(shape)
    placements = [Shard(0) if isinstance(placement, Shard) else placement for placement in parameter.placements]
    return distributed.zeros(shape, device_mesh=parameter.device_mesh, placements=placements)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def own_part(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Sets this rank's part of `tensor` from the whole `values`."""
    local_tensor(tensor).copy_(values[fragment_of("", tensor).slices])


SHAPES: dict[str, tuple[tuple[int, int], int]] = {
    "tall_by_rows": ((7, 3), 0),
    "tall_by_columns": ((7, 3), 1),  # 3 columns over 4 ranks: 1, 1, 1, 0
    "wide_by_rows": ((3, 9), 0),
    "wide_by_columns": ((3, 9), 1),  # 9 over 4 ranks: 3, 3, 3, 0
    "few": ((2, 2), 1),
    "square": ((4, 4), 1),  # with rank 4 its state has its shape, and is cut along another dim or not at all
    "unused": ((5, 4), 0),
}
"""Name -> the shape of a matrix, and the dim that it is cut along."""


class CutMatrices(nn.Module):
    """The matrices of `SHAPES` and a vector, which FSDP2 would not cut this unevenly."""

    def __init__(self, mesh: Mesh, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (shape, dim) in {**SHAPES, "vector": ((5,), 0)}.items():
            weight = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(cut_over(mesh, weight, dim)))

    def take_gradients(self, step: int) -> None:
        """Sets gradients that depend on the weights, element by element, so that they are the same in any cut."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name != "unused":
                weight = whole(parameter)
                wave = torch.sin(torch.arange(weight.numel()).view(weight.shape) * (index + 2) + step)
                parameter.grad = torch.zeros_like(parameter)
                own_part(parameter.grad, (weight.float() * 0.5 + wave * (1 + step % 3)).to(weight.dtype))


def cut_over(mesh: Mesh, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`tensor` cut along `dim` over the shards of `mesh`, and repeated over its replicas."""
    device_mesh = mesh.device_mesh
    if device_mesh is None:
        return tensor
    replicate = distributed.Replicate()
    return distribute_tensor(tensor, device_mesh, [*[replicate] * (device_mesh.ndim - 1), Shard(dim)])


def train(model: CutMatrices, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.take_gradients(step)
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every entry of the state by name, tensors as they are."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Of all weights, and of all state. Collective where they are cut."""
    state = {name: torch.as_tensor(value) for name, value in state_of(model, optimizer).items()}
    return digest(wholes(dict(model.named_parameters()))), digest(wholes(state))


def wholes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


def layouts(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """What kind of tensor each is, of which dtype, where it is and which part of it is here."""
    return {
        name: (
            type(value).__name__,
            str(value.dtype),
            str(value.device),
            tuple(value.shape),
            str(value.placements) if isinstance(value, DTensor) else None,
            tuple(local_tensor(value).shape),
        )
        for name, value in tensors.items()
    }
