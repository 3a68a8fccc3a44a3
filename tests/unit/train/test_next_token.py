from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.losses import count_tokens, forward_loss_sum

from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.models.spec import Head, Reduction
from windlass.train.objectives.next_token import cross_entropy_sum


def example(batch: int = 2, seq_len: int = 5, vocab_size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, seq_len, vocab_size, generator=generator)
    return logits, torch.randint(0, vocab_size, (batch, seq_len), generator=generator)


def test_it_is_the_sum_of_the_negative_log_probabilities_of_labels_that_count() -> None:
    logits, labels = example()
    labels[0, 1] = labels[1, 4] = IGNORE_INDEX
    log_probabilities = logits.log_softmax(-1)
    expected = -sum(
        log_probabilities[row, column, labels[row, column]]
        for row in range(2)
        for column in range(5)
        if labels[row, column] != IGNORE_INDEX
    )
    torch.testing.assert_close(cross_entropy_sum(logits, labels), expected)


def test_equal_logits_cost_the_entropy_of_the_vocabulary() -> None:
    _, labels = example()
    loss = cross_entropy_sum(torch.zeros(2, 5, 7), labels)
    assert loss.item() == pytest.approx(10 * torch.tensor(7.0).log().item())


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = example()
    loss = cross_entropy_sum(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy_sum(logits.bfloat16().float(), labels), rtol=0, atol=0)


def test_nothing_to_count_costs_nothing_and_has_a_gradient_of_zero() -> None:
    logits, labels = example()
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=0, max_size=4))
def test_tokens_that_count_are_counted(counts: list[list[bool]]) -> None:
    batches = []
    for row in counts:
        labels = torch.tensor([[3 if is_counted else IGNORE_INDEX for is_counted in row]])
        batches.append(Batch(labels, labels, labels))
    assert count_tokens(batches) == sum(sum(row) for row in counts)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_documents_are_masked_only_where_wanted(mask_documents: bool) -> None:
    logits, labels = example()
    documents = torch.zeros_like(labels)
    seen = []

    class Model(torch.nn.Module):
        def forward(
            self, input_ids: torch.Tensor, document_ids: torch.Tensor | None, reduce: Reduction
        ) -> torch.Tensor:
            seen.append(document_ids)
            return reduce(logits, Head(torch.eye(logits.shape[-1])))

    loss = forward_loss_sum(Model(), Batch(labels, labels, documents), mask_documents)
    assert seen[0] is (documents if mask_documents else None)
    assert torch.equal(loss, cross_entropy_sum(logits, labels))
