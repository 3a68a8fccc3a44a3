"""The tokens of a prepared folder, memory-mapped: data larger than RAM costs no RAM. Torch-free."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from windlass.data.manifest import SPLITS, TOKENIZER_FILE, Manifest, ShardInfo, file_sha256
from windlass.data.source_files import shortened
from windlass.errors import DataError
from windlass.mapped_file import map_file
from windlass.os_errors import MISSING, remedy, said

MAX_OPEN_SHARDS = 512
MAX_CACHED_BATCHES = 4096
K = TypeVar("K")
V = TypeVar("V")
_Mapped = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class TokenDataset:
    """One split of a prepared folder as one long stream of tokens, document after document.

    In memory are the number of tokens of each record batch (8 bytes for about 1M tokens) and views of the
    batches and files used last. May be read by several threads at once.

    Args:
        folder: what `windlass data prepare` or `prepared_folder` wrote.
        split: `train` or `validation`.

    Raises:
        DataError: the folder is not a finished preparation, or a shard is missing or not as long as it was
            written.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.load(self.folder)
        if split not in SPLITS:
            raise DataError("split", split, f"must be one of {', '.join(SPLITS)}", "use train or validation")
        info = self.manifest.splits[split]
        self.num_tokens = info.num_tokens
        self.num_documents = info.num_documents
        self.num_targets = info.num_targets
        """Tokens that are learned; None: all of them, and the shards have no column of it."""
        self.vocab_size: int = self.manifest.tokenizer["vocab_size"]
        self.eos_id: int = self.manifest.tokenizer["eos_id"]
        self.max_token_id = self.manifest.max_token_id
        self.fingerprint = self.manifest.fingerprint
        self.unigram_entropy_nats = self.manifest.unigram_entropy_nats
        self.tokenizer_spec = _tokenizer_spec(self.manifest, self.folder)
        """For `load_tokenizer`."""
        self.dtype = np.dtype(self.manifest.dtype)
        self._shards = info.shards
        for shard in self._shards:
            _check_size(self.folder, shard)
        self._batch_stops = np.cumsum([n for shard in self._shards for n in shard.batch_num_tokens], dtype=np.int64)
        self._shard_first_batch = np.cumsum([0] + [len(shard.batch_num_tokens) for shard in self._shards])
        self._readers: _Cache[int, pa.RecordBatchFileReader] = _Cache(MAX_OPEN_SHARDS, self._open_shard)
        self._batches: _Cache[int, _Mapped] = _Cache(MAX_CACHED_BATCHES, self._map_batch)

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + length) of the stream.

        Returns:
            tokens: [length] of `dtype`; read-only and mapped from the disk where one record batch holds them
                all.
            document_ids: int32 [length], 0 for the first document of the window, 1 for the next, and so on.

        Raises:
            IndexError: the stream does not have these tokens.
        """
        stop = start + length
        if start < 0 or length < 0 or stop > self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        starts_document = np.zeros(length, dtype=np.int32)
        pieces: list[np.ndarray] = []
        position = start
        batch = int(np.searchsorted(self._batch_stops, start, side="right"))
        while position < stop:
            values, offsets, _ = self._batches(batch)
            batch_start = int(self._batch_stops[batch]) - len(values)
            low, high = position - batch_start, min(stop - batch_start, len(values))
            first, last = np.searchsorted(offsets, (low, high))
            at = offsets[first:last] + (batch_start - start)  # documents that begin in [low, high)
            starts_document[at] = 1
            pieces.append(values[low:high])
            position, batch = batch_start + high, batch + 1
        if length:
            starts_document[0] = 0
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])
        return tokens, np.cumsum(starts_document, dtype=np.int32)

    def targets(self, start: int, length: int) -> np.ndarray | None:
        """Flags of tokens [start, start + length) of the stream: uint8 [length], not 0 for those that are learned.

        None where all of them are. `window` says whether the stream has these tokens.
        """
        if self.num_targets is None:
            return None
        pieces: list[np.ndarray] = [np.empty(0, np.uint8)]
        position, stop = start, start + length
        batch = int(np.searchsorted(self._batch_stops, start, side="right"))
        while position < stop:
            _, _, flags = self._batches(batch)
            assert flags is not None
            batch_start = int(self._batch_stops[batch]) - len(flags)
            high = min(stop - batch_start, len(flags))
            pieces.append(flags[position - batch_start : high])
            position, batch = batch_start + high, batch + 1
        return np.concatenate(pieces)

    def document_starts(self) -> np.ndarray:
        """The place of each document in the stream, and of its end: int64 [num_documents + 1]."""
        firsts = self._batch_stops - np.diff(self._batch_stops, prepend=0)
        starts = [self._batches(batch)[1] + first for batch, first in enumerate(firsts.tolist())]
        return np.concatenate([*starts, np.array([self.num_tokens])]).astype(np.int64)

    def verify(self) -> None:
        """Compare every shard with its checksum. Raises DataError for the first that differs."""
        for shard in self._shards:
            path = self.folder / shard.file
            _check_size(self.folder, shard)
            if file_sha256(path) != shard.sha256:
                raise DataError(
                    "data.path",
                    path,
                    "its bytes are not those that were written (SHA-256 differs)",
                    "delete the folder and prepare the text again; check the disk",
                )

    def _open_shard(self, index: int) -> pa.RecordBatchFileReader:
        shard = self._shards[index]
        _check_size(self.folder, shard)
        try:
            # Arrow's own map keeps a descriptor for as long as a batch of it is in use.
            reader = pa.ipc.open_file(pa.py_buffer(map_file(self.folder / shard.file)))
        except OSError as error:
            raise _not_given(self.folder / shard.file, error) from None
        except (pa.ArrowException, ValueError, MemoryError) as error:
            raise _damaged(self.folder / shard.file, str(error)) from None
        if reader.num_record_batches != len(shard.batch_num_tokens):
            raise _damaged(self.folder / shard.file, "its number of record batches is not that of the manifest")
        return reader

    def _map_batch(self, batch: int) -> _Mapped:
        """Views of a record batch: tokens [num_tokens], document starts, int64 [num_documents], flags of targets."""
        index = int(np.searchsorted(self._shard_first_batch, batch, side="right")) - 1
        shard, local = self._shards[index], batch - int(self._shard_first_batch[index])
        try:
            record_batch = self._readers(index).get_batch(local)
            record_batch.validate(full=True)  # offsets, and lengths of buffers; tokens are not read for it
            column = record_batch.column(0)
            values = column.values.to_numpy(zero_copy_only=True)
            offsets = column.offsets.to_numpy(zero_copy_only=True)
            flags = None
            if self.num_targets is not None:
                flags = record_batch.column(1).values.to_numpy(zero_copy_only=True)
        except (pa.ArrowException, AttributeError, IndexError, ValueError, MemoryError, OSError) as error:
            raise _damaged(self.folder / shard.file, str(error)) from None
        is_whole = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(values)
        if not is_whole or len(values) != shard.batch_num_tokens[local] or values.dtype != self.dtype:
            raise _damaged(self.folder / shard.file, f"record batch {local} is not as the manifest says")
        if flags is not None and (len(flags) != len(values) or flags.dtype != np.uint8):
            raise _damaged(self.folder / shard.file, f"the targets of record batch {local} are not those of its tokens")
        return values, offsets[:-1], flags

    def check_ids(self, start: int, length: int) -> None:
        """Raises DataError, with the shard, if a token of [start, start + length) is above `max_token_id`."""
        batch = int(np.searchsorted(self._batch_stops, start, side="right"))
        last = int(np.searchsorted(self._batch_stops, start + length - 1, side="right"))
        for number in range(batch, last + 1):
            values, _, _ = self._batches(number)
            if (highest := int(values.max())) > self.max_token_id:
                shard = self._shards[int(np.searchsorted(self._shard_first_batch, number, side="right")) - 1]
                raise _damaged(
                    self.folder / shard.file, f"it has the token {highest}, and its largest was {self.max_token_id}"
                )


class _Cache(Generic[K, V]):
    """The `size` values of `make` that were used last."""

    def __init__(self, size: int, make: Callable[[K], V]) -> None:
        self._size, self._make = size, make
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, key: K) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = self._make(key)
            if len(self._values) > self._size:
                self._values.popitem(last=False)
            return value


def _tokenizer_spec(manifest: Manifest, folder: Path) -> str:
    spec: str = manifest.tokenizer["spec"]
    return str(folder / spec) if spec == TOKENIZER_FILE else spec


def _check_size(folder: Path, shard: ShardInfo) -> None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _not_given(path, error) from None
    if size != shard.num_bytes:
        raise DataError(
            "data.path",
            path,
            f"has {size:,} bytes, and {shard.num_bytes:,} were written",
            "copy the whole folder again, or delete it and prepare the text again",
        )


def _not_given(path: Path, error: OSError) -> DataError:
    """The system's error: where the file is there, it is no damage."""
    if isinstance(error, MISSING):
        fix = "copy the whole folder again, or delete it and prepare the text again"
        return DataError("data.path", path, f"is missing from the prepared folder ({said(error)})", fix)
    if error.errno is None:  # Arrow's
        return _damaged(path, str(error))
    return DataError("data.path", path, f"cannot be read: {said(error)}", remedy(error, "mend that and start again"))


def _damaged(path: Path, why: str) -> DataError:
    fix = "delete the folder and prepare the text again; check the disk"
    return DataError("data.path", path, f"is damaged ({shortened(why.partition(chr(10))[0])})", fix)
