"""Tiny models of transformers' families, as folders that their `save_pretrained` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.runs import lock, shared_folder

VOCAB = 320
"""More than the byte tokenizer has."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", SIZES),
    "gpt2": ("GPT2Config", {**GPT2, **NO_DROPOUT, "eos_token_id": 2}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    # Of each of these one thing more is its own.
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 16, "sliding_window": 24}),
    "cohere": ("CohereConfig", SIZES),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 4.0}),
    "phi": ("PhiConfig", {**SIZES, "num_key_value_heads": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
}
FAMILIES = list(CONFIGS)[:9]
MORE = list(CONFIGS)[9:]


def config_of(family: str) -> Any:
    import transformers

    name, fields = CONFIGS[family]
    return getattr(transformers, name)(**fields)


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers, whose norms and biases are no constants."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def folder_of(family: str) -> Path:
    """The folder of a family, written once a session."""
    folder = shared_folder() / "hf" / family
    if not (folder / "config.json").exists():
        with lock(shared_folder() / f"hf-{family}.lock"):
            if not (folder / "config.json").exists():
                build(family).save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> Any:
    """What transformers makes of a folder."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()
