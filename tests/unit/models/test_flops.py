"""FLOPs a token against a model that is counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from windlass.models.config import LlamaConfig
from windlass.models.flops import model_flops_per_token


def counted_flops(cfg: LlamaConfig, vocab_size: int, seq_len: int) -> int:
    """Forward and backward FLOPs of one sequence as torch counts them, attention whole."""
    kv_width = cfg.num_kv_heads * cfg.head_dim

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, requires_grad=True)

    x = torch.randn(seq_len, cfg.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = x
        for _ in range(cfg.num_layers):
            q = y @ weight(cfg.hidden_size, cfg.hidden_size)
            k = y @ weight(cfg.hidden_size, kv_width)
            v = y @ weight(cfg.hidden_size, kv_width)
            heads = [t.view(seq_len, -1, cfg.head_dim).transpose(0, 1) for t in (q, k, v)]
            k, v = (t.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, 0) for t in heads[1:])
            out = (heads[0] @ k.transpose(1, 2)).softmax(-1) @ v
            y = out.transpose(0, 1).reshape(seq_len, -1) @ weight(cfg.hidden_size, cfg.hidden_size)
            up = y @ weight(cfg.hidden_size, cfg.intermediate_size)
            up = up * (y @ weight(cfg.hidden_size, cfg.intermediate_size))
            y = up @ weight(cfg.intermediate_size, cfg.hidden_size)
        (y @ weight(cfg.hidden_size, vocab_size)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_the_formula_is_what_torch_counts_less_half_the_attention(num_kv_heads: int) -> None:
    cfg = LlamaConfig(hidden_size=96, intermediate_size=256, num_layers=3, num_heads=6, num_kv_heads=num_kv_heads)
    seq_len, vocab_size = 64, 320
    half_attention = 6 * cfg.num_layers * cfg.hidden_size * seq_len * seq_len
    counted = counted_flops(cfg, vocab_size, seq_len)
    assert model_flops_per_token(cfg, vocab_size, seq_len) * seq_len == counted - half_attention
