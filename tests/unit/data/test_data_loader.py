from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from windlass.data import loader as loader_module
from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.data.config import Borders
from windlass.data.loader import Loader, evaluation_batches
from windlass.data.shards import TokenDataset
from windlass.errors import DataError, IncompatibleCheckpoint

SEQ_LEN = 8


@pytest.fixture
def dataset(make_folder: Callable[..., Path]) -> TokenDataset:
    rng = np.random.default_rng(1)
    texts = ["".join(map(chr, rng.integers(33, 127, size=int(rng.integers(3, 40))))) for _ in range(80)]
    return TokenDataset(make_folder(texts), "train")


@pytest.fixture
def make_loader(dataset: TokenDataset) -> Iterator[Callable[..., Loader]]:
    loaders = []

    def make(**options) -> Loader:
        defaults = {"batch_size": 2, "seq_len": SEQ_LEN, "data_rank": 0, "num_data_ranks": 1, "seed": 3}
        loaders.append(Loader(dataset, **(defaults | options)))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def sample_numbers(dataset: TokenDataset, batch: Batch) -> list[int]:
    """Which samples of the stream the rows are."""
    stream = dataset.window(0, dataset.num_tokens)[0].astype(np.int64)
    where = {stream[i : i + SEQ_LEN + 1].tobytes(): i // SEQ_LEN for i in range(0, len(stream) - SEQ_LEN, SEQ_LEN)}
    assert len(where) == (len(stream) - 1) // SEQ_LEN, "every sample of the fixture differs"
    rows = np.concatenate([batch.input_ids.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
    return [where[row.tobytes()] for row in rows]


def test_shapes_dtypes_and_shift(make_loader, dataset: TokenDataset) -> None:
    loader = make_loader(shuffle=False, borders=Borders.none, batch_size=3)
    batch = next(loader)
    for tensor, dtype in (
        (batch.input_ids, torch.int64),
        (batch.labels, torch.int64),
        (batch.document_ids, torch.int32),
    ):
        assert (tensor.shape, tensor.dtype) == ((3, SEQ_LEN), dtype)
        assert tensor.is_contiguous()
    stream, documents = dataset.window(0, 3 * SEQ_LEN + 1)
    assert batch.input_ids.flatten().tolist() == stream[:-1].tolist()
    assert batch.labels.flatten().tolist() == stream[1:].tolist()
    for row in range(3):
        own = documents[row * SEQ_LEN : (row + 1) * SEQ_LEN]
        assert batch.document_ids[row].tolist() == (own - own[0]).tolist()


@pytest.mark.parametrize("borders", list(Borders))
def test_labels_across_borders(make_loader, dataset: TokenDataset, borders: Borders) -> None:
    batch = next(make_loader(shuffle=False, borders=borders, batch_size=20))
    across = batch.input_ids == dataset.eos_id
    assert 3 < across.sum() < 40
    ignored = batch.labels == IGNORE_INDEX
    assert ignored.any() == (borders != Borders.none)
    if borders != Borders.none:
        assert (ignored == across).all(), "the token after an end of document, and no other, is not predicted"
        assert (batch.labels == dataset.eos_id).any(), "the end of a document is predicted"
    rises = batch.document_ids.diff(dim=1)
    assert (rises.bool() == across[:, :-1]).all()
    assert set(rises.unique().tolist()) == {0, 1}


def test_without_shuffle_samples_come_in_order(make_loader, dataset: TokenDataset) -> None:
    loader = make_loader(shuffle=False, borders=Borders.none, batch_size=4)
    found = [n for batch in islice(loader, loader.num_samples // 4 + 1) for n in sample_numbers(dataset, batch)]
    assert found == [i % loader.num_samples for i in range(len(found))]


def test_four_then_two_then_three_ranks_see_each_sample_once_an_epoch(make_loader, dataset: TokenDataset) -> None:
    """Each run reads ahead, is stopped with batches made but not delivered, and hands its state to the next as JSON."""
    seen: list[int] = []
    state = None
    for world_size, batch_size, num_steps in ((4, 2, 5), (2, 3, 4), (3, 1, 7), (1, 5, 200)):
        loaders = [
            make_loader(data_rank=r, num_data_ranks=world_size, batch_size=batch_size, borders=Borders.none, prefetch=7)
            for r in range(world_size)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(num_steps):
            for loader in loaders:
                seen += sample_numbers(dataset, next(loader))
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
        assert state["cursor"] == len(seen)
    num_samples = loaders[0].num_samples
    assert loaders[0].epoch == len(seen) // num_samples >= 3
    epochs = [seen[i : i + num_samples] for i in range(0, len(seen) - num_samples + 1, num_samples)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(num_samples))
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert epochs[0] != sorted(epochs[0])


def test_resuming_gives_what_would_have_come(make_loader, dataset: TokenDataset) -> None:
    first = make_loader(prefetch=3)
    for _ in range(7):
        next(first)
    time.sleep(0.05)  # it reads ahead
    state = first.state_dict()
    expected = [next(first) for _ in range(5)]
    for resumed in (make_loader(), make_loader(cursor=state["cursor"])):
        resumed.load_state_dict(state)
        assert resumed.cursor == 14
        for batch in expected:
            assert torch.equal(next(resumed).input_ids, batch.input_ids)
    first.load_state_dict(state)
    assert torch.equal(next(first).labels, expected[0].labels), "going back works too"


def test_more_samples_than_are_planned_together(make_loader, dataset: TokenDataset, monkeypatch) -> None:
    loader = make_loader()
    reference = [next(loader).input_ids for _ in range(12)]
    monkeypatch.setattr(loader_module, "PLAN_SAMPLES", 5)
    loader = make_loader()
    assert all(torch.equal(next(loader).input_ids, expected) for expected in reference)


def test_seed_changes_the_order(make_loader) -> None:
    loaders = [make_loader(seed=seed) for seed in (3, 3, 4)]
    orders = [torch.cat([next(loader).input_ids for _ in range(5)]) for loader in loaders]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"train\.seed=3: must be 4 as in the checkpoint.*Fix: set train\.seed=4"),
        ({"seq_len": 16}, r"train\.seq_len=8: must be 16 .*set train\.seq_len=16"),
        ({"shuffle": False}, r"data\.shuffle=True: must be False .*set data\.shuffle=false"),
        ({"fingerprint": "abc"}, r"data\.fingerprint=.*: must be abc .*`windlass ckpt import DIR"),
        ({"num_samples": 1}, r"data\.num_samples=.*: must be 1 "),
    ],
)
def test_state_of_another_order_is_refused(make_loader, change: dict, message: str) -> None:
    loader = make_loader()
    next(loader)
    state = loader.state_dict()
    with pytest.raises(IncompatibleCheckpoint, match=message):
        loader.load_state_dict(state | change)
    with pytest.raises(IncompatibleCheckpoint):
        loader.load_state_dict({"cursor": 0})
    assert loader.state_dict() == state
    next(loader)


def test_text_too_short(dataset: TokenDataset) -> None:
    longest = dataset.num_tokens - 1
    options = {"batch_size": 1, "data_rank": 0, "num_data_ranks": 1}
    message = rf"train\.seq_len={longest + 1}: the train text is too short.*set train\.seq_len to {longest} or less"
    with pytest.raises(DataError, match=message):
        Loader(dataset, seq_len=longest + 1, seed=0, **options)
    with pytest.raises(DataError, match=message):
        evaluation_batches(dataset, seq_len=longest + 1, max_samples=4, **options)
    loader = Loader(dataset, seq_len=longest, seed=0, **options)
    assert loader.num_samples == 1
    assert torch.equal(next(loader).input_ids, next(loader).input_ids)
    assert loader.epoch == 2
    loader.close()


def test_reads_ahead_as_far_as_asked_and_no_further(make_loader, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(loader_module, "make_batch", lambda *args: made.append(0) or len(made))
    loader = make_loader(prefetch=5)
    for delivered in range(3):
        deadline = time.monotonic() + 5
        while len(made) < 5 + delivered and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == 5 + delivered
        assert loader.cursor == 2 * delivered
        assert next(loader) == delivered + 1


def test_errors_in_the_thread_come_out_of_next(make_loader, dataset: TokenDataset) -> None:
    loader = make_loader(prefetch=1, shuffle=False)
    next(loader)
    deadline = time.monotonic() + 30
    while not loader._producer._ready and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread in the middle of a batch could put the reader back that is taken away below
    shard = dataset.folder / dataset.manifest.splits["train"].shards[0].file
    dataset._batches._values.clear()
    dataset._readers._values.clear()
    shard.unlink()
    with pytest.raises(DataError, match=r"is missing from the prepared folder"):
        for _ in range(5):
            next(loader)
    cursor = loader.cursor
    with pytest.raises(DataError, match=r"is missing"):
        next(loader)
    assert loader.cursor == cursor, "nothing was delivered"


def test_close_ends_the_thread_at_once(make_loader) -> None:
    def threads() -> int:
        return sum(thread.name == "windlass-loader" for thread in threading.enumerate())

    before = threads()
    loader = make_loader(prefetch=2)
    assert threads() == before + 1
    started_at = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started_at < 5.0, "it does not wait for a batch to be asked for"
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    loader.load_state_dict(loader.state_dict())
    next(loader)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_batches(make_loader) -> None:
    assert next(make_loader(pin_memory=True)).input_ids.is_pinned()


@pytest.mark.parametrize("max_samples", [1, 7, 24, 25, 10**9])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (3, 8)])
def test_evaluation_counts_each_sample_once(
    dataset: TokenDataset, world_size: int, batch_size: int, max_samples: int
) -> None:
    of_rank = [
        list(evaluation_batches(dataset, batch_size=batch_size, seq_len=SEQ_LEN, max_samples=max_samples,
                                data_rank=rank, num_data_ranks=world_size, borders=Borders.none))
        for rank in range(world_size)
    ]  # fmt: skip
    assert len({len(batches) for batches in of_rank}) == 1, "all ranks take as many steps"
    found = []
    for batch in (b for batches in of_rank for b in batches):
        assert batch.input_ids.shape == (batch_size, SEQ_LEN)
        counted = (batch.labels != IGNORE_INDEX).any(dim=1)
        rows = Batch(batch.input_ids[counted], batch.labels[counted], batch.document_ids[counted])
        found += sample_numbers(dataset, rows)
    num_samples = (dataset.num_tokens - 1) // SEQ_LEN
    assert len(found) == len(set(found)) == min(max_samples, num_samples)
    (alone,) = evaluation_batches(
        dataset,
        batch_size=len(found),
        seq_len=SEQ_LEN,
        max_samples=max_samples,
        data_rank=0,
        num_data_ranks=1,
        borders=Borders.none,
    )
    assert set(found) == set(sample_numbers(dataset, alone)), "the layout chooses other samples"


def test_evaluation_respects_borders(dataset: TokenDataset) -> None:
    (batch,) = evaluation_batches(dataset, batch_size=9, seq_len=SEQ_LEN, max_samples=9, data_rank=0, num_data_ranks=1)
    assert ((batch.labels == IGNORE_INDEX) == (batch.input_ids == dataset.eos_id)).all()


def test_what_one_objective_needs_moves_with_its_batch() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    moved = Batch(ids, ids, ids, {"rewards": torch.ones(2)}).to(torch.device("meta"))
    assert moved.others["rewards"].device.type == moved.labels.device.type == "meta"
