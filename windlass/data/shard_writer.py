"""Tokenises one unit of work into its shards, in bounded memory. Torch-free; runs in the worker processes."""

from __future__ import annotations

import base64
import errno
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from windlass.data.chat_rendering import RowRefused
from windlass.data.chat_tokenizer import ChatTokenizer
from windlass.data.documents import Unit, split_position
from windlass.data.manifest import SPLITS, ShardInfo, check_shard, shard_file, unit_file, write_json
from windlass.data.source_files import Document
from windlass.data.tally import Tally
from windlass.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, encode_counting
from windlass.errors import ConfigError, DataError
from windlass.files import atomic_file
from windlass.os_errors import MISSING, remedy, said
from windlass.untrusted import Malformed, convert, read_json

BATCH_TOKENS = 1 << 20
"""Tokens a record batch, about: a batch is written when it has as many, and holds whole documents."""
MAX_SIDECAR_BYTES = 64 * MAX_VOCAB_SIZE
GROUP_CHARS = 1 << 20
GROUP_DOCUMENTS = 1024
OUT_OF_SPACE = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@dataclass(frozen=True)
class UnitResult:
    """The sidecar of a unit: what it wrote, and what the manifest needs to know of it.

    Args:
        shards: by split; a split without documents has none.
        token_counts: by split, int64 [vocab_size].
        lowest, highest: of the documents' `split_position`, 1 and 0 where the unit has no documents.
        tally: of what was read and left out.
    """

    unit: str
    shards: dict[str, ShardInfo]
    token_counts: dict[str, np.ndarray]
    lowest: float
    highest: float
    tally: Tally

    def save(self, path: Path) -> None:
        counts = {split: _pack(array) for split, array in self.token_counts.items()}
        write_json(path, {**asdict(self), "token_counts": counts})

    @staticmethod
    def load(path: Path, vocab_size: int) -> UnitResult:
        """Reads what `save` wrote. Raises Malformed and OSError."""
        stored = convert(read_json(path, MAX_SIDECAR_BYTES), _StoredResult)
        counts = {split: _unpack(packed, vocab_size) for split, packed in stored.token_counts.items()}
        if not counts.keys() == stored.shards.keys() <= set(SPLITS):
            raise Malformed("its shards are not those of the splits")
        for shard in stored.shards.values():
            check_shard(shard, token_dtype(vocab_size).itemsize, "shards")
        return UnitResult(stored.unit, stored.shards, counts, stored.lowest, stored.highest, stored.tally)


@dataclass(frozen=True)
class _StoredResult:
    unit: str
    shards: dict[str, ShardInfo]
    token_counts: dict[str, str]
    lowest: float
    highest: float
    tally: Tally


