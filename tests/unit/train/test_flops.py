"""FLOPs a token against a model that is counted, and the peaks that they are held against."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from windlass.train.config import ModelConfig
from windlass.train.flops import (
    measured_matmul_flops,
    model_flops_per_token,
    peak_device_flops,
    published_peak_flops,
)


def counted_flops(cfg: ModelConfig, vocab_size: int, seq_len: int) -> int:
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
    cfg = ModelConfig(hidden_size=96, intermediate_size=256, num_layers=3, num_heads=6, num_kv_heads=num_kv_heads)
    seq_len, vocab_size = 64, 320
    half_attention = 6 * cfg.num_layers * cfg.hidden_size * seq_len * seq_len
    counted = counted_flops(cfg, vocab_size, seq_len)
    assert model_flops_per_token(cfg, vocab_size, seq_len) * seq_len == counted - half_attention


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 66.9e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA B200", torch.bfloat16, 2.25e15),
        ("NVIDIA GB200", torch.bfloat16, 2.5e15),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362.05e12),
        ("NVIDIA L40", torch.bfloat16, 181.05e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090", torch.float32, 35.6e12),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float32, 40e12),
        ("Tesla V100-SXM2-32GB", torch.float32, 15.7e12),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
        ("A card nobody knows", torch.float32, None),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert published_peak_flops(name, dtype) == peak


def test_a_cpu_is_measured_soon_and_leaves_the_threads_alone() -> None:
    device, threads = torch.device("cpu"), torch.get_num_threads()
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    begin = time.perf_counter()
    peak = peak_device_flops(device, torch.float32, num_threads=1)
    assert time.perf_counter() - begin < 2.0  # 0.2 s on a machine that does nothing else
    assert torch.get_num_threads() == threads
    # A product of another size, timed here, is within a few times of it: the machine is shared.
    a = torch.ones(768, 768)
    torch.set_num_threads(1)
    try:
        rates = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ a
            rates.append(2 * 768**3 / (time.perf_counter() - begin))
    finally:
        torch.set_num_threads(threads)
    assert max(rates) / 8 < peak < max(rates) * 8


def test_an_unknown_gpu_and_one_thread_of_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card nobody knows")
    monkeypatch.setattr("windlass.train.flops.measured_matmul_flops", lambda *arguments: asked.append(arguments) or 7.0)
    device = torch.device("cuda", 0)
    assert peak_device_flops(device, torch.bfloat16, 4) == 7.0
    assert asked == [(device, torch.bfloat16)]
    assert peak_device_flops(torch.device("cpu"), torch.float32, 4) == 4 * 7.0
    assert asked[1:] == [(torch.device("cpu"), torch.float32, 1)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_device_flops(device, torch.bfloat16) == 121e12


def test_a_larger_budget_does_not_measure_less() -> None:
    rate = measured_matmul_flops(torch.device("cpu"), torch.float32, 1, budget_s=0.01)
    assert rate > 1e8
