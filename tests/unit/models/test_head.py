from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from windlass.models.spec import Head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_dtype_of_what_they_are_made_of(dtype: torch.dtype) -> None:
    hidden, weight, bias = torch.randn(2, 3, 4, dtype=dtype), torch.randn(7, 4), torch.randn(7)
    assert torch.equal(Head(weight).logits(hidden), F.linear(hidden, weight.to(dtype)))
    assert torch.equal(Head(weight, bias).logits(hidden), F.linear(hidden, weight.to(dtype), bias.to(dtype)))


def test_they_are_scaled_with_their_bias_and_then_capped() -> None:
    hidden, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    scaled = (hidden @ weight.T + bias) * 3.0
    torch.testing.assert_close(Head(weight, bias, scale=3.0).logits(hidden), scaled)
    torch.testing.assert_close(Head(weight, bias, 3.0, soft_cap=2.0).logits(hidden), 2.0 * (scaled / 2.0).tanh())
