"""First weights of transformers' models: read from the files of a folder, by the ranges of a rank's fragments, or drawn
as the family draws them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.errors import ConfigError
from windlass.models.huggingface import ROTARY_BUFFER, weight_differences
from windlass.models.huggingface_folder import HuggingFaceFolder, same_bits
from windlass.parallel.fragment import Fragment
from windlass.parallel.random import fill_normal_

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Source:
    """Tensors of the files that make one or more parameters, as transformers converts them."""

    converter: Any
    """None: the one tensor is the parameter."""
    target: str
    """The first of the parameters."""
    tensors: list[tuple[str, str]] = field(default_factory=list)
    """(the converter's pattern, name)."""


class FileWeights:
    """The weights of a folder.

    Args:
        causal: the model of transformers.
        parameters: those to fill, whole, by name.
        key: what a user calls the folder by.

    Raises:
        ConfigError: the files have others than the model.
        CorruptCheckpoint: a file is missing or damaged.
    """

    def __init__(self, folder: Path, causal: Any, parameters: Mapping[str, Tensor], key: str) -> None:
        self._folder, self._causal, self._key = HuggingFaceFolder(folder, key), causal, key
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._sources: dict[str, _Source] = {}
        self._tied_head: str | None = None
        """A tensor of the files that the embedding stands for."""
        embedding = causal.get_input_embeddings().weight
        self._embedding = next(name for name, parameter in parameters.items() if parameter is embedding)
        self._match(expected)
        self._made: tuple[_Source, dict[str, Tensor]] | None = None

    def fill(self, name: str, local: Tensor, fragment: Fragment, seed: int) -> None:
        """Copies this rank's part of a parameter; of what needs no conversion no more is read than that.

        Raises:
            ConfigError: a head differs from the embedding that config.json ties it to.
        """
        del seed
        source = self._sources[name]
        if self._tied_head is not None and name == self._embedding:
            self._refuse_other_head(fragment)
        if source.converter is None:
            local.copy_(self._folder.read(source.tensors[0][1])[fragment.slices])
            return
        if self._made is None or self._made[0] is not source:
            tensors = [(pattern, self._folder.read(found)) for pattern, found in source.tensors]
            self._made = (source, self._convert(source, tensors))
        local.copy_(self._made[1][name][fragment.slices])

    def file_dtypes(self) -> dict[str, str]:
        """The dtype of each tensor of the files, by its name there."""
        return {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in self._folder.tensors.items()}

    def _convert(self, source: _Source, tensors: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The parameters that transformers makes of tensors, by name."""
        converter = deepcopy(source.converter)
        for pattern, tensor in tensors:
            converter.add_tensor(source.target, source.target, pattern, lambda tensor=tensor: tensor)
        made = converter.convert(source.target, model=self._causal, config=self._causal.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _match(self, expected: dict[str, Shape]) -> None:
        """Finds for every parameter what it is made of; refuses what is missing, too much, or of another shape."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(self._causal)
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        renamings: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        sources: dict[str, _Source] = {}
        for name in sorted(self._folder.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, renamings, converters, self._causal.base_model_prefix, dict.fromkeys(expected, True)
            )
            if self._is_passed_over(name, target, expected):
                continue
            converter = None if pattern is None else by_pattern[pattern]
            source = sources.setdefault(target, _Source(converter, target))
            source.tensors.append((pattern or "", name))
        found: dict[str, Shape] = {}
        for source in sources.values():
            for name, shape in self._shapes(source).items():
                found[name], self._sources[name] = shape, source
        self._refuse_differences(expected, found)

    def _shapes(self, source: _Source) -> dict[str, Shape]:
        if source.converter is None:
            return {source.target: self._folder.tensors[source.tensors[0][1]][0]}
        tensors = [
            (pattern, torch.empty(self._folder.tensors[name][0], dtype=self._folder.tensors[name][1], device="meta"))
            for pattern, name in source.tensors
        ]
        return {name: tuple(made.shape) for name, made in self._convert(source, tensors).items()}

    def _is_passed_over(self, name: str, target: str, expected: Mapping[str, Shape]) -> bool:
        """Tells of a tensor that is none of the parameters and belongs to such a folder all the same."""
        if target in expected:
            return False
        head = self._causal.get_output_embeddings()
        tied = {f"{module}.weight" for module, found in self._causal.named_modules() if found is head}
        if target in tied:  # its parameter is the embedding's
            self._tied_head = name
            return True
        ignored = [*(self._causal._keys_to_ignore_on_load_unexpected or ()), re.escape(ROTARY_BUFFER) + "$"]
        return any(re.search(pattern, target) for pattern in ignored)

    def _refuse_other_head(self, fragment: Fragment) -> None:
        """Raises ConfigError for a head that has other values than the embedding."""
        assert self._tied_head is not None
        embedding, head = self._sources[self._embedding].tensors[0][1], self._tied_head
        parts = [self._folder.read(name) for name in (embedding, head)]
        if parts[0].shape != parts[1].shape or not same_bits(*(part[fragment.slices] for part in parts)):
            raise ConfigError(
                self._key,
                self._folder.folder,
                f"has {head} that differs from {embedding}, and its config.json says that they are tied",
                "set tie_word_embeddings to false there if the head is its own, or remove it from the weights",
            )

    def _refuse_differences(self, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
        differences = weight_differences(expected, found)
        if differences:
            more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
            raise self._refusal(
                f"has weights that are not those of its config.json: {'; '.join(differences[:3])}{more}"
            )

    def _refusal(self, rule: str) -> ConfigError:
        fix = "check that config.json and the weights are of the same model, and that no file is missing"
        return ConfigError(self._key, self._folder.folder, rule, fix)


@dataclass
class _Draw:
    """How a parameter begins.

    Args:
        std: of N(0, std^2); None: all are `constant`.
        zero_rows: rows that are 0 all the same, as an embedding's of padding.
    """

    std: float | None
    constant: float = 0.0
    zero_rows: tuple[int, ...] = ()


class DrawnWeights:
    """First weights, drawn as the family's own initialisation says: it runs on the meta device, and is listened to.

    Args:
        causal: the model of transformers, on the meta device.
        parameters: those to fill, by name.
        key: what a user calls the folder by.

    Raises:
        ConfigError: the family draws otherwise than N(0, std^2) or a constant.
    """

    def __init__(self, causal: Any, parameters: Mapping[str, Tensor], key: str) -> None:
        recorder = _Recorder(dict(parameters))
        for item in (*causal.modules(), *parameters.values()):
            setattr(item, "_is_hf_initialized", False)  # noqa: B010  # transformers' own mark, on what has no such name
        with torch.no_grad(), recorder:
            causal.apply(causal._init_weights)
        self._draws = recorder.draws
        unknown = recorder.unknown or [f"leaves {name} as it is" for name in parameters if name not in self._draws]
        if unknown:
            raise ConfigError(
                key,
                type(causal).__name__,
                f"draws its first weights in a way that is not known here: it {unknown[0]}",
                "begin with weights: model.path=DIR",
            )

    def file_dtypes(self) -> dict[str, str]:
        """No file has any of them."""
        return {}

    def fill(self, name: str, local: Tensor, fragment: Fragment, seed: int) -> None:
        draw = self._draws[name]
        if draw.std is None:
            local.fill_(draw.constant)
            return
        fill_normal_(local, fragment, seed=seed, std=draw.std)
        for row in draw.zero_rows:
            if fragment.offset[0] <= row < fragment.offset[0] + fragment.shape[0]:
                local[row - fragment.offset[0]] = 0.0


class _Recorder(TorchDispatchMode):
    """Notes what is written into parameters."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.draws: dict[str, _Draw] = {}
        self.unknown: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if func._schema.is_mutable and isinstance(target, Tensor):
            self._note(func.overloadpacket.__name__, target, args[1:], kwargs)
        return func(*args, **kwargs)

    def _note(self, op: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        base = target if target._base is None else target._base
        name = self._names.get(id(target), self._names.get(id(base)))
        if name is None:
            return
        if id(target) not in self._names:
            is_row = op in ("zero_", "fill_") and not (args and args[0]) and base.ndim == 2 and target.ndim == 1
            if is_row and name in self.draws:
                row = target.storage_offset() // base.shape[1]
                self.draws[name].zero_rows = (*self.draws[name].zero_rows, row)
            else:
                self.unknown.append(f"writes a part of {name} by {op}")
        elif op == "normal_":
            mean, std = (*args, *(kwargs.get(key, default) for key, default in (("mean", 0.0), ("std", 1.0))))[:2]
            self.draws[name] = _Draw(float(std))
            if mean:
                self.unknown.append(f"draws {name} around {mean}")
        elif op in ("zero_", "fill_"):
            self.draws[name] = _Draw(None, float(args[0]) if args else 0.0)
        else:
            self.unknown.append(f"writes {name} by {op}")
