"""The Llama of windlass in the terms of Hugging Face's: names of weights and the fields of config.json."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from windlass.checkpoint.durable.storage import Location
from windlass.errors import ConfigError
from windlass.models.config import LlamaConfig
from windlass.text import override
from windlass.untrusted import Malformed, convert

Shapes = Mapping[str, tuple[int, ...]]
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
PREFIX = "model."
ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""A buffer of old exports; rope_theta says the same."""


def huggingface_name(name: str) -> str:
    """The name in Hugging Face's Llama of the weight that `windlass.models.llama.Llama` calls `name`."""
    return name if name == HEAD else PREFIX + name


def windlass_name(name: str) -> str:
    """The inverse of `huggingface_name`."""
    return name if name == HEAD else name.removeprefix(PREFIX)


def check_weights(path: Location, model: LlamaConfig, found: Shapes) -> None:
    """Raises ConfigError unless `found` names the weights of `model`, with their shapes."""
    if model.num_layers > len(found):  # before so many are made
        raise _other_weights(path, [f"it has {len(found)} weights, fewer than the {model.num_layers} layers"])
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in model.build().state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:  # no tensor has so many elements
        raise _other_weights(path, [f"a weight cannot be so large ({str(error).partition(chr(10))[0]})"]) from None
    check_expected(path, expected, found)


def check_expected(path: Location, expected: Shapes, found: Shapes) -> None:
    """Raises ConfigError unless the weights that were found are those that are expected, with their shapes."""
    differences = weight_differences(expected, found)
    if differences:
        raise _other_weights(path, differences)


def weight_differences(expected: Shapes, found: Shapes) -> list[str]:
    """The differences of the weights that were found: missing, too many, of another shape; each as a clause."""
    differences = [f"it has no {name}" for name in expected if name not in found]
    differences += [f"it has {name}, which this model has not" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return differences


def _other_weights(path: Location, differences: list[str]) -> ConfigError:
    more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
    return ConfigError(
        "path",
        path,
        f"its weights are not those that its configuration describes: {'; '.join(differences[:3])}{more}",
        "check that the configuration and the weights are of the same model",
    )


def to_huggingface(config: LlamaConfig, seq_len: int | None, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """Returns the config.json of a model.

    Args:
        seq_len: that the model was trained with, if it is known. It bounds nothing: rotary positions have no end.
        dtype: of the exported weights, as torch names it.
        eos_id: the token that ends a document, if it is known.
    """
    positions = {} if seq_len is None else {"max_position_embeddings": seq_len}
    return {
        **positions,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks for it; 5 has it below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,  # and not the ones that LlamaConfig would assume
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def tokenizer_config(eos_token: str | None, seq_len: int | None) -> dict[str, Any]:
    """Returns the tokenizer_config.json with which transformers takes tokenizer.json as it is.

    Without it transformers takes the tokenizer for one of Llama 2, and adds its special tokens beyond the vocabulary.
    """
    length = {} if seq_len is None else {"model_max_length": seq_len}
    return {
        **length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }


def from_huggingface(config: Mapping[str, Any], path: Path) -> LlamaConfig:
    """The model that a config.json describes, with the defaults of transformers' LlamaConfig.

    Raises:
        ConfigError: it is no Llama, or one that `windlass.models.llama.Llama` cannot be.
    """
    if config.get("model_type") != "llama":
        raise _refusal(path, f"model_type={reprlib.repr(config.get('model_type'))}, and only 'llama' is imported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _refusal(path, f"rotary positions of {reprlib.repr(rope)}, and this Llama has only plain ones")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _refusal(path, f"rotary positions of type {reprlib.repr(kind)}, and this Llama has only plain ones")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, plain) != plain:
            raise _refusal(path, f"{key}={reprlib.repr(config[key])}, and this Llama has only {plain!r}")
    try:
        num_heads = config["num_attention_heads"]
        fields = {
            "name": "llama",
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": num_heads,
            "num_kv_heads": config.get("num_key_value_heads") or num_heads,
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "init_std": config.get("initializer_range", 0.02),
        }
        model = convert(fields, LlamaConfig)
        convert(model.vocab_size, int, "vocab_size")
    except KeyError as error:
        raise _refusal(path, f"no {error.args[0]}") from None
    except Malformed as error:
        raise _refusal(path, f"a value that is none ({error})") from None
    head_dim = config.get("head_dim") or model.head_dim
    if head_dim != model.head_dim:
        raise _refusal(
            path, f"head_dim={reprlib.repr(head_dim)}, and this Llama has hidden_size / heads = {model.head_dim}"
        )
    return model


def overrides(config: LlamaConfig) -> list[str]:
    """The arguments of `windlass train` that make this model, as a shell takes them."""
    fields = asdict(config).items()
    return ["model=tiny", *(override(f"model.{key}", value) for key, value in fields if key != "name")]


def _refusal(path: Path, what: str) -> ConfigError:
    return ConfigError("path", path / "config.json", f"has {what}", "import another model, or convert it first")
