"""The samples of a dataset: windows of its stream, or whole documents packed into windows. Torch-free.

Sample i depends on the dataset and the settings alone, so the order of samples, its cursor and what a resumed run sees
are the same for all kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from windlass.data.config import ChatDataConfig, DataConfig, Packing, TooLong
from windlass.data.shards import TokenDataset
from windlass.errors import DataError


class Samples(Protocol):
    """Windows of T + lookahead tokens, by number."""

    @property
    def num_samples(self) -> int: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the samples, besides the dataset, T, and being windows of the stream: plain JSON."""
        ...

    def read(self, sample: int, tokens: np.ndarray, documents: np.ndarray, counts: np.ndarray | None) -> None:
        """Writes a sample into arrays of its length.

        Args:
            tokens: int64.
            documents: int32, the number of each token's document in the sample, from 0.
            counts: bool, True for tokens that may be labels; there if `has_counts`.
        """
        ...

    @property
    def has_counts(self) -> bool:
        """True if some tokens may be no labels."""
        ...

    def check_ids(self, sample: int) -> None:
        """Raises DataError, with the shard, if a token of it is above the dataset's `max_token_id`."""
        ...


class StreamWindows:
    """Sample i is the tokens from i*T on. Raises DataError where there is none."""

    has_counts = False

    def __init__(self, dataset: TokenDataset, seq_len: int, lookahead: int = 1) -> None:
        self._dataset, self._seq_len, self._length = dataset, seq_len, seq_len + lookahead
        self.settings: dict[str, Any] = {}
        self.num_samples = (dataset.num_tokens - lookahead) // seq_len
        if self.num_samples < 1:
            raise DataError(
                "train.seq_len",
                seq_len,
                f"the {dataset.split} text is too short: {dataset.num_tokens} tokens of {self._length} needed",
                f"set train.seq_len to {dataset.num_tokens - lookahead} or less, or give more text",
            )

    def read(self, sample: int, tokens: np.ndarray, documents: np.ndarray, counts: np.ndarray | None) -> None:
        tokens[:], documents[:] = self._dataset.window(sample * self._seq_len, self._length)

    def check_ids(self, sample: int) -> None:
        self._dataset.check_ids(sample * self._seq_len, self._length)


@dataclass(frozen=True)
class PackingFigures:
    """The outcome of packing documents into samples of T tokens."""

    num_documents: int
    """In samples."""
    num_truncated: int
    num_dropped: int
    """Longer than a sample, or without a target in what a sample has of them."""
    fill_fraction: float
    """The part of all samples' tokens that are documents' and no padding."""


class PackedDocuments:
    """Whole documents: the next ones that fit into T tokens together, or one. The rest of a sample is padding.

    Padding is a document of its own, of eos tokens, of which no label counts; nor does the first token of a document.

    Args:
        packing: `documents`: next-fit in the order of the stream; `none`: a document a sample.
        too_long: the way to treat documents of more than T tokens.

    Raises:
        DataError: documents are too long and `too_long` is `error`, or none is left.
    """

    has_counts = True

    def __init__(self, dataset: TokenDataset, seq_len: int, packing: Packing, too_long: TooLong) -> None:
        self._dataset = dataset
        self.settings = {"packing": packing.value, "too_long": too_long.value}
        starts = dataset.document_starts()
        self._starts, lengths = starts[:-1], np.diff(starts)
        is_long = lengths > seq_len
        num_long = int(is_long.sum())
        if num_long and too_long == TooLong.error:
            raise DataError(
                "data.too_long",
                too_long.value,
                f"{num_long:,} of the {len(lengths):,} {dataset.split} conversations are longer than "
                f"train.seq_len={seq_len}, the longest has {int(lengths.max()):,} tokens",
                f"set train.seq_len={int(lengths.max())}, or data.too_long=truncate or drop",
            )
        kept = ~is_long if too_long == TooLong.drop else self._has_targets(is_long, seq_len)
        if not kept.any():
            raise DataError(
                "train.seq_len",
                seq_len,
                f"no {dataset.split} conversation is left: {num_long:,} of {len(lengths):,} are longer"
                + ("" if too_long == TooLong.drop else ", and have no answer in what is left of them"),
                f"set train.seq_len={int(lengths.max())}, which the longest has",
            )
        self._starts, self._lengths = self._starts[kept], np.minimum(lengths[kept], seq_len)
        self._firsts = _next_fit(self._lengths, seq_len) if packing == Packing.documents else np.arange(kept.sum() + 1)
        self.num_samples = len(self._firsts) - 1
        self.figures = PackingFigures(
            len(self._lengths),
            int((is_long & kept).sum()),
            int((~kept).sum()),
            float(self._lengths.sum() / (self.num_samples * seq_len)),
        )

    def _has_targets(self, is_long: np.ndarray, seq_len: int) -> np.ndarray:
        """False for the long documents without a target behind the first of their first T tokens."""
        kept = np.ones(len(is_long), dtype=bool)
        for number in np.flatnonzero(is_long).tolist():
            flags = self._dataset.targets(int(self._starts[number]), seq_len)
            kept[number] = flags is None or bool(flags[1:].any())
        return kept

    def read(self, sample: int, tokens: np.ndarray, documents: np.ndarray, counts: np.ndarray | None) -> None:
        assert counts is not None
        counts[:] = False
        tokens[:] = self._dataset.eos_id
        position, first, stop = 0, int(self._firsts[sample]), int(self._firsts[sample + 1])
        for number in range(first, stop):
            start, length = int(self._starts[number]), int(self._lengths[number])
            end = position + length
            tokens[position:end], _ = self._dataset.window(start, length)
            documents[position:end] = number - first
            flags = self._dataset.targets(start, length)
            counts[position:end] = True if flags is None else flags != 0
            counts[position] = False
            position = end
        documents[position:] = stop - first

    def check_ids(self, sample: int) -> None:
        for number in range(int(self._firsts[sample]), int(self._firsts[sample + 1])):
            self._dataset.check_ids(int(self._starts[number]), int(self._lengths[number]))


def build_samples(config: DataConfig, dataset: TokenDataset, seq_len: int, lookahead: int) -> Samples:
    """The samples of `dataset` that `config` asks for. Raises DataError where there is none."""
    if isinstance(config, ChatDataConfig):
        return PackedDocuments(dataset, seq_len, config.packing, config.too_long)
    return StreamWindows(dataset, seq_len, lookahead)


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The first item of each bin, and the number of items: int64 [num_bins + 1].

    Args:
        lengths: int64 [num_items], each at most `capacity`; a bin takes the next items for as long as they fit.
    """
    stops = np.cumsum(lengths)
    # What would be the next bin's first item, if this one were a bin's first.
    following = np.searchsorted(stops, stops - lengths + capacity, side="right").tolist()
    firsts, first = [0], 0
    while (first := following[first]) < len(following):
        firsts.append(first)
    return np.array([*firsts, len(lengths)], dtype=np.int64)
