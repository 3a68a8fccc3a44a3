"""An optimizer's state as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from windlass.checkpoint.durable import CheckpointReader
from windlass.parallel.fragment import empty_like_global, fragment_of, local_tensor


class OptimizerState:
    """The state of any `torch.optim.Optimizer`, keyed by the names of its parameters.

    A state tensor with its parameter's shape is cut as the parameter is; any other is the same on all ranks.

    Args:
        name: of the optimizer; tensors are called `{name}.state.{parameter}.{key}`.
        parameter_names: parameter -> name, for every parameter of the optimizer.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        parameter_names: Mapping[torch.Tensor, str],
        restore_hyperparameters: bool,
    ) -> None:
        self.name, self.optimizer, self.restore_hyperparameters = name, optimizer, restore_hyperparameters
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        unnamed = [tuple(parameter.shape) for parameter in parameters if parameter not in parameter_names]
        if unnamed:
            raise ValueError(f"{name} optimizes {len(unnamed)} parameters of no module that is checkpointed: {unnamed}")
        self.names = [parameter_names[parameter] for parameter in parameters]
        self.parameters = parameters

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter_name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    is_cut = isinstance(parameter, DTensor) or isinstance(value, DTensor)
                    if is_cut and value.numel() > 1 and value.shape != parameter.shape:
                        raise ValueError(
                            f"{self.name}: the state {key} of {parameter_name} is {list(value.shape)}, the sharded "
                            f"parameter is {list(parameter.shape)}: which rank holds which part of it is not known"
                        )
                    yield f"{self.name}.state.{parameter_name}.{key}", value

    def hyperparameters(self) -> dict[str, Any]:
        """The JSON part: the kind of optimizer, its param groups by name, and state that is not tensors."""
        groups = []
        numbers: dict[str, dict[str, Any]] = {}
        names = iter(self.names)
        for group in self.optimizer.param_groups:
            plain = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({**plain, "names": [next(names) for _ in group["params"]]})
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.optimizer.state.get(parameter, {})
            others = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            if others:
                numbers[name] = others
        return {"class": type(self.optimizer).__name__, "param_groups": groups, "numbers": numbers}

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Why the state that `hyperparameters` described as `stored` does not fit this optimizer."""
        kind = type(self.optimizer).__name__
        if stored.get("class") != kind:
            return [f"{self.name} is {stored.get('class')} there and {kind} here"]
        names = [name for group in names_of_groups(stored) for name in group]
        if sorted(names) != sorted(self.names):
            return [f"{self.name} has {len(names)} parameters there and {len(self.names)} here, or others"]
        if self.restore_hyperparameters and names_of_groups(stored) != names_of_groups(self.hyperparameters()):
            return [f"{self.name} has other param groups there than here"]
        return []

    @torch.no_grad()
    def restore(self, reader: CheckpointReader, stored: dict[str, Any]) -> None:
        """Replaces the optimizer's state by what the checkpoint has; `differences` must have found none."""
        stored_keys: dict[str, list[str]] = {}
        prefix = f"{self.name}.state."
        for tensor_name in reader.manifest.tensors:
            if tensor_name.startswith(prefix):
                parameter_name, _, key = tensor_name.removeprefix(prefix).rpartition(".")
                stored_keys.setdefault(parameter_name, []).append(key)
        state: dict[int, dict[str, Any]] = {}
        tensors: list[tuple[torch.Tensor, str, torch.Tensor]] = []
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            entries: dict[str, Any] = dict(stored["numbers"].get(name, {}))
            for key in stored_keys.get(name, []):
                tensor_name = f"{prefix}{name}.{key}"
                entry = reader.manifest.tensors[tensor_name]
                if entry.shape == tuple(parameter.shape):
                    value = empty_like_global(parameter, getattr(torch, entry.dtype))
                    reader.read(fragment_of(tensor_name, value), local_tensor(value))
                else:
                    value = reader.read_whole(tensor_name)
                entries[key] = value
                if key != "step":
                    tensors.append((parameter, key, value.to(parameter.device)))
            if entries:
                state[index] = entries
        # torch's own way in puts `step` on the device where its kernels want it, but casts all else to the
        # parameter's dtype, which would round float32 state of bfloat16 weights and make floats of integers.
        groups = self.optimizer.state_dict()["param_groups"]
        if self.restore_hyperparameters:
            for group, stored_group in zip(groups, stored["param_groups"], strict=True):
                for key, value in stored_group.items():
                    if key != "names":
                        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, key, value in tensors:
            self.optimizer.state[parameter][key] = value


def names_of_groups(hyperparameters: dict[str, Any]) -> list[list[str]]:
    return [group["names"] for group in hyperparameters["param_groups"]]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
