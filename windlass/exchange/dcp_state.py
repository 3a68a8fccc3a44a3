"""Maps a checkpoint's state to the nested state dict that DCP saves, and back.

It goes where `get_model_state_dict` and `get_optimizer_state_dict` of torch would put it, so that `dcp.load` fills
theirs. What these have no place for (schedule, data cursor, random generators) is kept under a key of its own, so that
a folder that windlass exported comes back as the checkpoint that it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from windlass.checkpoint.durable.manifest import Manifest, is_of_optimizer
from windlass.checkpoint.image import DTYPE_BYTES
from windlass.checkpoint.objects import RNG_PREFIX
from windlass.errors import ConfigError
from windlass.exchange.dcp import DcpFolder
from windlass.exchange.dcp_metadata import damaged
from windlass.untrusted import MAX_DEPTH, Malformed, convert, parse_json

MAX_VALUES = 1_000_000
"""The most values of an entry that is no tensor, with all that is in it."""
OWN_KEY = "__windlass__"
MODEL, OPTIMIZER = "model", "optimizer"
"""The keys of the model and the optimizer in a checkpoint and in a state dict."""


def state_dict_layout(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nested state dict of a checkpoint.

    Names of parameters are relative to the module where there is one; with several modules they keep its name.

    Returns:
        The tensors, each as its name in the checkpoint, and the values; to be merged.
    """
    optimizers = {name: entry for name, entry in manifest.objects.items() if is_of_optimizer(entry)}
    modules: set[str] = set()
    paths: dict[str, list[str]] = {}
    for name in manifest.tensors:
        module, _, rest = name.partition(".")
        if module == RNG_PREFIX:
            paths[name] = [OWN_KEY, "tensors", name]
        elif module in optimizers:
            parameter, _, key = rest.removeprefix("state.").rpartition(".")
            paths[name] = [module, "state", parameter, key]
        else:
            modules.add(module)
            paths[name] = [module, rest]
    prefix = f"{next(iter(modules))}." if len(modules) == 1 else ""
    tensors: dict[str, Any] = {}
    for name, path in paths.items():
        if path[0] in optimizers:
            path[2] = path[2].removeprefix(prefix)
        _set(tensors, path, name)
    values: dict[str, Any] = {name: _optimizer_values(entry, prefix) for name, entry in optimizers.items()}
    own = {"step": manifest.step, "world_size": manifest.world_size, "objects": manifest.objects, "paths": paths}
    values[OWN_KEY] = {"checkpoint": json.dumps(own)}
    return tensors, values


