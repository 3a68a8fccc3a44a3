"""The base of the matrix optimizers: checks, state sharded as its parameter is, stacks, plain AdamW for the rest.

An algorithm is a subclass that says which state a matrix has (`matrix_state`) and how a stack of matrices is updated
(`update`, see `windlass.optim.lockstep`). It is written once: for plain tensors, and for DTensors sharded along
either dim, evenly or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from windlass.optim.adamw import adamw_step
from windlass.optim.lockstep import Gathered, Update, Wave, run_in_lockstep
from windlass.optim.matrix_stack import MatrixStack, local_gradient
from windlass.optim.strides import laid_out_as, shares_no_memory
from windlass.parallel.fragment import local_tensor, with_local
from windlass.parallel.layout import layout_of, zeros_over, zeros_sharded_as

BATCH_NUMEL = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Elements of the matrices that are updated together: enough to hide what launching kernels costs, few enough that the
intermediates of a stack are small beside a model. A larger matrix is a stack of its own."""


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a matrix's state: its global shape, and the dim that is sharded where the matrix is."""

    shape: tuple[int, ...]
    sharded_dim: int | None = None
    """None: the same on every rank."""
    is_like_parameter: bool = False
    """Has the matrix's own shape and is sharded just as it is; `sharded_dim` does not count."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that treat matrices as matrices.

    State is float32 whatever the parameters are, tensors only, and sharded over the ranks as the parameters are; each
    tensor is a DTensor then. Gradients may be missing (the parameter is passed over; on all ranks, or on none) and of
    any size, zero included, as long as the sum of their squares is finite in float32. Others, as a NaN is, go into the
    state as they do with torch's optimizers; `windlass train` skips such steps.

    On CPUs a step on some of the parameters gives each the bits that a step on all at once gives it, whatever its size,
    the other parameters and the places of tensors in memory, with the same number of threads. Parameters may so be
    updated a few at a time, in any order. Over three or more ranks that holds but for the last bit of what an
    all-reduce adds up (APOLLO, Natural GaLore, SGD-SaI's first step), as its order of adding depends on the place in
    the buffer. On GPUs it is not promised.
    """

    matrix_keys: Mapping[str, Any] = {}
    """Keys that a param group of matrices may have, and their defaults; other groups get torch's AdamW."""
    takes_several_axes = False
    """True where `update` asks other ranks for sums alone, which are right over several mesh axes, too."""

    # What a subclass says.

    def is_matrix_group(self, group: Mapping[str, Any]) -> bool:
        """True if the group's parameters get the algorithm, and not AdamW."""
        raise NotImplementedError

    def check_matrix(self, group: Mapping[str, Any], name: str, parameter: Tensor) -> None:
        """Raises ValueError if the algorithm cannot take `parameter`."""
        require_matrix(type(self).__name__, name, parameter)

    def matrix_state(self, group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, StateSpec]:
        """The state of a matrix of `shape` beside its step."""
        raise NotImplementedError

    def update(self, stack: MatrixStack) -> Update:
        """Updates the weights and the state of a stack of matrices."""
        raise NotImplementedError

    def gathered(self, stack: MatrixStack) -> Gathered | None:
        """The parts of each matrix that `update` gathers in this step, where matrices are sharded; None for nothing.

        Updates that gather run in waves, so that what is together at a time is bounded, and `stack.owners` is set.
        """
        return None

    # What torch's optimizers have.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, also after construction; they begin without state.

        Raises:
            ValueError: a parameter or a key does not suit the algorithm. The optimizer stays as it was.
        """
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[count]
        try:
            self._take_group(group)
        except ValueError:
            del self.param_groups[count]
            raise

    def _take_group(self, group: dict[str, Any]) -> None:
        is_matrices = self.is_matrix_group(group)
        if is_matrices:
            for key, default in self.matrix_keys.items():
                group.setdefault(key, default)
        if "betas" in group:
            check_adam(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        for parameter in group["params"]:
            name = self._name_of(parameter)
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{name} is {parameter.dtype}: {type(self).__name__} updates float32 and bfloat16 parameters; "
                    "convert the model, e.g. model.to(torch.bfloat16)"
                )
            layout = layout_of(parameter, name)
            if is_matrices and len(layout.splits) > 1 and not self.takes_several_axes:
                raise ValueError(
                    f"{name} has the placements {parameter.placements} over {parameter.device_mesh}: "
                    f"{type(self).__name__} takes matrices that are sharded over one mesh axis; put it into a param "
                    "group of its own that gets AdamW, or use AdamW or SGDSaI"
                )
            if not shares_no_memory(local_tensor(parameter)):
                raise ValueError(
                    f"{name} is {list(parameter.shape)} with strides {list(parameter.stride())}: several of its "
                    "elements share memory, so none can be updated by itself; make it of its own, e.g. with .clone()"
                )
            if is_matrices:
                self.check_matrix(group, name, parameter)

    def _name_of(self, parameter: Tensor) -> str:
        """For messages: the name that it was given with, or its number."""
        number = 0
        for group in self.param_groups:
            names = group.get("param_names") or [f"parameter {number + i}" for i in range(len(group["params"]))]
            for name, member in zip(names, group["params"], strict=True):
                if member is parameter:
                    return name
            number += len(names)
        raise AssertionError("the optimizer does not have this parameter")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Collective where parameters are sharded over ranks.

        Raises:
            RuntimeError: a gradient is sparse, or sharded otherwise than its parameter. No parameter was updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            [parameter for parameter in group["params"] if parameter.grad is not None] for group in self.param_groups
        ]
        for parameter in itertools.chain(*trained):
            if getattr(parameter, "placements", None) != getattr(parameter.grad, "placements", None):
                raise RuntimeError(
                    f"{self._name_of(parameter)} is {_placed(parameter)}, and its gradient {_placed(parameter.grad)}: "
                    "bring the gradient to the parameter's placements, e.g. with `redistribute`"
                )
            if parameter.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self._name_of(parameter)} has a sparse gradient, which {type(self).__name__} does not support: "
                    "make its module with sparse=False"
                )
        stacks: list[MatrixStack] = []
        for group, members in zip(self.param_groups, trained, strict=True):
            by_step = self._count_step(group, members)
            for step, of_step in by_step.items():
                if self.is_matrix_group(group):
                    stacks += self._stacks(group, [parameter for parameter in of_step if parameter.numel()], step)
                else:
                    self._adamw(group, of_step, step)
        for wave in self._waves(stacks):
            run_in_lockstep((stack.layout.groups, self.update(stack)) for stack in wave)
        return loss

    def empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of `parameter` at its first step: zeros, sharded as they should be. For checkpoints."""
        group = next(group for group in self.param_groups if any(parameter is member for member in group["params"]))
        shape = tuple(parameter.shape)
        state = {"step": torch.zeros(())}  # on the CPU, so that reading it waits for no device
        if not self.is_matrix_group(group):
            for key in ("exp_avg", "exp_avg_sq"):
                # Strides, too, are the parameter's: AdamW's kernel then needs no copies.
                local = torch.zeros_like(local_tensor(parameter), dtype=torch.float32)
                state[key] = with_local(parameter, local)
            return state
        for key, spec in self.matrix_state(group, shape).items():
            is_like = spec.is_like_parameter
            state[key] = zeros_sharded_as(parameter) if is_like else zeros_over(parameter, spec.shape, spec.sharded_dim)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of an optimizer of the same parameters.

        Raises:
            ValueError: the state is of another kind of optimizer, or of another rank. Nothing has changed then.
        """
        indexes = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(indexes) == len(parameters):  # else torch's own check speaks
            for index, parameter in zip(indexes, parameters, strict=True):
                self._check_state(parameter, state_dict["state"].get(index))
        super().load_state_dict(state_dict)
        for index, parameter in zip(indexes, parameters, strict=True):
            # torch casts state to the parameter's dtype; float32 moments of bfloat16 weights must stay what they are.
            if index in state_dict["state"]:
                empty = self.empty_state(parameter)
                for key, value in state_dict["state"][index].items():
                    self.state[parameter][key] = _own_copy(torch.as_tensor(value), empty[key])

    def _check_state(self, parameter: Tensor, state: Mapping[str, Any] | None) -> None:
        if state is None:
            return
        expected = {key: tuple(value.shape) for key, value in self.empty_state(parameter).items()}
        found = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
        if expected != found:
            raise ValueError(
                f"the state of {self._name_of(parameter)} is {found} and {type(self).__name__} needs {expected}: "
                "it is of another optimizer, or of another rank"
            )

    # How a step is made.

    def _count_step(self, group: dict[str, Any], parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """Makes state where there is none yet, and returns the parameters by the number of this step, from 1."""
        by_step: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(self.empty_state(parameter))
            state["step"] += 1
            by_step.setdefault(int(state["step"]), []).append(parameter)
        return by_step

    def _stacks(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> Iterator[MatrixStack]:
        alike: dict[tuple, list[Tensor]] = {}
        for parameter in parameters:
            layout = layout_of(parameter)
            alike.setdefault((layout, parameter.dtype, parameter.device.type), []).append(parameter)
        for (layout, _, device_type), members in alike.items():
            # The global size decides, so that all ranks make the same stacks.
            size = max(1, BATCH_NUMEL.get(device_type, 1) // max(1, math.prod(layout.shape)))
            for start in range(0, len(members), size):
                of_stack = members[start : start + size]
                yield MatrixStack(group, step, layout, of_stack, [self.state[parameter] for parameter in of_stack])

    def _waves(self, stacks: list[MatrixStack]) -> Iterator[list[MatrixStack]]:
        """The stacks that are updated side by side, each with its owners; stacks that gather nothing go first.

        By process group, as other groups of this rank have other ranks, which know nothing of what is in this one.
        """
        of_groups: dict[dist.ProcessGroup | None, list[tuple[Gathered, MatrixStack]]] = {}
        first: list[MatrixStack] = []
        for stack in stacks:
            gathered = self.gathered(stack) if stack.layout.groups else None
            if gathered is None:
                first.append(stack)
            else:
                of_groups.setdefault(stack.layout.group, []).append((gathered, stack))
        yield first
        for members in of_groups.values():
            wave, following = Wave(members[0][1].layout.num_ranks), []
            # The costliest first: what is left for the end evens the ranks out.
            for gathered, stack in sorted(members, key=lambda member: -member[1].cost):
                owners = wave.take(len(stack), stack.cost, gathered)
                if owners is None:
                    yield following
                    wave, following = Wave(stack.layout.num_ranks), []
                    owners = wave.take(len(stack), stack.cost, gathered)
                    assert owners is not None, "an empty wave takes anything"
                stack.owners = owners
                following.append(stack)
            yield following

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw_step(
            [local_tensor(parameter) for parameter in parameters],
            [local_gradient(parameter) for parameter in parameters],
            [local_tensor(state["exp_avg"]) for state in states],
            [local_tensor(state["exp_avg_sq"]) for state in states],
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=self.adamw_eps(group, step),
            weight_decay=group["weight_decay"],
        )

    def adamw_eps(self, group: Mapping[str, Any], step: int) -> float:
        """The eps of the AdamW that parameters outside of matrix groups get."""
        return group["eps"]


def _placed(tensor: Tensor) -> str:
    return f"sharded as {tensor.placements}" if isinstance(tensor, DTensor) else "a plain tensor"


def _own_copy(value: Tensor, like: Tensor) -> Tensor:
    """On the device of `like`, and with its strides: what was saved may be a view, or of another layout."""
    copy = value.to(device=like.device, copy=True)
    local, own = local_tensor(copy), local_tensor(like)
    return copy if local.shape != own.shape else with_local(copy, laid_out_as(local, own))


def require_matrix(optimizer: str, name: str, parameter: Tensor, sorter: str = "low_rank_param_groups") -> None:
    """Raises ValueError unless `parameter` has 2 dims.

    Args:
        sorter: the function that sorts a model's parameters for the optimizer.
    """
    if parameter.ndim != 2:
        raise ValueError(
            f"{name} is {list(parameter.shape)}: {optimizer} treats matrices, of 2 dims; put it into a param group of "
            f"its own that gets AdamW ({sorter} sorts a model's parameters)"
        )


def require_key(group: Mapping[str, Any], key: str, holds: Callable[[Any], bool], rule: str) -> None:
    """Raises ValueError unless the value of `key` is as `rule` says."""
    if not holds(group[key]):
        raise ValueError(f"{key}={group[key]!r}: {rule}")


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises ValueError for settings that no Adam can have."""
    group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    for key in ("lr", "eps", "weight_decay"):
        require_key(group, key, lambda value: value >= 0 and math.isfinite(value), "must be finite and not negative")
    require_key(
        group,
        "betas",
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "must be two numbers in [0, 1)",
    )
