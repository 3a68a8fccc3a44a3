from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.losses import count_tokens, forward_loss_sum

from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.models.spec import Head, Reduction
from windlass.train.objectives.cross_entropy import cross_entropy_sum


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=0, max_size=4))
def test_tokens_that_count_are_counted(counts: list[list[bool]]) -> None:
    batches = []
    for row in counts:
        labels = torch.tensor([[3 if is_counted else IGNORE_INDEX for is_counted in row]])
        batches.append(Batch(labels, labels, labels))
    assert count_tokens(batches) == sum(sum(row) for row in counts)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_documents_are_masked_only_where_wanted(mask_documents: bool) -> None:
    hidden, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    documents, head = torch.zeros_like(labels), Head(torch.eye(7))
    seen = []

    class Model(torch.nn.Module):
        def forward(
            self, input_ids: torch.Tensor, document_ids: torch.Tensor | None, reduce: Reduction
        ) -> torch.Tensor:
            seen.append(document_ids)
            return reduce(hidden, head)

    loss = forward_loss_sum(Model(), Batch(labels, labels, documents), mask_documents)
    assert seen[0] is (documents if mask_documents else None)
    assert torch.equal(loss, cross_entropy_sum(hidden, head, labels))
