"""A Llama-style decoder. Parameter names are those of Hugging Face's Llama without its `model.` prefix.

Weights may be float32 while the pass runs in bfloat16: a module casts its weight to the dtype of its input where it
uses it. Under FSDP2's mixed precision the gathered weight has that dtype already and the cast does nothing, so one
rank and many compute alike.

What `Llama.forward` calls takes a batch or a list of micro-batches, see `micro_batch_fusion`. Each such module is
called once a pass, so that hooks on modules gather or stream its weights once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from windlass.errors import require
from windlass.models.config import ModelConfig
from windlass.models.loss import cross_entropy_sum
from windlass.models.micro_batch_fusion import MicroBatches, over_micro_batches
from windlass.models.token_wise import token_wise
from windlass.parallel.fragment import fragment_of, local_tensor
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


class Head(Linear):
    """The projection on the vocabulary, see `run_head`."""

    def forward(
        self, input: MicroBatches, labels: MicroBatches | None = None, keep_logits: bool = True
    ) -> MicroBatches:
        return run_head(input, self.weight, labels, keep_logits)


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

    def __init__(self, config: ModelConfig) -> None:
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
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Values weighted by the attention: (batch, seq_len, heads * head_dim)."""
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU (GLU Variants Improve Transformer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = False
        self.saved_fraction: float | None = None
        self.dropout = config.dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: MicroBatches, rope: torch.Tensor, mask: MicroBatches | None) -> MicroBatches:
        return over_micro_batches(self._forward, x, rope, mask)

    def _forward(self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, rope, mask, use_reentrant=False)
        return self.layer(x, rope, mask)

    def layer(self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.saved_fraction is not None and torch.is_grad_enabled():
            return token_wise(self, x, rope, mask, self.saved_fraction)
        return self.after_attention(x, self.attention(*self.before_attention(x, rope), mask))

    def before_attention(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.self_attn.mix(query, key, value, mask)

    def after_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output, of its input and of what `attention` made."""
        x = x + self._drop(self.self_attn.o_proj(mixed))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def parameters_before_attention(self) -> list[torch.Tensor]:
        projections = (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        return [self.input_layernorm.weight, *(projection.weight for projection in projections)]

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Llama(nn.Module):
    """LLaMA: Open and Efficient Foundation Language Models (2023).

    Attributes:
        compute_dtype: the dtype of the forward and backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the data's tokenizer decides a vocabulary that was left null"
        self.config = config
        self.compute_dtype = torch.float32
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else Head(config.hidden_size, config.vocab_size)

    @staticmethod
    def on_meta(config: ModelConfig) -> Llama:
        """A model without storage, to be cut and then given weights by `materialize`."""
        with torch.device("meta"):
            return Llama(config)

    def forward(
        self,
        input_ids: MicroBatches,
        document_ids: MicroBatches | None = None,
        labels: MicroBatches | None = None,
        keep_logits: bool = True,
    ) -> MicroBatches:
        """Logits of the next token, or the summed loss. Lists of micro-batches give the list of theirs.

        Args:
            input_ids: int64 (batch, seq_len).
            document_ids: int (batch, seq_len); a token attends only to those of its own document. None: to all before.
            labels: int64 (batch, seq_len), `IGNORE_INDEX` does not count. Without them logits are what is wanted.
            keep_logits: see `run_head`.

        Returns:
            (batch, seq_len, vocab_size) in `compute_dtype`; with `labels` what `cross_entropy_sum` makes of it.
        """
        ids = input_ids if isinstance(input_ids, torch.Tensor) else input_ids[0]
        rope = rope_angles(ids.shape[1], self.config.head_dim, self.config.rope_theta, ids.device)
        mask = None if document_ids is None else over_micro_batches(document_mask, document_ids)
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
            x = layer(x, rope, mask)
        x = self.norm(x)
        if self.lm_head is None:
            return run_head(x, weight, labels, keep_logits)
        return self.lm_head(x, labels, keep_logits)

    def units(self) -> list[Unit]:
        """What to gather and free together when the model is cut; what no unit names goes with the model itself."""
        layers = [Unit([layer]) for layer in self.layers]
        if self.lm_head is None:
            return layers  # a tied embedding is used first and last, so it stays with the model
        return [Unit([self.embed_tokens]), *layers, Unit([self.norm, self.lm_head], is_last=True)]

    def prepare(
        self, dtype: torch.dtype, recompute: bool, compile_blocks: bool, saved_fraction: float | None = None
    ) -> None:
        """Sets how the passes run. To be called before the model is cut.

        Args:
            dtype: of the passes.
            recompute: keep of a layer its input alone.
            compile_blocks: with `torch.compile`.
            saved_fraction: keep of a layer its input, what the attention gives, and the rest for this fraction of the
                tokens.

        Raises:
            ConfigError: `saved_fraction` with `recompute`, which keeps less, or with `compile_blocks`, which cannot
                take it.
        """
        for key, value in (("train.activation_checkpoint", recompute), ("train.compile", compile_blocks)):
            require(
                saved_fraction is None or not value,
                key,
                "full" if value is recompute else value,
                f"cannot be combined with train.activation_fraction={saved_fraction}",
                f"leave {key} at its default",
            )
        self.compute_dtype = dtype
        self.save_activations(recompute, saved_fraction)
        if compile_blocks:
            for layer in self.layers:
                layer.compile()

    def save_activations(self, recompute: bool, saved_fraction: float | None) -> None:
        """Sets what backward keeps, as `prepare` does; between steps, and whether the model is cut or not."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.recompute, layer.saved_fraction = recompute, saved_fraction

    @torch.no_grad()
    def materialize(
        self, device: torch.device, seed: int, filled: Callable[[list[nn.Parameter]], None] | None = None
    ) -> None:
        """Gives a model on the meta device, whole or cut, its first weights.

        Matrices are N(0, `init_std`^2), those that write to the residual stream smaller by sqrt(2 * layers)
        (Language Models are Unsupervised Multitask Learners, 2019); norms are 1. They depend on `seed` and the
        parameters' names alone, so every cut starts from the same model.

        Args:
            filled: called with a unit's parameters as soon as they have their weights, last with those of no unit; it
                may take their memory away before the next unit gets any.
        """
        residual_scale = (2 * self.config.num_layers) ** -0.5
        name_of_module = {module: name for name, module in self.named_modules()}
        modules = [[module for part in unit.modules for module in part.modules()] for unit in self.units()]
        in_units = {module for unit in modules for module in unit}
        for unit in (*modules, [module for module in self.modules() if module not in in_units]):
            for module in unit:
                module.to_empty(device=device, recurse=False)
            parameters = {
                f"{name_of_module[module]}.{name}": parameter
                for module in unit
                for name, parameter in module.named_parameters(recurse=False)
            }
            for name, parameter in parameters.items():
                local = local_tensor(parameter)
                if parameter.ndim < 2:
                    local.fill_(1.0)
                    continue
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = self.config.init_std * (residual_scale if writes_residual else 1)
                fill_normal_(local, fragment_of(name, parameter), seed=seed, std=std)
            if filled is not None:
                filled(list(parameters.values()))


def run_head(x: MicroBatches, weight: Any, labels: MicroBatches | None, keep_logits: bool) -> MicroBatches:
    """Logits of `x`; or, with `labels`, their summed cross-entropy.

    Args:
        weight: one, or a list of as many as there are micro-batches.
        keep_logits: until backward, where there are `labels`; of several micro-batches those of the first, which is the
            last to run forward and the first backward. The others' are computed again.
    """
    if labels is None:
        return over_micro_batches(lambda part, own: F.linear(part, own.to(part.dtype)), x, weight)
    recompute = not keep_logits if isinstance(x, torch.Tensor) else [not keep_logits, *(True for _ in x[1:])]
    return over_micro_batches(_loss_sum_or_checkpoint, x, weight, labels, recompute)


def _loss_sum_or_checkpoint(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, recompute: bool
) -> torch.Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(_loss_sum, x, weight, labels, use_reentrant=False, preserve_rng_state=False)
    return _loss_sum(x, weight, labels)


def _loss_sum(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(F.linear(x, weight.to(x.dtype)), labels)


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


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Which token may attend to which: bool (batch, 1, seq_len, seq_len), the same document and not later."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
