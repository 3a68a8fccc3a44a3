"""Whole documents packed into samples: each once, none cut, and what a label is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.data.batch import IGNORE_INDEX
from windlass.data.config import Borders, ChatDataConfig, Packing, TooLong
from windlass.data.loader import Loader, evaluation_batches, make_batch
from windlass.data.samples import PackedDocuments, build_samples
from windlass.errors import DataError, IncompatibleCheckpoint
from windlass.models.config import LlamaConfig
from windlass.train.objectives.config import NextTokenConfig

EOS = 7
LENGTHS = [5, 3, 8, 1, 2, 9, 4, 4, 4, 30, 8, 1, 1, 6, 2, 7, 5, 3]


class Documents:
    """What `PackedDocuments` needs of a dataset: token j of document i is 100 * i + j + 10."""

    split, eos_id, max_token_id, num_tokens, fingerprint, folder = "train", EOS, 10**6, 0, "f", Path()

    def __init__(self, lengths: Sequence[int], targets: Callable[[int, int], bool] = lambda i, j: j % 3 != 1) -> None:
        self._starts = np.cumsum([0, *lengths])
        self.num_tokens = int(self._starts[-1])
        self._tokens = np.concatenate([100 * i + 10 + np.arange(n) for i, n in enumerate(lengths)])
        self._targets = np.array([targets(i, j) for i, n in enumerate(lengths) for j in range(n)], dtype=np.uint8)

    def document_starts(self) -> np.ndarray:
        return self._starts

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[start : start + length], np.zeros(length, np.int32)

    def targets(self, start: int, length: int) -> np.ndarray:
        return self._targets[start : start + length]


def read(samples: PackedDocuments, number: int, seq_len: int) -> tuple[list[int], list[int], list[bool]]:
    tokens, documents = np.zeros(seq_len + 1, np.int64), np.zeros(seq_len + 1, np.int32)
    counts = np.ones(seq_len + 1, bool)
    samples.read(number, tokens, documents, counts)
    return tokens.tolist(), documents.tolist(), counts.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 40), st.sampled_from(Packing))
def test_each_document_once_and_none_cut(lengths: list[int], seq_len: int, packing: Packing) -> None:
    dataset: Any = Documents(lengths)
    fitting = [i for i, n in enumerate(lengths) if n <= seq_len]
    if not fitting:
        with pytest.raises(DataError, match=r"train\.seq_len=.*no train conversation is left"):
            PackedDocuments(dataset, seq_len, packing, TooLong.drop)
        return
    samples = PackedDocuments(dataset, seq_len, packing, TooLong.drop)
    assert samples.figures.num_dropped == len(lengths) - len(fitting)
    seen, fills = [], []
    for number in range(samples.num_samples):
        tokens, documents, counts = read(samples, number, seq_len)
        assert tokens[-1] == EOS, "no window is over T"
        real = [(token, document) for token, document in zip(tokens, documents, strict=True) if token != EOS]
        numbers = sorted({token // 100 for token, _ in real})
        assert [t for t, _ in real] == [100 * i + 10 + j for i in numbers for j in range(lengths[i])], "whole, in order"
        assert [d for _, d in real] == [k for k, i in enumerate(numbers) for _ in range(lengths[i])]
        assert set(documents[len(real) :]) == {len(numbers)}, "padding is a document of its own"
        assert counts == [t != EOS and (t - 10) % 100 % 3 != 1 and (t - 10) % 100 > 0 for t in tokens]
        seen += numbers
        fills.append(len(real))
    assert seen == fitting
    assert samples.figures.fill_fraction == pytest.approx(sum(fills) / (seq_len * len(fills)))
    if packing == Packing.none:
        assert samples.num_samples == len(fitting)
    for number in range(samples.num_samples - 1 if packing == Packing.documents else 0):
        first_of_next = read(samples, number + 1, seq_len)[0][0] // 100
        assert fills[number] + lengths[first_of_next] > seq_len, "the next one would not have fitted"


def test_documents_that_are_too_long() -> None:
    dataset: Any = Documents(LENGTHS, lambda i, j: j >= 2)
    truncated = PackedDocuments(dataset, 8, Packing.none, TooLong.truncate)
    figures = truncated.figures
    assert (figures.num_documents, figures.num_truncated, figures.num_dropped) == (len(LENGTHS), 2, 0)
    assert read(truncated, 9, 8)[0] == [*range(910, 918), EOS]
    with pytest.raises(DataError, match=r"data\.too_long=error: 2 of the 18 train conversations.*longest has 30 tok"):
        PackedDocuments(dataset, 8, Packing.none, TooLong.error)
    PackedDocuments(dataset, 30, Packing.none, TooLong.error)
    late: Any = Documents([5, 20, 20], lambda i, j: i != 1 or j >= 8)
    samples = PackedDocuments(late, 8, Packing.documents, TooLong.truncate)
    assert (samples.figures.num_truncated, samples.figures.num_dropped) == (1, 1), "what has no answer left goes"
    nothing: Any = Documents([20, 20], lambda i, j: j >= 8)
    with pytest.raises(
        DataError, match=r"no train conversation is left: 2 of 2 are longer, and have no answer in what"
    ):
        PackedDocuments(nothing, 8, Packing.documents, TooLong.truncate)


def test_batches_of_packed_documents() -> None:
    dataset: Any = Documents(LENGTHS)
    samples = PackedDocuments(dataset, 10, Packing.documents, TooLong.truncate)
    options: Any = {"batch_size": samples.num_samples, "seq_len": 10, "data_rank": 0, "num_data_ranks": 1}
    for borders in Borders:
        loader = Loader(dataset, seed=0, shuffle=False, borders=borders, samples=samples, **options)
        batch = next(loader)
        loader.close()
        inputs, labels = batch.input_ids, batch.labels
        counted = labels != IGNORE_INDEX
        assert (labels[counted] == inputs[counted] + 1).all(), "never across documents, whatever the borders"
        assert ((labels[counted] - 10) % 100 % 3 != 1).all()
        expected = sum((j % 3 != 1) for n in LENGTHS for j in range(1, min(n, 10)))
        assert int(counted.sum()) == expected
        assert (inputs[batch.document_ids == batch.document_ids[:, -1:]][-1] == EOS).all()


def test_one_then_three_ranks_see_each_sample_once() -> None:
    dataset: Any = Documents([1 + i % 9 for i in range(200)])
    samples = PackedDocuments(dataset, 10, Packing.documents, TooLong.truncate)
    seen: list[bytes] = []
    state = None
    for world_size, batch_size, num_steps in ((1, 3, 5), (3, 2, 4), (2, 1, 140)):
        loaders = [
            Loader(dataset, batch_size=batch_size, seq_len=10, data_rank=rank, num_data_ranks=world_size, seed=5,
                   samples=samples, prefetch=3)
            for rank in range(world_size)
        ]  # fmt: skip
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(num_steps):
            seen += [row.numpy().tobytes() for loader in loaders for row in next(loader).input_ids]
        state = loaders[0].state_dict()
        for loader in loaders:
            loader.close()
    assert state is not None
    assert (state["packing"], state["too_long"]) == ("documents", "truncate")
    num = samples.num_samples
    first, second = Counter(seen[:num]), Counter(seen[num : 2 * num])
    assert len(seen) >= 2 * num and first == second
    assert seen[:num] != seen[num : 2 * num]


@pytest.mark.parametrize(
    ("packing", "too_long", "message"),
    [
        (Packing.none, TooLong.truncate, r"data\.packing=none: must be documents .*set data\.packing=documents"),
        (Packing.documents, TooLong.drop, r"data\.too_long=drop: must be truncate .*set data\.too_long=truncate"),
    ],
)
def test_a_state_of_other_samples_is_refused(packing: Packing, too_long: TooLong, message: str) -> None:
    dataset: Any = Documents([4, 4, 4])
    options: Any = {"batch_size": 1, "seq_len": 10, "data_rank": 0, "num_data_ranks": 1, "seed": 0}
    first = Loader(dataset, samples=PackedDocuments(dataset, 10, Packing.documents, TooLong.truncate), **options)
    state = first.state_dict()
    first.close()
    other = Loader(dataset, samples=PackedDocuments(dataset, 10, packing, too_long), **options)
    state["num_samples"] = other.num_samples
    with pytest.raises(IncompatibleCheckpoint, match=message):
        other.load_state_dict(state)
    other.close()


def test_evaluation_counts_each_document_once() -> None:
    dataset: Any = Documents(LENGTHS)
    samples = build_samples(ChatDataConfig(path="x", packing=Packing.none), dataset, 30, 1)
    found: list[int] = []
    for rank in range(2):
        for batch in evaluation_batches(
            dataset, batch_size=4, seq_len=30, max_samples=100, data_rank=rank, num_data_ranks=2, samples=samples
        ):
            assert batch.input_ids.shape == (4, 30)
            found += batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert sorted(found) == [100 * i + 10 + j for i, n in enumerate(LENGTHS) for j in range(1, n) if j % 3 != 1]


@pytest.mark.slow
def test_packed_is_as_one_by_one() -> None:
    """The summed loss of documents in one window is that of each alone, and so is its gradient."""
    lengths = [9, 4, 17, 2, 8, 12]
    dataset: Any = Documents(lengths)
    dataset._tokens = np.random.default_rng(0).integers(8, 60, len(dataset._tokens))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, dropout=0.0
    )
    model = config.build("cpu")
    model.materialize(torch.device("cpu"), 0)
    objective = NextTokenConfig().build()
    gradients, sums = [], []
    for packing in Packing:
        samples = PackedDocuments(dataset, 24, packing, TooLong.error)
        batch = make_batch(dataset, np.arange(samples.num_samples), 24, Borders.attention, None, samples)
        model.zero_grad()
        loss = model(batch.input_ids, batch.document_ids, lambda x, head, b=batch: objective.loss_sum(x, head, b))
        loss.backward()
        sums.append(loss.item() / objective.num_targets(batch))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert objective.num_targets(batch) == sum((j % 3 != 1) for n in lengths for j in range(1, n))
    assert samples.num_samples == len(lengths)
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
