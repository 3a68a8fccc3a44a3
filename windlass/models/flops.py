"""How many FLOPs a token costs."""

from __future__ import annotations

from windlass.models.config import LlamaConfig


def model_flops_per_token(cfg: LlamaConfig, vocab_size: int, seq_len: int) -> float:
    """Forward and backward FLOPs that the model needs for one token of a sequence of `seq_len` tokens.

    After PaLM: Scaling Language Modeling with Pathways (2022), appendix B: a weight of a matrix product
    costs 2 FLOPs forward (multiply, add) and 4 backward (gradients of input and of weight), and attention
    adds its two products of activations::

        6 * (num_layers * (q + k + v + o + gate + up + down) + head)  +  6 * num_layers * hidden_size *
        seq_len

    - q and o are `hidden_size ** 2`; k and v are `hidden_size * num_kv_heads * head_dim` (GQA); gate, up
      and down are `hidden_size * intermediate_size`; head is `hidden_size * vocab_size`, tied to the
      embedding or not.
    - The embedding's lookup, norms, rotary embedding, softmax and activation functions are not counted.
    - Attention is causal and **is halved**: a token attends to half of the sequence on average. PaLM's
      appendix does not halve it and has 12 for the last 6; at `seq_len << hidden_size` the two agree. GQA
      shares keys and values but computes as many products as there are query heads. Borders between packed
      documents mask more of it, which is not taken off.
    - Activations that are computed again in the backward pass do not count: this is model, not hardware,
      FLOPs.
    """
    hidden = cfg.hidden_size
    kv_width = cfg.num_kv_heads * cfg.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * cfg.intermediate_size
    matmul_weights = cfg.num_layers * layer + hidden * vocab_size
    return 6.0 * matmul_weights + 6.0 * cfg.num_layers * hidden * seq_len
