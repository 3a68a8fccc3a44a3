from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from windlass.data.batch import IGNORE_INDEX
from windlass.models.spec import Head
from windlass.plan.memory import live_peak
from windlass.plan.recorder import Recorder, Trace
from windlass.train.objectives import cross_entropy as module
from windlass.train.objectives.cross_entropy import cross_entropy_sum

VOCAB, WIDTH = 37, 8


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which do not divide the tokens."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "_MIN_TOKENS", 4)
    monkeypatch.setattr(module, "_ROWS_BYTES", 5 * WIDTH * 2)


def example(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = draw(3, 7, WIDTH).to(dtype), draw(VOCAB, WIDTH), draw(VOCAB)
    labels = torch.randint(0, VOCAB, (3, 7), generator=generator)
    labels[0, :4] = labels[1, 2] = labels[2, 6] = IGNORE_INDEX
    return hidden, Head(*(tensor.to(weight_dtype or dtype) for tensor in (weight, bias))), labels


def whole(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Of all logits at once."""
    logits = head.logits(hidden).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def with_gradients(loss_sum: Any, hidden: Tensor, head: Head, labels: Tensor, factor: float = 0.3) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias."""
    tensors = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    own = replace(head, weight=tensors[1], bias=None if head.bias is None else tensors[2])
    loss = loss_sum(tensors[0], own, labels)
    return [loss.detach(), *torch.autograd.grad(factor * loss, tensors)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.4, None), (1.0, 2.0), (3.0, 1.5)])
def test_it_is_the_loss_of_whole_logits(has_bias: bool, scale: float, soft_cap: float | None) -> None:
    hidden, head, labels = example()
    head = Head(head.weight, head.bias if has_bias else None, scale, soft_cap)
    found = with_gradients(cross_entropy_sum, hidden, head, labels)
    torch.testing.assert_close(found, with_gradients(whole, hidden, head, labels))


@pytest.mark.parametrize("is_one_chunk", [False, True])
@pytest.mark.parametrize("counted", ["all", "some", "one"])
def test_the_labels_that_count_alone_do(counted: str, is_one_chunk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = example(torch.float32)
    if counted == "all":
        labels = labels.clamp(min=0)
    elif counted == "one":
        labels[labels != labels[1, 5]] = IGNORE_INDEX
    if is_one_chunk:
        monkeypatch.setattr(module, "_MIN_TOKENS", 256)
    found = with_gradients(cross_entropy_sum, hidden, head, labels)
    torch.testing.assert_close(found, with_gradients(whole, hidden, head, labels), rtol=1e-5, atol=1e-5)


def test_nothing_to_count_costs_nothing_and_has_gradients_of_zero() -> None:
    hidden, head, labels = example(torch.float32)
    loss, *gradients = with_gradients(cross_entropy_sum, hidden, head, torch.full_like(labels, IGNORE_INDEX))
    assert loss.item() == 0.0
    assert [gradient.shape for gradient in gradients] == [hidden.shape, (VOCAB, WIDTH), (VOCAB,)]
    assert not any(gradient.any() for gradient in gradients)


def test_tokens_that_do_not_count_have_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = example()
    seen = []
    add = module._add_gradients
    monkeypatch.setattr(module, "_add_gradients", lambda *args: (seen.append(len(args[0])), add(*args)))
    with_gradients(cross_entropy_sum, hidden, head, labels)
    assert seen == [4, 4, 4, 3]
    assert sum(seen) == int((labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_halves_are_summed_in_float32(weight_dtype: torch.dtype) -> None:
    hidden, head, labels = example(torch.bfloat16, weight_dtype)
    found = with_gradients(cross_entropy_sum, hidden, head, labels)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, weight_dtype, weight_dtype]
    exact = with_gradients(whole, hidden.double(), Head(head.weight.double(), head.bias.double()), labels)  # type: ignore[union-attr]
    usual = with_gradients(whole, hidden, head, labels)

    def error(tensors: list[Tensor], place: int) -> float:
        return float((tensors[place].double() - exact[place]).norm() / exact[place].norm())

    assert error(found, 0) < 1e-3
    for place in (1, 2, 3):
        assert error(found, place) <= 1.2 * error(usual, place) < 2e-2


def test_equal_logits_cost_the_entropy_of_the_vocabulary() -> None:
    hidden, head, labels = example(torch.float32)
    loss = cross_entropy_sum(torch.zeros_like(hidden), Head(head.weight), labels)
    assert loss.item() == pytest.approx(15 * torch.tensor(float(VOCAB)).log().item())


def test_logits_of_any_size_are_summed() -> None:
    hidden, head, labels = example(torch.float32)
    found = with_gradients(cross_entropy_sum, 1e4 * hidden, head, labels)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0], whole(1e4 * hidden, head, labels))


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = example(torch.float32)
    expected = cross_entropy_sum(hidden, head, labels)
    monkeypatch.setattr(module, "_add_gradients", lambda *args: pytest.fail("made"))
    assert torch.equal(cross_entropy_sum(hidden, head, labels), expected)
    with torch.no_grad():
        found = cross_entropy_sum(hidden.requires_grad_(), Head(head.weight.requires_grad_()), labels)
    assert not found.requires_grad


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_has_a_gradient(trained: str) -> None:
    hidden, head, labels = example()
    own = {"hidden": hidden, "weight": head.weight, "bias": head.bias}[trained].requires_grad_()  # type: ignore[union-attr]
    [found] = torch.autograd.grad(cross_entropy_sum(hidden, head, labels), own)
    [expected] = torch.autograd.grad(whole(hidden, head, labels), own)
    torch.testing.assert_close(found, expected)