def write_unit(
    unit: Unit,
    unit_index: int,
    unit_fingerprint: str,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> UnitResult:
    """Tokenise `unit` into `folder`: a shard for each split that gets documents, then the sidecar.

    Args:
        on_progress: called with the input bytes done since the last call.

    Raises:
        DataError: the input cannot be read, or the disk is full.
        ConfigError: the tokenizer returns ids that it must not.
    """
    lowest, highest, tally = 1.0, 0.0, Tally()
    with ExitStack() as stack:
        stack.enter_context(space_errors(folder))
        writers = {
            split: stack.enter_context(ShardWriter(folder, shard_file(split, unit_index), tokenizer))
            for split in SPLITS
        }
        for group in _groups(unit.documents(tally)):
            for document, ids, targets in _encoded(tokenizer, group, tally):
                if ids.size == 0:
                    tally.tokenless_documents += 1
                    continue
                position = split_position(document.identity)
                lowest, highest = min(lowest, position), max(highest, position)
                writers["validation" if position < validation_fraction else "train"].add(ids, targets)
            on_progress(sum(document.num_bytes for document in group))
        shards = {split: info for split, writer in writers.items() if (info := writer.finish()) is not None}
    counts = {split: writers[split].token_counts for split in shards}
    result = UnitResult(unit_fingerprint, shards, counts, lowest, highest, tally)
    with space_errors(folder):
        result.save(folder / unit_file(unit_index))
    return result


def _encoded(
    tokenizer: Tokenizer, group: list[Document], tally: Tally
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """The documents with their tokens, and flags of those that are learned where not all are."""
    texts = [document.text for document in group]
    tally.characters += sum(map(len, texts))
    if not isinstance(tokenizer, ChatTokenizer):
        for document, ids in zip(group, encode_counting(tokenizer, texts, tally), strict=True):
            yield document, ids, None
        return
    for document in group:
        try:
            encoded = tokenizer.encode_conversation(json.loads(document.text), tally)
        except RowRefused as error:
            assert document.refused is not None
            raise document.refused(error.rule, error.fix) from None
        yield document, encoded.ids, encoded.targets


class ShardWriter:
    """Documents into an Arrow IPC file with a column `tokens: large_list<uint16|uint32>`, uncompressed.

    Of a tokenizer of conversations there is another column, `targets: large_list<uint8>`, with 1 for each token that is
    learned, and no token is added behind a document.

    A context manager. The file appears under its name when the body ends after `finish`, and does not if the
    body raises or no document was added.
    """

    def __init__(self, folder: Path, file: str, tokenizer: Tokenizer) -> None:
        self._folder, self._file = folder, file
        self._vocab_size = tokenizer.vocab_size
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eos = np.array([tokenizer.eos_id], dtype=self._dtype)
        item = pa.field("item", pa.from_numpy_dtype(self._dtype), nullable=False)
        columns = [pa.field("tokens", pa.large_list(item), nullable=False)]
        self._has_targets = isinstance(tokenizer, ChatTokenizer)
        if self._has_targets:
            flag = pa.field("item", pa.uint8(), nullable=False)
            columns.append(pa.field("targets", pa.large_list(flag), nullable=False))
        self._schema = pa.schema(columns)
        self._pending_targets: list[np.ndarray] = []
        self._num_targets = self._max_token_id = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._num_documents = 0
        self._batch_num_tokens: list[int] = []
        self._tokens_sha256 = sha256()
        self._stack = ExitStack()
        self._sink: _HashingFile | None = None
        self._arrow: pa.RecordBatchFileWriter | None = None
        self.token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)

    def add(self, ids: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Adds a document of `ids`, integers [num_tokens], and the end-of-document id after it.

        Args:
            targets: uint8 [num_tokens], 1 for each that is learned; the document has its end then.
        """
        assert (targets is not None) == self._has_targets
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) < 0):
            raise ConfigError(
                "data.tokenizer",
                f"ids {int(ids.min())} to {int(ids.max())}",
                f"must return ids below its vocab_size={self._vocab_size}",
                "correct the tokenizer's vocab_size",
            )
        end = self._eos if targets is None else self._eos[:0]
        num_tokens = ids.size + end.size
        if self._pending and self._pending_tokens + num_tokens > BATCH_TOKENS:
            self._flush()
        self._pending += [ids.astype(self._dtype, copy=False), end]
        if targets is not None:
            self._pending_targets.append(targets)
        self._pending_tokens += num_tokens
        self._num_documents += 1
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def finish(self) -> ShardInfo | None:
        """Write what is left. None if no document was added."""
        if self._pending:
            self._flush()
        if self._arrow is None or self._sink is None:
            return None
        self._arrow.close()
        return ShardInfo(
            file=self._file,
            num_documents=self._num_documents,
            num_tokens=sum(self._batch_num_tokens),
            num_bytes=self._sink.num_bytes,
            sha256=self._sink.digest.hexdigest(),
            tokens_sha256=self._tokens_sha256.hexdigest(),
            batch_num_tokens=self._batch_num_tokens,
            num_targets=self._num_targets if self._has_targets else None,
            max_token_id=self._max_token_id if self._has_targets else None,
        )

    def _flush(self) -> None:
        if self._arrow is None:
            self._sink = _HashingFile(self._stack.enter_context(atomic_file(self._folder / self._file)))
            self._arrow = pa.ipc.new_file(self._sink, self._schema)
        values = np.concatenate(self._pending)
        lengths = np.fromiter((array.size for array in self._pending), np.int64, len(self._pending))
        offsets = np.zeros(len(self._pending) // 2 + 1, dtype=np.int64)
        np.cumsum(lengths[0::2] + lengths[1::2], out=offsets[1:])
        self._tokens_sha256.update(np.diff(offsets).astype("<i8").tobytes())
        self._tokens_sha256.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        columns = [values]
        counted = values
        if self._has_targets:
            targets = np.concatenate(self._pending_targets)
            self._tokens_sha256.update(targets.data)
            columns.append(targets)
            counted = values[targets != 0]
            self._num_targets += counted.size
            self._max_token_id = max(self._max_token_id, int(values.max()))
        self.token_counts += np.bincount(counted, minlength=self._vocab_size)
        arrays = [
            pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(column), type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._arrow.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._batch_num_tokens.append(values.size)
        self._pending, self._pending_targets, self._pending_tokens = [], [], 0


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class _HashingFile:
    """A binary file that Arrow only appends to, and the SHA-256 of what it wrote."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.num_bytes += view.nbytes
        return self._stream.write(view)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The stream belongs to `atomic_file`, which closes it."""


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups large enough for a tokenizer's batch, small enough for memory."""
    group: list[Document] = []
    chars = 0
    for document in documents:
        group.append(document)
        chars += len(document.text)
        if chars >= GROUP_CHARS or len(group) >= GROUP_DOCUMENTS:
            yield group
            group, chars = [], 0
    if group:
        yield group


@contextmanager
def space_errors(folder: Path) -> Iterator[None]:
    """Turn the disk's refusals of a write below `folder` (full, read-only, ...) into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            rule = f"{OUT_OF_SPACE[error.errno]} ({error.strerror})"
            fix = "free space there and run the same command again: it goes on where it stopped"
        elif error.errno == errno.EFBIG:
            rule = f"a shard is larger than files may be here ({error.strerror})"
            fix = "raise the limit (ulimit -f) and run the same command again: it goes on where it stopped"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            rule, fix = f"cannot be written to ({error.strerror})", "choose another folder, or mend this one"
        elif isinstance(error, MISSING):
            raise
        else:
            rule, fix = (
                f"cannot be written to ({said(error)})",
                remedy(error, "choose another folder, or mend this one"),
            )
        raise DataError("prepared folder", folder, rule, fix) from None


def _pack(counts: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(counts.astype("<i8").tobytes(), 6)).decode("ascii")


def _unpack(packed: str, vocab_size: int) -> np.ndarray:
    num_bytes = 8 * vocab_size
    try:
        unpacker = zlib.decompressobj()
        counts = unpacker.decompress(base64.b64decode(packed, validate=True), num_bytes)
    except (ValueError, zlib.error) as error:
        raise Malformed(f"its token counts cannot be unpacked: {error}") from None
    if len(counts) != num_bytes or not unpacker.eof:
        raise Malformed(f"its token counts are not {vocab_size} numbers")
    return np.frombuffer(counts, dtype="<i8").astype(np.int64)
