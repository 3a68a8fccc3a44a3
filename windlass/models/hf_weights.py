"""First weights of transformers' models: read from the files of a folder, by the ranges of a rank's fragments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.models.huggingface import ROTARY_BUFFER
from windlass.models.huggingface_folder import HuggingFaceFolder
from windlass.parallel.fragment import Fragment

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
        self.dtypes = {dtype for _, dtype in self._folder.tensors.values()}
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._sources: dict[str, _Source] = {}
        self._tied_head: str | None = None
        self._match(expected)
        self._made: tuple[_Source, dict[str, Tensor]] | None = None

    def fill(self, name: str, local: Tensor, fragment: Fragment) -> None:
        """Copies this rank's part of a parameter; of what needs no conversion no more is read than that."""
        source = self._sources[name]
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
            self._refuse_other_head(name)
            return True
        ignored = [*(self._causal._keys_to_ignore_on_load_unexpected or ()), re.escape(ROTARY_BUFFER) + "$"]
        return any(re.search(pattern, target) for pattern in ignored)

    def _refuse_other_head(self, name: str) -> None:
        """Raises ConfigError for a head of its own beside an embedding that config.json ties to it."""
        embedding = self._causal.get_input_embeddings().weight
        if self._folder.tensors[name][0] != tuple(embedding.shape):
            raise self._refusal(f"has {name} of another shape than the embedding that it is tied to")
        self._tied_head = name

    def _refuse_differences(self, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
        differences = [f"it has no {name}" for name in expected if name not in found]
        differences += [f"it has {name}, which the model has not" for name in found if name not in expected]
        differences += [
            f"{name} is {list(found[name])} and should be {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if differences:
            more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
            raise self._refusal(
                f"has weights that are not those of its config.json: {'; '.join(differences[:3])}{more}"
            )

    def _refusal(self, rule: str) -> ConfigError:
        fix = "check that config.json and the weights are of the same model, and that no file is missing"
        return ConfigError(self._key, self._folder.folder, rule, fix)
