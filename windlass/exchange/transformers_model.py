"""Models of transformers, built from the files of a folder; the library is imported where it is used.

Names of parameters here are those of transformers' modules. A folder may call them otherwise, or cut them otherwise
(the experts of a mixture are one parameter in a module and many tensors in a folder): `file_weights` says how.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.errors import ConfigError, require
from windlass.models.hf_changes import CONFIG, parse_config

Shapes = dict[str, tuple[int, ...]]
LAYER = re.compile(r".*?\.\d+\.")
"""The names of the parameters of one layer begin with the same."""
TEMPORARY_PREFIX = "windlass-model-"


def transformers() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        fix = "pip install 'windlass[hf]'"
        raise ConfigError("transformers", "missing", "is needed for this, and is not installed", fix) from None


@contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder of these files while the body runs, for what reads nothing else."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def model_config(files: Mapping[str, bytes], name: str, num_tensors: int | None = None) -> Any:
    """The configuration that a config.json describes.

    Args:
        name: of the folder or the checkpoint that it is of, for messages.
        num_tensors: that are there; a model of more layers is refused before it is built.

    Raises:
        ConfigError: it is not one of a causal language model that transformers knows.
    """
    document = parse_config(files[CONFIG])
    if "auto_map" in document:
        what = "needs code of its own (auto_map), which is not run"
        raise ConfigError("path", name, what, "take a model whose code is in transformers")
    num_layers = document.get("num_hidden_layers", document.get("n_layer"))
    if num_tensors is not None and isinstance(num_layers, int) and num_layers > num_tensors:
        what = f"has {num_tensors} weights, fewer than the {num_layers} layers of its {CONFIG}"
        raise ConfigError("path", name, what, "check that the configuration and the weights are of the same model")
    library = transformers()
    try:
        with folder_of({CONFIG: files[CONFIG]}) as folder:
            return library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        what = f"has a {CONFIG} that transformers {library.__version__} does not take: {said[0][:300]}"
        raise ConfigError("path", name, what, "check its model_type, or install a newer transformers") from None


def build(config: Any, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model on `device`, its weights not yet written. Raises ConfigError if there is no such causal model."""
    library = transformers()
    try:
        with torch.device(device), _no_first_weights():
            model = library.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        what = f"is no causal language model of transformers: {said}"
        raise ConfigError("path", name, what, "name a model that writes text") from None
    model.tie_weights()
    return model.eval()


def _no_first_weights() -> AbstractContextManager[Any]:
    """Leaves weights as they are in memory: they are about to be written."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):  # 5, and 4
        found = getattr(importlib.import_module(module), "no_init_weights", None) if _has(module) else None
        if found is not None:
            return found()
    return nullcontext()


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def expected_shapes(model: Any) -> Shapes:
    """The tensors that a checkpoint of `model` has: parameters, those that are tied once, and lasting buffers."""
    parameters = dict(model.named_parameters())
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every_name}
    return {name: tuple(tensor.shape) for name, tensor in {**parameters, **buffers}.items()}


@dataclass(frozen=True)
class FileWeight:
    """A tensor of a folder, as transformers' `save_pretrained` writes it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def file_weights(model: Any, shapes: Shapes, read: Callable[[str], torch.Tensor], name: str) -> list[FileWeight]:
    """The tensors of a folder of `model`, of those of its modules.

    transformers itself goes back from its modules to a folder, a layer at a time: so much is in memory.

    Args:
        model: on the meta device.
        shapes: of the parameters, by name.
        read: gives a parameter, whole and on the CPU.
        name: of the checkpoint, for messages.

    Raises:
        ConfigError: transformers cannot tell how the folder has them.
    """
    core = "transformers.core_model_loading"  # of transformers 5
    revert: Any = getattr(importlib.import_module(core), "revert_weight_conversion", None) if _has(core) else None
    groups: dict[str, list[str]] = {}
    for parameter in shapes:
        layer = LAYER.match(parameter)
        groups.setdefault(layer[0] if layer else parameter, []).append(parameter)
    weights: list[FileWeight] = []
    for names in groups.values():
        flat = {parameter: torch.empty(shapes[parameter], device="meta") for parameter in names}
        found = flat if revert is None else _reverted(revert, model, dict(flat), name)
        if found.keys() == flat.keys():
            weights += [FileWeight(each, shapes[each], lambda each=each: read(each)) for each in names]
            continue
        layer = _Layer(lambda names=names: revert(model, {each: read(each) for each in names}))
        weights += [
            FileWeight(each, tuple(tensor.shape), lambda each=each, layer=layer: layer.take(each))
            for each, tensor in found.items()
        ]
    doubled = len(weights) - len({weight.name for weight in weights})
    require(
        not doubled,
        "path",
        name,
        f"has {doubled} weights that transformers would write under the names of others",
        "export it with --format dcp",
    )
    return weights


def _reverted(revert: Any, model: Any, flat: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    try:
        return revert(model, flat)
    except Exception as error:
        what = f"has weights that transformers cannot cut as its folder has them: {type(error).__name__}: {error}"
        raise ConfigError("path", name, what, "export it with --format dcp, or install another transformers") from error


class _Layer:
    """The tensors of one layer, made when the first is asked for and gone with the last."""

    def __init__(self, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._make = make
        self._left: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        if name not in self._left:
            self._left = self._make()
        return self._left.pop(name)
