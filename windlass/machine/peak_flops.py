"""The peak FLOP/s of devices, which MFU is held against."""

from __future__ import annotations

import re
import time

import torch

MEASURE_BUDGET_S = 0.2
"""About how long `measured_matmul_flops` takes."""

_GPU_PEAKS: list[tuple[str, dict[torch.dtype, float]]] = [
    # Name -> dense tensor-core FLOP/s with fp32 accumulation, and fp32 outside tensor cores (TF32 off), as in
    # NVIDIA's and AMD's data sheets and architecture white papers. "With sparsity" figures there are halved
    # here.
    (name, {torch.bfloat16: bf16, torch.float16: bf16, torch.float32: fp32})
    for name, bf16, fp32 in (
        (r"\bGB200\b", 2.5e15, 80e12),
        (r"\bB200\b", 2.25e15, 75e12),
        (r"\bGH200\b", 989.4e12, 66.9e12),
        (r"\bH200 NVL\b", 835e12, 60e12),
        (r"\bH200\b", 989.4e12, 66.9e12),
        (r"\bH100 PCIe\b", 756e12, 51.2e12),
        (r"\bH100 NVL\b", 835e12, 60e12),
        (r"\bH100\b", 989.4e12, 66.9e12),
        (r"\bH800 PCIe\b", 756e12, 51.2e12),
        (r"\bH800\b", 989.4e12, 66.9e12),
        (r"\bH20\b", 148e12, 44e12),
        (r"\bA[18]00\b", 312e12, 19.5e12),
        (r"\bA40\b", 149.7e12, 37.4e12),
        (r"\bA30\b", 165e12, 10.3e12),
        (r"\bA10\b", 125e12, 31.2e12),
        (r"\bL40S\b", 362.05e12, 91.6e12),
        (r"\bL40\b", 181.05e12, 90.5e12),
        (r"\bL4\b", 121e12, 30.3e12),
        (r"\bRTX 6000 Ada\b", 364.2e12, 91.1e12),
        (r"\bRTX A6000\b", 154.8e12, 38.7e12),
        (r"\bRTX 5090\b(?! (?:D|Laptop))", 209.5e12, 104.8e12),
        (r"\bRTX 4090\b(?! (?:D|Laptop))", 165.2e12, 82.6e12),
        (r"\bRTX 3090 Ti\b", 80e12, 40e12),
        (r"\bRTX 3090\b", 71e12, 35.6e12),
        (r"\bMI300X\b", 1307.4e12, 163.4e12),
    )
] + [
    # Volta and Turing have no bfloat16 units: a run in bfloat16 there is held against what it measures.
    (r"\bV100-SXM[23]\b", {torch.float16: 125e12, torch.float32: 15.7e12}),
    (r"\bV100-PCIE\b", {torch.float16: 112e12, torch.float32: 14e12}),
    (r"\bT4\b", {torch.float16: 65e12, torch.float32: 8.1e12}),
]


def peak_device_flops(device: torch.device, dtype: torch.dtype, num_threads: int | None = None) -> float:
    """The FLOP/s of matrix products that one device can do at best in `dtype`: the 100 % of MFU.

    A GPU whose name is known has its published dense peak, fp32 with TF32 off. Any other GPU is measured by
    `measured_matmul_flops`. A CPU is, too, with one thread, and that times `num_threads` is its peak: threads that
    wait for each other beside other programs would measure the load and not the machine, and put MFU far above
    100 %. On a CPU, MFU is so relative to the matrix product that this machine does, and not to a data sheet.

    Args:
        num_threads: threads of a CPU that this rank computes with; None is torch's setting.
    """
    if device.type == "cpu":
        return (num_threads or torch.get_num_threads()) * measured_matmul_flops(device, dtype, 1)
    if device.type == "cuda":
        published = published_peak_flops(torch.cuda.get_device_name(device), dtype)
        if published is not None:
            return published
    return measured_matmul_flops(device, dtype)


def published_peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The published peak of the GPU that calls itself `device_name`, FLOP/s; None if it is not known."""
    for pattern, peaks in _GPU_PEAKS:
        if re.search(pattern, device_name):
            return peaks.get(dtype)
    return None


def measured_matmul_flops(
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int | None = None,
    budget_s: float = MEASURE_BUDGET_S,
) -> float:
    """FLOP/s of the fastest square matrix product seen within about `budget_s` seconds.

    Products double in size from 512 while the next should fit into the time left, so that slow and fast devices
    are both timed at a size that suits them; smaller ones mostly wait for their threads where other programs use
    the cores. The best of all counts, since noise only slows down.
    """
    threads_before = torch.get_num_threads()
    if num_threads is not None and device.type == "cpu":
        torch.set_num_threads(num_threads)
    try:
        deadline = time.perf_counter() + budget_s
        best, size = 0.0, 512
        _matmul_s(*_operands(64, device, dtype))  # the first call picks kernels and starts threads
        a, b = _operands(size, device, dtype)
        while True:
            elapsed = _matmul_s(a, b)
            best = max(best, 2.0 * size**3 / elapsed)
            left = deadline - time.perf_counter()
            if left < elapsed:
                return best
            if 8 * elapsed < left and size < 16384:
                size *= 2
                a, b = _operands(size, device, dtype)
    finally:
        torch.set_num_threads(threads_before)


def _operands(size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two [size, size] matrices. Constant ones: drawing random numbers would cost more than the product."""
    return (
        torch.full((size, size), 0.5, device=device, dtype=dtype),
        torch.full((size, size), 0.25, device=device, dtype=dtype),
    )


def _matmul_s(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of `a @ b`, to its end on the device."""
    _synchronize(a.device)
    begin = time.perf_counter()
    torch.mm(a, b)
    _synchronize(a.device)
    return max(time.perf_counter() - begin, 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
