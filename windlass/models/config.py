"""Which model. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from windlass.bounds import bounded, check_bounds
from windlass.errors import require
from windlass.registry import OTHERS, Registry

if TYPE_CHECKING:
    from windlass.models.spec import Model

MODELS = Registry("model")


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


MODELS.add(OTHERS, LlamaConfig, "windlass.models.llama:build")
