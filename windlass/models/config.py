"""Which model. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from windlass.errors import require
from windlass.registry import OTHERS, Registry

if TYPE_CHECKING:
    from windlass.models.spec import Model

MODELS = Registry("model")


@dataclass
class ModelConfig:
    """What every model has. `vocab_size=null` takes the tokenizer's vocabulary, rounded up to a multiple of 64."""

    name: str = "tiny"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            require(self.vocab_size >= 1, "model.vocab_size", self.vocab_size, "must be at least 1", "leave it null")

    def build(self, device: str = "meta") -> Model:
        """The model on `device`, without weights; `Model.materialize` gives one on the meta device its own."""
        return cast("Model", MODELS.build(self, device))


@dataclass
class LlamaConfig(ModelConfig):
    """A Llama-style decoder (LLaMA: Open and Efficient Foundation Language Models, 2023; GQA, 2023)."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key}", value, "must be at least 1", "give a positive number")
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
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)", "set model.dropout=0.0")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


MODELS.add(OTHERS, LlamaConfig, "windlass.models.llama:build")