def _optimizer_values(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    state = {name.removeprefix(prefix): numbers for name, numbers in entry["numbers"].items()}
    groups = []
    for group in entry["param_groups"]:
        # JSON made lists of tuples such as betas, and torch's optimizers have no lists there.
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        del plain["names"]
        groups.append({**plain, "params": [name.removeprefix(prefix) for name in group["names"]]})
    return {"state": state, "param_groups": groups}


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


@dataclass
class _Own:
    """The entries that windlass adds to a folder that it exports."""

    step: int
    world_size: int
    objects: dict[str, Any]
    paths: dict[str, list[str]]
    """Name in the checkpoint -> keys in the state dict."""


@dataclass
class DcpState:
    """The state that an import takes from a DCP folder.

    Attributes:
        objects: as a manifest has them.
        tensors: name in the checkpoint -> flat name in the folder.
        is_partial: whether it has less than a run needs.
        left_out: flat names, or keys of the state dict, that are not taken.
    """

    step: int
    world_size: int
    objects: dict[str, Any]
    tensors: dict[str, str]
    is_partial: bool
    left_out: list[str] = field(default_factory=list)


def read_state(folder: DcpFolder, optimizer_class: str | None) -> DcpState:
    """Reads from a DCP folder what belongs in a checkpoint: all if windlass exported it; of another's the state dicts
    under `model` and `optimizer`, as `get_model_state_dict` and `get_optimizer_state_dict` of torch make them.

    Args:
        optimizer_class: the class that the folder's optimizer state is of, which DCP does not record. None leaves the
            state of another's folder out.

    Raises:
        ConfigError: it has no `model`, its optimizer state is of other parameters, or a dtype is not supported.
        CorruptCheckpoint: an entry cannot be read.
    """
    state = _own_state(folder) or _others_state(folder, optimizer_class)
    problem = next(Manifest(state.step, 0, state.world_size, 0.0, state.objects, {}, {}).problems(), None)
    if problem is not None:
        raise damaged(folder.folder, f"makes no checkpoint: {problem}")
    for name, flat in state.tensors.items():
        if not name.isprintable():
            raise damaged(folder.folder, f"{name[:80]!a} is no name of a tensor")
        dtype = str(folder.contents.tensors[flat].dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise ConfigError("path", folder.folder, f"has {name} as {dtype}", f"convert it: {', '.join(DTYPE_BYTES)}")
    return state


def _own_state(folder: DcpFolder) -> DcpState | None:
    flat = folder.contents.paths.get((OWN_KEY, "checkpoint"))
    if flat is None:
        return None
    try:
        text = folder.read_value(flat)
        own = convert(parse_json(text) if isinstance(text, str) else None, _Own)
        paths = {name: folder.contents.paths.get(tuple(path), "") for name, path in own.paths.items()}
        if not all(flat in folder.contents.tensors for flat in paths.values()):
            raise Malformed("it lacks tensors")
        return DcpState(own.step, own.world_size, own.objects, paths, is_partial=False)
    except Malformed as error:
        raise damaged(folder.folder, f"its {OWN_KEY} entry cannot be used: {error}") from error


def _others_state(folder: DcpFolder, optimizer_class: str | None) -> DcpState:
    contents = folder.contents
    state = DcpState(0, 0, {}, {}, is_partial=True)
    optimizer_paths: dict[tuple[str | int, ...], str] = {}
    for path, flat in contents.paths.items():
        if path[0] == MODEL and len(path) > 1 and flat in contents.tensors:
            state.tensors[".".join(map(str, path))] = flat
        elif path[0] == OPTIMIZER and optimizer_class is not None:
            optimizer_paths[path] = flat
        else:
            state.left_out.append(str(path[0]) if path[0] != MODEL else flat)
    state.left_out = list(dict.fromkeys(state.left_out))
    if not state.tensors:
        raise ConfigError(
            "path",
            folder.folder,
            f"has no tensors under {MODEL!r}, but {', '.join(map(repr, state.left_out[:5]))}",
            'save {"model": get_model_state_dict(...), "optimizer": get_optimizer_state_dict(...)}',
        )
    if optimizer_class is not None:
        _take_optimizer(folder, optimizer_paths, optimizer_class, state)
    return state


def _take_optimizer(
    folder: DcpFolder, paths: dict[tuple[str | int, ...], str], optimizer_class: str, state: DcpState
) -> None:
    groups: dict[int, dict[str, Any]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for path, flat in paths.items():
        match path:
            case (_, "state", str(parameter), str(key)):
                name = f"{MODEL}.{parameter}"
                if name not in state.tensors:
                    raise _of_other_parameters(folder, parameter)
                if flat in folder.contents.tensors:
                    state.tensors[f"{OPTIMIZER}.state.{name}.{key}"] = flat
                else:
                    numbers.setdefault(name, {})[key] = _plain(folder, flat)
            case (_, "param_groups", int(index), str(key)):
                groups.setdefault(index, {})[key] = _plain(folder, flat)
            case _:
                raise _of_other_parameters(folder, flat)
    param_groups = []
    for _, group in sorted(groups.items()):
        parameters = group.pop("params", [])
        names = [f"{MODEL}.{name}" for name in (parameters if isinstance(parameters, list | tuple) else [])]
        unknown = [name for name in names if name not in state.tensors]
        if unknown or not names:
            raise _of_other_parameters(folder, unknown[0] if unknown else "param_groups")
        param_groups.append({**group, "names": names})
    if not param_groups:
        raise _of_other_parameters(folder, "param_groups")
    state.objects[OPTIMIZER] = {"class": optimizer_class, "param_groups": param_groups, "numbers": numbers}


def _plain(folder: DcpFolder, flat: str) -> Any:
    """A value as JSON holds it."""
    is_tensor = flat in folder.contents.tensors
    value = folder.read_tensor(flat) if is_tensor else folder.read_value(flat)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if not _is_plain(value):
        raise ConfigError("path", folder.folder, f"has {flat}, which is no plain value", "leave --optimizer-class out")
    return value


def _is_plain(value: Any) -> bool:
    """True if JSON can hold it. A file may have one list in many places: it is counted in each."""
    level, num_values = [value], 0
    for _ in range(MAX_DEPTH):
        if not level:
            return True
        num_values += len(level)
        if num_values > MAX_VALUES or not all(_is_plain_alone(item) for item in level):
            return False
        nested = (item.values() if isinstance(item, dict) else item for item in level if not _is_single(item))
        level = [child for items in nested for child in items]
    return False


def _is_plain_alone(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value)
    return _is_single(value) or isinstance(value, list | tuple)


def _is_single(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _of_other_parameters(folder: DcpFolder, what: str) -> ConfigError:
    return ConfigError(
        "path",
        folder.folder,
        f"has optimizer state that is not named as the model's parameters are ({what})",
        "save what get_optimizer_state_dict(model, optimizer) returns, or leave --optimizer-class out",
    )
