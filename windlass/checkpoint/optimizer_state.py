"""An optimizer's state as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor

from windlass.checkpoint.durable.manifest import Manifest, StoredTensor, is_of_optimizer
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.tensors import TORCH_DTYPES
from windlass.out_of_core import OutOfCore
from windlass.parallel.fragment import empty_like_global, fragment_of, local_tensor


@runtime_checkable
class LaysOutState(Protocol):
    """An optimizer that knows the layout of its state, so that any ranks can restore what others saved."""

    def empty_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every state tensor of `parameter` in its shape, dtype, device and cut, whatever it holds. Not collective.

        A DTensor is cut as its placements say; a plain tensor is whole, and the same on every rank.
        """
        ...


class OptimizerState:
    """The state of any `torch.optim.Optimizer`, keyed by the names of its parameters.

    Where the optimizer does not lay out its state itself (`LaysOutState`), a state tensor with its parameter's shape
    is cut as the parameter is, and any other is the same on all ranks.

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
        self.out_of_core = optimizer if isinstance(optimizer, OutOfCore) else None
        self.inner = optimizer if self.out_of_core is None else self.out_of_core.inner
        self.layout = self.inner if isinstance(self.inner, LaysOutState) else None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        unnamed = [tuple(parameter.shape) for parameter in parameters if parameter not in parameter_names]
        if unnamed:
            raise ValueError(f"{name} optimizes {len(unnamed)} parameters of no module that is checkpointed: {unnamed}")
        self.names = [parameter_names[parameter] for parameter in parameters]
        self.parameters = parameters

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, str, torch.Tensor]]:
        """Every state tensor: its name in the checkpoint, the parameter whose state it is, its key, and itself.

        What is not in memory is on the meta device.

        Raises:
            ValueError: the state of a sharded parameter is a plain tensor, and nothing says that it is the same on
                every rank: parts of it could be lost.
        """
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.optimizer.state.get(parameter, {})
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            if isinstance(parameter, DTensor):
                self._check_cut(name, parameter, tensors)
            for key, value in tensors.items():
                yield self._tensor_name(name, key), parameter, key, value

    def _check_cut(self, name: str, parameter: DTensor, tensors: dict[str, torch.Tensor]) -> None:
        doubtful = {
            key: value
            for key, value in tensors.items()
            if not isinstance(value, DTensor) and value.numel() > 1 and value.shape != parameter.shape
        }
        # Asked for only here: it allocates as much as the state itself.
        layout = self.layout.empty_state(parameter) if doubtful and self.layout is not None else {}
        for key, value in doubtful.items():
            like = layout.get(key)
            if like is None or isinstance(like, DTensor) or like.shape != value.shape:
                raise ValueError(
                    f"{self.name}: the state {key} of {name} is {list(value.shape)}, the sharded parameter is "
                    f"{list(parameter.shape)}: which rank holds which part of it is not known"
                )

    def hyperparameters(self) -> dict[str, Any]:
        """The JSON part: the kind of optimizer, its param groups by name, and state that is not tensors."""
        groups = []
        names = iter(self.names)
        for group in self.optimizer.param_groups:
            plain = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({**plain, "names": [next(names) for _ in group["params"]]})
        return {"class": type(self.inner).__name__, "param_groups": groups, "numbers": self.numbers()}

    def numbers(self) -> dict[str, dict[str, Any]]:
        """The state that is not tensors, by the parameter's name."""
        found = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.optimizer.state.get(parameter, {})
            others = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            if others:
                found[name] = others
        return found

    def differences(self, manifest: Manifest) -> list[str]:
        """Why the state in the checkpoint does not fit this optimizer, what explains the most first."""
        stored = manifest.objects.get(self.name, {})
        kind = type(self.inner).__name__
        if not is_of_optimizer(stored):
            return [f"it has no optimizer's state of {self.name}"]
        if stored.get("class") != kind:
            return [f"{self.name} is {stored.get('class')} there and {kind} here"]
        names = [name for group in names_of_groups(stored) for name in group]
        if sorted(names) != sorted(self.names):
            return [f"{self.name} has {len(names)} parameters there and {len(self.names)} here, or others"]
        ranks = [] if self.layout is None else self._differences_of_rank(stored)
        if self.restore_hyperparameters and names_of_groups(stored) != names_of_groups(self.hyperparameters()):
            return [*ranks, f"{self.name} has other param groups there than here"]
        if self.layout is None:
            return self._uncut_state(manifest)
        differences = self._differences_of_layout(self.layout, manifest, stored)
        # Another rank that changes no shape is a hyperparameter like others, unless it would be taken over: the
        # layout that was compared is that of the rank here.
        return [*ranks, *differences] if differences or self.restore_hyperparameters else []

    def _uncut_state(self, manifest: Manifest) -> list[str]:
        """State that a sharded parameter's optimizer would have to lay out, where it does not."""
        there = self._stored_tensors(manifest)
        return [
            f"the state {key} of {name} is {list(entry.shape)}, and how {self.name} cuts it over ranks is not known "
            f"({type(self.inner).__name__} has no empty_state)"
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if isinstance(parameter, DTensor)
            for key, entry in there.get(name, {}).items()
            if entry.shape != tuple(parameter.shape) and torch.Size(entry.shape).numel() > 1
        ]

    def _differences_of_layout(self, layout: LaysOutState, manifest: Manifest, stored: dict[str, Any]) -> list[str]:
        differences = []
        tensors = self._stored_tensors(manifest)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            there = tensors.get(name, {})
            if not there and name not in stored["numbers"]:
                continue  # it never had a gradient
            here = layout.empty_state(parameter)
            for key in [*here, *(key for key in there if key not in here)]:
                difference = _difference(there.get(key), here.get(key))
                if difference:
                    differences.append(f"the state {key} of {name} is {difference}")
        return differences

    def _differences_of_rank(self, stored: dict[str, Any]) -> list[str]:
        there, here = _rank_by_name(stored), _rank_by_name(self.hyperparameters())
        changes = dict.fromkeys((there[name], here[name]) for name in self.names if there[name] != here[name])
        return [f"{self.name} was saved with {before} and has {now} here" for before, now in changes]

    @torch.no_grad()
    def restore(self, reader: CheckpointReader) -> None:
        """Replaces the optimizer's state by what the checkpoint has; `differences` must have found none."""
        stored = reader.manifest.objects[self.name]
        there = self._stored_tensors(reader.manifest)
        if self.out_of_core is not None:
            self._restore_out_of_core(self.out_of_core, reader, stored, there)
            return
        state: dict[int, dict[str, Any]] = {}
        placed: list[tuple[torch.Tensor, str, torch.Tensor]] = []
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            tensors = self._read(reader, name, parameter, there.get(name, {}))
            entries = {**stored["numbers"].get(name, {}), **tensors}
            if entries:
                state[index] = entries
            for key, value in tensors.items():
                if self.layout is not None:
                    placed.append((parameter, key, value))
                elif key != "step":
                    placed.append((parameter, key, value.to(parameter.device)))
        # torch's own way in puts `step` on the device where its kernels want it, but casts all else to the
        # parameter's dtype, which would round float32 state of bfloat16 weights and make floats of integers.
        self.optimizer.load_state_dict({"state": state, "param_groups": self._groups(stored)})
        for parameter, key, value in placed:
            self.optimizer.state[parameter][key] = value

    def _restore_out_of_core(
        self,
        optimizer: OutOfCore,
        reader: CheckpointReader,
        stored: dict[str, Any],
        there: dict[str, dict[str, StoredTensor]],
    ) -> None:
        """A parameter at a time, in the order in which the optimizer keeps them."""
        self.optimizer.load_state_dict({"state": {}, "param_groups": self._groups(stored)})
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        names = dict(zip(self.parameters, self.names, strict=True))
        in_runs = [parameter for run in optimizer.bucket_parameters() for parameter in run]
        for parameter in dict.fromkeys([*in_runs, *self.parameters]):
            name = names[parameter]
            tensors = self._read(reader, name, parameter, there.get(name, {}))
            if self.layout is None:
                tensors = {key: _as_torch_places(key, value, groups[parameter]) for key, value in tensors.items()}
            state = {**stored["numbers"].get(name, {}), **tensors}
            if state:
                optimizer.put_state(parameter, state)

    def _read(
        self, reader: CheckpointReader, name: str, parameter: torch.Tensor, there: dict[str, StoredTensor]
    ) -> dict[str, torch.Tensor]:
        """The state tensors of a parameter, in the dtypes that were stored and sharded as they are here."""
        if self.layout is None:
            likes = {key: parameter for key, entry in there.items() if entry.shape == tuple(parameter.shape)}
        else:
            likes = self.layout.empty_state(parameter) if there else {}
        tensors = {}
        for key, entry in there.items():
            tensor_name = self._tensor_name(name, key)
            if key in likes:
                tensors[key] = empty_like_global(likes[key], TORCH_DTYPES[entry.dtype])
                reader.read(fragment_of(tensor_name, tensors[key]), local_tensor(tensors[key]))
            else:
                tensors[key] = reader.read_whole(tensor_name)
        return tensors

    def _groups(self, stored: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups to restore, as torch's `load_state_dict` takes them."""
        groups = self.inner.state_dict()["param_groups"]
        if self.restore_hyperparameters:
            for group, stored_group in zip(groups, stored["param_groups"], strict=True):
                for key, value in stored_group.items():
                    if key != "names":
                        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        return groups

    def _tensor_name(self, parameter_name: str, key: str) -> str:
        return f"{self.name}.state.{parameter_name}.{key}"

    def _stored_tensors(self, manifest: Manifest) -> dict[str, dict[str, StoredTensor]]:
        """Parameter name -> state key -> what the checkpoint has of it."""
        prefix = f"{self.name}.state."
        tensors: dict[str, dict[str, StoredTensor]] = {}
        for tensor_name, entry in manifest.tensors.items():
            if tensor_name.startswith(prefix):
                parameter_name, _, key = tensor_name.removeprefix(prefix).rpartition(".")
                tensors.setdefault(parameter_name, {})[key] = entry
        return tensors


def names_of_groups(hyperparameters: dict[str, Any]) -> list[list[str]]:
    return [group["names"] for group in hyperparameters["param_groups"]]


def _rank_by_name(hyperparameters: dict[str, Any]) -> dict[str, str]:
    """Parameter name -> "rank N", of a low-rank optimizer's param groups."""
    return {
        name: f"rank {group['rank']}" if group.get("rank") is not None else "no rank"
        for group in hyperparameters["param_groups"]
        for name in group["names"]
    }


def _difference(there: StoredTensor | None, here: torch.Tensor | None) -> str | None:
    """How a stored state tensor differs from one of this optimizer, of which at least one is; None if it fits."""
    shape_there = "absent" if there is None else str(list(there.shape))
    shape_here = "absent" if here is None else str(list(here.shape))
    if there is None or here is None or there.shape != tuple(here.shape):
        return f"{shape_there} there and {shape_here} here"
    # A float is restored in its stored dtype, whatever float it would be here.
    dtype = TORCH_DTYPES[there.dtype]
    if dtype != here.dtype and not (dtype.is_floating_point and here.dtype.is_floating_point):
        return f"{there.dtype} there and {str(here.dtype).removeprefix('torch.')} here"
    return None


def _as_torch_places(key: str, value: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """A state tensor on the device where torch's own `load_state_dict` would put it."""
    device = group["params"][0].device
    if key != "step":
        return value.to(device)
    return value.to(device, torch.float32) if group.get("capturable") or group.get("fused") else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
