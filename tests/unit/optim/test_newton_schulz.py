from __future__ import annotations

import pytest
import torch

from windlass.optim.newton_schulz import COEFFICIENTS, newton_schulz

SHAPES = [(48, 48), (48, 64), (40, 200), (200, 40), (1, 30), (30, 1)]


def plain(matrix: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The iteration as it is written, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def with_spectrum(shape: tuple[int, int], smallest: float, seed: int = 0) -> torch.Tensor:
    """Singular values spaced evenly in log from 1 to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    short = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], short, generator=generator)).Q
    return left * torch.logspace(0, torch.tensor(smallest).log10().item(), short) @ right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 5, 7, 10])
def test_float32_is_the_plain_iteration(shape: tuple[int, int], num_steps: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrix[None], num_steps=num_steps, dtype=torch.float32)[0]
    # Each step multiplies rounding errors by up to a = 3.4, in directions whose singular values still grow.
    torch.testing.assert_close(found.double(), plain(matrix, num_steps), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_close_to_it(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(shape, 0.05)
    found = newton_schulz(matrix[None])[0]
    assert found.dtype == torch.bfloat16
    expected = plain(matrix, 5)
    assert float((found.double() - expected).norm() / expected.norm()) < 0.05  # seen: 0.037; one rounding is 2^-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also those of ill-conditioned matrices, and as far as one that is 1% of the norm."""
    values = torch.linalg.svdvals(newton_schulz(with_spectrum(shape, 0.05)[None], dtype=dtype)[0].float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (1024, 256)])
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_rounding_does_not_blow_small_singular_values_up(shape: tuple[int, int], smallest: float) -> None:
    values = torch.linalg.svdvals(newton_schulz(with_spectrum(shape, smallest)[None])[0].float())
    assert float(values.max()) < 1.25
    assert int((values > 0.65).sum()) > 0.4 * 256 * min(1.0, 3 / -torch.tensor(smallest).log10().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_stacked_matrices_are_as_single_ones(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    together = newton_schulz(matrices)
    for index in range(3):
        assert torch.equal(together[index], newton_schulz(matrices[index : index + 1])[0])


def test_zeros_stay_zeros_and_none_stay_none() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 9)), torch.zeros(2, 4, 9, dtype=torch.bfloat16))
    assert newton_schulz(torch.zeros(0, 4, 9)).shape == (0, 4, 9)


def test_the_matrices_are_not_written_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrices = torch.ones(1, 4, 9, dtype=dtype)
        newton_schulz(matrices, dtype=dtype)
        assert torch.equal(matrices, torch.ones(1, 4, 9, dtype=dtype))
