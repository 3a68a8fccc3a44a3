"""A Llama-style decoder. Parameter names are those of Hugging Face's Llama without its `model.` prefix.

Weights may be float32 while the pass runs in bfloat16: a module casts its weight to the dtype of its input where it
uses it. Under FSDP2's mixed precision the gathered weight has that dtype already and the cast does nothing, so one
rank and many compute alike.

What `Llama.forward` calls takes a batch or a list of micro-batches, see `micro_batch_fusion`. Each such module is
called once a pass, so that hooks on modules gather or stream its weights once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from windlass.models.attention import Documents, attention
from windlass.models.config import LlamaConfig
from windlass.models.flops import model_flops_per_token
from windlass.models.micro_batch_fusion import MicroBatches, over_micro_batches
from windlass.models.spec import Head, Model, Reduction
from windlass.models.token_wise import token_wise
from windlass.parallel.fragment import Fragment
from windlass.parallel.random import fill_normal_
from windlass.parallel.zero import Unit


class Linear(nn.Linear):
    """`nn.Linear` without bias that computes in its input's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Embedding(nn.Embedding):
    """`nn.Embedding`, micro-batch by micro-batch, of `weight` where one is given in place of its own."""

    def forward(self, input: MicroBatches, weight: MicroBatches | None = None) -> MicroBatches:
        return over_micro_batches(F.embedding, input, self.weight if weight is None else weight)


class LMHead(Linear):
    """The projection on the vocabulary, see `run_head`."""

    def forward(self, input: MicroBatches, reduce: Reduction | list[Reduction] | None = None) -> MicroBatches:
        return run_head(input, self.weight, reduce)


class RMSNorm(nn.Module):
    """Root Mean Square Layer Normalization (2019), in its input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: MicroBatches) -> MicroBatches:
        return over_micro_batches(self._normalize, x)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (RoFormer, 2021) and grouped queries (GQA, 2023)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(query_width, config.hidden_size)

    def project(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (batch, seq_len, heads, head_dim) of `x` (batch, seq_len, hidden)."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rope = rope.unsqueeze(2)  # the same for all heads
        return rotate(query, rope), rotate(key, rope), value

    def mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
    ) -> torch.Tensor:
        """Values weighted by the attention: (batch, seq_len, heads * head_dim)."""
        mixed = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            documents,
            dropout=self.dropout if self.training else 0.0,
        )
        return mixed.flatten(2)


class MLP(nn.Module):
    """SwiGLU (GLU Variants Improve Transformer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer.

    Attributes:
        recompute: backward runs the layer's forward again instead of keeping its activations.
        saved_fraction: the fraction of tokens whose activations are kept, see `token_wise`; None is all.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.recompute = False
        self.saved_fraction: float | None = None
        self.dropout = config.dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: MicroBatches, rope: torch.Tensor, documents: Any) -> MicroBatches:
        """`documents`: of the batch, a list of each micro-batch's, or None."""
        return over_micro_batches(self._forward, x, rope, documents)

    def _forward(self, x: torch.Tensor, rope: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, rope, documents, use_reentrant=False)
        return self.layer(x, rope, documents)

    def layer(self, x: torch.Tensor, rope: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        if self.saved_fraction is not None and torch.is_grad_enabled():
            return token_wise(self, x, rope, documents, self.saved_fraction)
        return self.after_attention(x, self.attention(*self.before_attention(x, rope), documents))

    def before_attention(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
    ) -> torch.Tensor:
        return self.self_attn.mix(query, key, value, documents)

    def after_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output, of its input and of what `attention` made."""
        x = x + self._drop(self.self_attn.o_proj(mixed))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def parameters_before_attention(self) -> list[torch.Tensor]:
        projections = (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        return [self.input_layernorm.weight, *(projection.weight for projection in projections)]

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Llama(Model):
    """LLaMA: Open and Efficient Foundation Language Models (2023).

    Matrices begin as N(0, `init_std`^2), those that write to the residual stream smaller by sqrt(2 * layers) (Language
    Models are Unsupervised Multitask Learners, 2019); norms begin as 1.
    """

    fuses_micro_batches = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the data's tokenizer decides a vocabulary that was left null"
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else LMHead(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: MicroBatches,
        document_ids: MicroBatches | None = None,
        reduce: Reduction | list[Reduction] | None = None,
    ) -> MicroBatches:
        ids = input_ids if isinstance(input_ids, torch.Tensor) else input_ids[0]
        rope = rope_angles(ids.shape[1], self.config.head_dim, self.config.rope_theta, ids.device)
        documents = None if document_ids is None else _documents(document_ids)
        # A tied weight is used first and last. Under a name of its own each micro-batch adds up both gradients before
        # they join the other micro-batches', as they do when a micro-batch is a pass of its own.
        weight = (
            over_micro_batches(lambda _: self.embed_tokens.weight.view_as(self.embed_tokens.weight), input_ids)
            if self.lm_head is None
            else None
        )
        x = self.embed_tokens(input_ids, weight)
        x = over_micro_batches(lambda part: part.to(self.compute_dtype), x)
        for layer in self.layers:
            x = layer(x, rope, documents)
        x = self.norm(x)
        return run_head(x, weight, reduce) if self.lm_head is None else self.lm_head(x, reduce)

    def units(self) -> list[Unit]:
        layers = [Unit([layer]) for layer in self.layers]
        if self.lm_head is None:
            return layers  # a tied embedding is used first and last, so it stays with the model
        return [Unit([self.embed_tokens]), *layers, Unit([self.norm, self.lm_head], is_last=True)]

    def save_activations(self, recompute: bool, saved_fraction: float | None) -> None:
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.recompute, layer.saved_fraction = recompute, saved_fraction

    def compile_blocks(self) -> None:
        for layer in self.layers:
            layer.compile()

    def fill(self, name: str, local: torch.Tensor, fragment: Fragment, seed: int) -> None:
        if len(fragment.global_shape) < 2:
            local.fill_(1.0)
            return
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = self.config.init_std * ((2 * self.config.num_layers) ** -0.5 if writes_residual else 1)
        fill_normal_(local, fragment, seed=seed, std=std)

    def flops_per_token(self, seq_len: int) -> float:
        assert self.config.vocab_size is not None
        return model_flops_per_token(self.config, self.config.vocab_size, seq_len)


def build(config: LlamaConfig, device: str) -> Llama:
    with torch.device(device):
        return Llama(config)


def run_head(x: MicroBatches, weight: Any, reduce: Reduction | list[Reduction] | None) -> MicroBatches:
    """Logits of `x`; or, with `reduce`, what it makes of `x` and the head.

    Args:
        weight: one, or a list of as many as there are micro-batches; so with `reduce`.
    """
    if reduce is None:
        return over_micro_batches(lambda part, own: Head(own).logits(part), x, weight)
    return over_micro_batches(lambda part, own, make: make(part, Head(own)), x, weight, reduce)


def rope_angles(seq_len: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Cosines and sines of the rotary angles, float32 (2, seq_len, head_dim / 2)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + head_dim / 2) of `x` (..., seq_len, head_dim) by its position's angle."""
    cos, sin = rope.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _documents(document_ids: Any) -> Any:
    """The documents of a batch, or of each micro-batch."""
    if isinstance(document_ids, torch.Tensor):
        return Documents.of(document_ids)
    return [Documents.of(ids) for ids in document_ids]