def test_a_weight_that_is_used_twice_has_both_gradients() -> None:
    hidden, head, labels = example()
    weight = head.weight.requires_grad_()

    def loss(loss_sum: Any) -> Tensor:
        return loss_sum(hidden + F.embedding(labels.clamp(min=0), weight), Head(weight.view_as(weight)), labels)

    [found] = torch.autograd.grad(loss(cross_entropy_sum), weight)
    [expected] = torch.autograd.grad(loss(whole), weight)
    torch.testing.assert_close(found, expected)


def test_it_has_the_same_bits_again() -> None:
    first, second = (with_gradients(cross_entropy_sum, *example(torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, labels = example()
    loss = cross_entropy_sum(hidden.requires_grad_(), head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps gradients for one"):
        loss.backward()


def peak_bytes(loss_sum: Any, dtype: torch.dtype, num_tokens: int, vocab_size: int, width: int) -> int:
    """The most bytes of tensors that a loss and its gradients take, besides what they are made of."""
    trace = Trace()
    with FakeTensorMode():
        hidden = torch.empty(1, num_tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab_size, width, requires_grad=True)
        labels = torch.zeros(1, num_tokens, dtype=torch.int64)
        with Recorder(trace) as recorder:
            for tensor in (hidden, weight, labels):
                recorder.take(tensor)
            before = live_peak(trace.memory)
            (loss_sum(hidden, Head(weight), labels) / num_tokens).backward()
    return live_peak(trace.memory) - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk_and_of_the_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = (2048, 1 << 17, 512)
    old, new = peak_bytes(whole, dtype, *sizes), peak_bytes(cross_entropy_sum, dtype, *sizes)
    assert new <= 0.3 * old
    num_tokens, vocab_size, width = sizes
    gradients = 4 * vocab_size * width + num_tokens * width * dtype.itemsize
    chunk = module._MIN_TOKENS * vocab_size * 4
    half = 0 if dtype == torch.float32 else chunk // 2 + 2 * vocab_size * width
    assert gradients + chunk + half <= new <= 1.05 * (gradients + chunk + half)
