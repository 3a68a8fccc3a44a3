"""Peaks of devices: published ones, and measured ones."""

from __future__ import annotations

import time

import pytest
import torch

from windlass.machine.peak_flops import (
    measured_matmul_flops,
    peak_device_flops,
    published_peak_flops,
)


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
    monkeypatch.setattr(
        "windlass.machine.peak_flops.measured_matmul_flops", lambda *arguments: asked.append(arguments) or 7.0
    )
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
