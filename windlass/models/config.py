"""Which model. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from windlass.bounds import bounded, check_bounds
from windlass.errors import require
from windlass.registry import OTHERS, Registry

if TYPE_CHECKING:
    from windlass.models.spec import Model

MODELS = Registry("model")
VOCAB_MULTIPLE = 64


@dataclass
class ModelConfig:
    """The settings of all models. `vocab_size=null` is the tokenizer's vocabulary, rounded up to a multiple of 64."""

    name: str = "tiny"
    vocab_size: int | None = bounded(None, at_least=1)

    def __post_init__(self) -> None:
        check_bounds(self, "model")

    @property
    def folder(self) -> str | None:
        """The folder that the model comes from, whose tokenizer and chat template a run takes where it names none."""
        return None

    def resolve_vocab_size(self, tokenizer_vocab_size: int) -> int:
        """The vocabulary of a run whose tokenizer has so many tokens."""
        if self.vocab_size is not None:
            return self.vocab_size
        return math.ceil(tokenizer_vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def build(self, device: str = "meta") -> Model:
        """The model on `device`, without weights; `Model.materialize` gives one on the meta device its own."""
        return cast("Model", MODELS.build(self, device))


@dataclass
class LlamaConfig(ModelConfig):
    """A Llama-style decoder (LLaMA: Open and Efficient Foundation Language Models, 2023; GQA, 2023)."""

    hidden_size: int = bounded(192, at_least=1)
    intermediate_size: int = bounded(512, at_least=1)
    num_layers: int = bounded(4, at_least=1)
    num_heads: int = bounded(6, at_least=1)
    num_kv_heads: int = bounded(2, at_least=1)
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = bounded(0.0, at_least=0, below=1)
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "model.hidden_size",
            self.hidden_size,
            f"must be a multiple of 2 * model.num_heads={2 * self.num_heads}, so that a head has an even width",
            "change model.hidden_size or model.num_heads",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide model.num_heads={self.num_heads}",
            f"set model.num_kv_heads={self.num_heads} for plain multi-head attention, or another divisor",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass
class HFConfig(ModelConfig):
    """A causal language model of transformers, of a local folder. The vocabulary is that of its config.json."""

    name: str = "hf"
    path: str | None = None
    """The folder: config.json and safetensors, with which training begins; its tokenizer and chat template, too."""
    from_config: str | None = None
    """A folder with a config.json: training begins with drawn weights. Instead of `path`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.path is None) != (self.from_config is None),
            "model.path",
            self.path,
            "must name the model's folder, or model.from_config one with a config.json, and not both",
            "set model.path=DIR, a folder with config.json and safetensors",
        )

    @property
    def path_key(self) -> str:
        """The key that names the folder."""
        return "model.path" if self.from_config is None else "model.from_config"

    @property
    def folder(self) -> str | None:
        return self.path or self.from_config

    @property
    def model_folder(self) -> Path:
        assert self.folder is not None
        return Path(self.folder)

    def description(self) -> dict[str, Any]:
        """The content of config.json. Raises ConfigError."""
        from windlass.models.hf_files import read_description

        return read_description(self.model_folder, self.path_key)

    def resolve_vocab_size(self, tokenizer_vocab_size: int) -> int:
        description = self.description()
        found = description.get("vocab_size", (description.get("text_config") or {}).get("vocab_size"))
        require(
            isinstance(found, int) and self.vocab_size in (None, found),
            "model.vocab_size",
            self.vocab_size,
            f"is {found} in the config.json of {self.folder}",
            "leave model.vocab_size=null",
        )
        return found


MODELS.add(OTHERS, LlamaConfig, "windlass.models.llama:build")
MODELS.add("hf", HFConfig, "windlass.models.hf:build")
