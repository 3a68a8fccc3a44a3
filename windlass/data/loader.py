"""Batches of token sequences, in a random order that any number of ranks can take up again anywhere."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from windlass.data.batch import IGNORE_INDEX, Batch, BatchMaker, NextTokens
from windlass.data.config import Borders
from windlass.data.permutation import permute
from windlass.data.samples import Samples, StreamWindows
from windlass.data.shards import TokenDataset
from windlass.errors import IncompatibleCheckpoint

PLAN_SAMPLES = 4096
"""Samples whose places are looked up together, so that numpy's overhead a call is shared."""

EVALUATION_SEED = 0
"""Never changes: validation losses of all runs on a data set and sequence length are of the same samples."""


class Loader(Iterator[Batch]):
    """Endless micro-batches of one data position, made ahead by a background thread.

    Sample i of the stream is its tokens [i*T, i*T + T]: T inputs, and T labels one further, or what `maker` makes of
    them; see `windlass.data.samples` for others.

    Position p of the run is the sample that the permutation of epoch p // num_samples puts at p % num_samples. At
    cursor c data position r of R gets the positions c + r*B ... c + r*B + B - 1, and then the cursor rises by B*R. So
    the order depends on the cursor alone, and a run that goes on from a cursor, with any batch size and number of
    ranks, sees every sample once an epoch.

    Args:
        batch_size: B, sequences in a micro-batch of one data position.
        seq_len: T, in tokens.
        data_rank, num_data_ranks: r and R; the ranks that share a data position get the same (`Mesh.data_rank`).
        shuffle: False takes the samples in the order of the stream.
        prefetch: micro-batches that are kept ready.
        cursor: where to begin: samples that all ranks together have had before.
        pin_memory: put the tensors into page-locked memory (needs a GPU).
        maker: makes batches of samples.
        samples: None: windows of the stream.

    Raises:
        DataError: the stream is shorter than one sample.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        seq_len: int,
        data_rank: int,
        num_data_ranks: int,
        seed: int,
        shuffle: bool = True,
        borders: Borders = Borders.loss,
        prefetch: int = 4,
        cursor: int = 0,
        pin_memory: bool = False,
        maker: BatchMaker | None = None,
        samples: Samples | None = None,
    ) -> None:
        assert batch_size >= 1 and prefetch >= 1 and 0 <= data_rank < num_data_ranks and cursor >= 0
        self._maker = maker or NextTokens()
        self.samples = samples or StreamWindows(dataset, seq_len, self._maker.lookahead)
        self.num_samples = self.samples.num_samples
        """Samples in an epoch."""
        self._dataset, self._batch_size, self._seq_len = dataset, batch_size, seq_len
        self._data_rank, self._num_data_ranks, self._seed = data_rank, num_data_ranks, seed
        self._shuffle, self._borders, self._pin_memory = shuffle, borders, pin_memory
        self._prefetch, self._cursor = prefetch, cursor
        self._producer: _Producer | None = self._start()

    @property
    def cursor(self) -> int:
        """Samples that all ranks together have been given since the run began. Not those made ahead."""
        return self._cursor

    @property
    def epoch(self) -> int:
        """Full passes over the data so far."""
        return self._cursor // self.num_samples

    def __next__(self) -> Batch:
        if self._producer is None:
            raise RuntimeError("the loader is closed")
        batch = self._producer.get()
        self._cursor += self._batch_size * self._num_data_ranks
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs, plain JSON. The same on every rank."""
        return {
            "cursor": self._cursor,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "num_samples": self.num_samples,
            "shuffle": self._shuffle,
            "fingerprint": self._dataset.fingerprint,
            **self.samples.settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a loader, of any number of ranks and any batch size, was when it gave `state`.

        Raises:
            IncompatibleCheckpoint: `state` is of other data, or of another order of it. The loader stays as
                it was.
        """
        own = self.state_dict()
        same_data = (
            f"give the data of the checkpoint (here it is that of {self._dataset.folder}), or begin with its weights "
            "alone: `windlass ckpt export RUN_DIR --format hf --output DIR`, `windlass ckpt import DIR --format hf "
            "--output NEW`, and a new run with resume=NEW"
        )
        fixes = {
            "fingerprint": same_data,
            "num_samples": same_data,
            "seed": f"set train.seed={state.get('seed')}",
            "seq_len": f"set train.seq_len={state.get('seq_len')}",
            "shuffle": f"set data.shuffle={str(state.get('shuffle')).lower()}",
            "packing": f"set data.packing={state.get('packing')}",
            "too_long": f"set data.too_long={state.get('too_long')}",
        }
        for name, fix in fixes.items():
            if state.get(name) != own.get(name):
                rule = f"must be {state.get(name)} as in the checkpoint, which counts samples in that order"
                key = {"seed": "train.seed", "seq_len": "train.seq_len"}.get(name, f"data.{name}")
                raise IncompatibleCheckpoint(key, own.get(name), rule, f"{fix}, or start a new run")
        cursor = state["cursor"]
        if type(cursor) is not int or cursor < 0:
            raise ValueError(f"{cursor!r} is no number of samples")
        self.close()
        self._cursor = cursor
        self._producer = self._start()

    def close(self) -> None:
        """Stop the background thread and wait for its end. There are no batches until a state is loaded."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def _start(self) -> _Producer:
        return _Producer(self._batches(self._cursor), self._prefetch)

    def _batches(self, cursor: int) -> Iterator[Batch]:
        """This rank's micro-batches from `cursor` on. Shares no state with the loader, for it runs ahead."""
        num_ahead = max(1, PLAN_SAMPLES // self._batch_size)
        stride = self._batch_size * self._num_data_ranks
        own = self._data_rank * self._batch_size + np.arange(self._batch_size, dtype=np.int64)
        while True:
            positions = cursor + stride * np.arange(num_ahead, dtype=np.int64)[:, None] + own
            epochs, samples = np.divmod(positions.reshape(-1), self.num_samples)
            if self._shuffle:
                samples = permute(samples, self.num_samples, self._seed, epochs)
            for of_batch in samples.reshape(positions.shape):
                batch = make_batch(self._dataset, of_batch, self._seq_len, self._borders, self._maker, self.samples)
                yield batch.pin_memory() if self._pin_memory else batch
            cursor += stride * num_ahead


def evaluation_batches(
    dataset: TokenDataset,
    *,
    batch_size: int,
    seq_len: int,
    max_samples: int,
    data_rank: int,
    num_data_ranks: int,
    borders: Borders = Borders.loss,
    maker: BatchMaker | None = None,
    samples: Samples | None = None,
) -> Iterator[Batch]:
    """min(num_samples, max_samples) samples from all over the stream, always the same, each at one data position.

    They are the first of a fixed shuffle: neighbours in a stream are alike (files of one folder, rows of one table),
    and a stretch of them would not stand for the rest.

    Every rank yields the same number of batches [batch_size, seq_len], so that sharded models stay in step:
    rows beyond the last sample have only `IGNORE_INDEX` for labels.

    Raises:
        DataError: the stream is shorter than one sample. At the call, not at the first batch.
    """
    maker = maker or NextTokens()
    source = samples or StreamWindows(dataset, seq_len, maker.lookahead)
    num_samples = min(source.num_samples, max_samples)

    def batches() -> Iterator[Batch]:
        for first in range(0, num_samples, batch_size * num_data_ranks):
            begin = first + data_rank * batch_size
            numbers = np.arange(begin, begin + batch_size)
            padding = numbers >= num_samples
            chosen = permute(np.where(padding, 0, numbers), source.num_samples, EVALUATION_SEED)
            batch = make_batch(dataset, chosen, seq_len, borders, maker, source)
            batch.labels[torch.from_numpy(padding)] = IGNORE_INDEX
            yield batch

    return batches()


def make_batch(
    dataset: TokenDataset,
    numbers: np.ndarray,
    seq_len: int,
    borders: Borders,
    maker: BatchMaker | None = None,
    samples: Samples | None = None,
) -> Batch:
    """The samples `numbers` [B] as a batch; None for `samples`: windows of the stream."""
    maker = maker or NextTokens()
    samples = samples or StreamWindows(dataset, seq_len, maker.lookahead)
    shape = (len(numbers), seq_len + maker.lookahead)
    tokens = np.empty(shape, dtype=np.int64)
    documents = np.empty(shape, dtype=np.int32)
    counts = np.empty(shape, dtype=bool) if samples.has_counts else None
    for row, number in enumerate(numbers.tolist()):
        samples.read(number, tokens[row], documents[row], None if counts is None else counts[row])
    if int(tokens.max()) > dataset.max_token_id:  # a flipped bit, which would be looked up beyond the embedding's end
        for number in numbers.tolist():
            samples.check_ids(number)
    if counts is None:
        return maker.make_batch(tokens, documents, borders)
    return maker.make_batch(tokens, documents, borders, counts)


class _Producer:
    """A thread that draws from `batches` ahead of `get`, at most `size` of them."""

    def __init__(self, batches: Iterator[Batch], size: int) -> None:
        self._batches, self._size = batches, size
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="windlass-loader", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        """The next batch. Raises what the thread met, after the batches that it made before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            assert self._error is not None
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _produce(self) -> None:
        try:
            for batch in self._batches:
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._size)
                    if self._stopped:
                        return
        except BaseException as error:  # whatever it is, the loop must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()
