"""The readers of `windlass.data` on documents of strangers: each returns, or raises a WindlassError.

python -c "from support.hostile_data import campaign; campaign(folder, num_examples)"
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from support import hostile
from support.prepared import jsonl_source, prepare_in_process
from windlass.data.config import Borders
from windlass.data.loader import make_batch
from windlass.data.shards import TokenDataset
from windlass.data.sources import parquet_source, text_source
from windlass.data.tally import Tally
from windlass.data.tokenizer import HuggingFaceTokenizer, token_of
from windlass.errors import WindlassError
from windlass.models.config import LlamaConfig
from windlass.models.huggingface import check_weights, from_huggingface, to_huggingface
from windlass.untrusted import Malformed, parse_json

MAX_SECONDS = 10.0
"""Of one document; other work on the machine makes it longer."""
ROWS = [{"text": f"row {i} é \U0001f600", "n": [i, {"a": None}], "x": 1.5} for i in range(8)]


@dataclass(frozen=True)
class Reader:
    """`read` reads the document, which it puts into the empty folder."""

    documents: Callable[[Path], st.SearchStrategy[bytes]]
    """Given a folder to make good ones in."""
    read: Callable[[Path, bytes], None]


def check(reader: Reader, folder: Path, document: bytes) -> None:
    """Reads `document` in a folder of its own. Raises what is no WindlassError, and AssertionError if it takes long."""
    (folder / "last").write_bytes(document)  # what a crash was of
    place = folder / "place"
    place.mkdir()
    begin = time.thread_time()
    try:
        reader.read(place, document)
    except WindlassError as error:
        assert len(str(error)) < 2000, f"the message has {len(str(error))} characters"
    finally:
        shutil.rmtree(place)
    assert time.thread_time() - begin < MAX_SECONDS


def campaign(folder: Path, num_examples: int) -> None:
    """Reads so many documents with each reader, and prints how many that were. For a process of its own."""
    hostile.refuse_writes_outside(folder)
    total = 0
    for name, reader in READERS.items():
        sys.stderr.write(f"{name}\n")
        (folder / name / "good").mkdir(parents=True)
        with hostile.limited_memory():
            count = _read_many(reader, folder / name, num_examples)
        total += count
        print(f"{name}: {count}", flush=True)
    print(f"total: {total}", flush=True)


def _read_many(reader: Reader, folder: Path, num_examples: int) -> int:
    count = 0

    @settings(hostile.QUICK, max_examples=num_examples, derandomize=False, phases=[Phase.generate])
    @given(document=reader.documents(folder / "good"))
    def run(document: bytes) -> None:
        nonlocal count
        count += 1
        check(reader, folder, document)

    run()
    return count


def _documents(source: Any) -> None:
    """All documents, of which the texts can be written."""
    for unit in source.units:
        for document in unit.documents(Tally()):
            document.text.encode()


def _text(name: str, **options: Any) -> Callable[[Path, bytes], None]:
    def read(folder: Path, document: bytes) -> None:
        (folder / name).write_bytes(document)
        _documents(text_source([folder / name], **options))

    return read


def _lines(folder: Path) -> st.SearchStrategy[bytes]:
    lines = st.lists(st.sampled_from(ROWS).flatmap(hostile.json_document), min_size=1, max_size=4).map(b"\n".join)
    return lines | hostile.damaged("\n".join(map(json.dumps, ROWS)).encode())


def _packed(pack: Callable[[bytes], bytes]) -> Callable[[Path], st.SearchStrategy[bytes]]:
    good = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return lambda folder: hostile.damaged(pack(good)) | _lines(folder).map(pack)


def _parquet_documents(folder: Path) -> st.SearchStrategy[bytes]:
    texts = [row["text"] for row in ROWS] * 20
    tables = []
    for i, options in enumerate(
        [
            {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}, {"row_group_size": 7},
            {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
            {"data_page_version": "2.0", "compression": "snappy", "write_statistics": False, "store_schema": False},
        ]
    ):  # fmt: skip
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / f"{i}.parquet", **options)
        tables.append((folder / f"{i}.parquet").read_bytes())
    return st.sampled_from(tables).flatmap(hostile.damaged) | st.sampled_from(tables).flatmap(_tail_damaged)


def _tail_damaged(table: bytes) -> st.SearchStrategy[bytes]:
    """Changed in its footer, where a file says what it has."""
    length = int.from_bytes(table[-8:-4], "little") + 8
    return hostile.damaged(table[-length:-8]).map(
        lambda footer: table[:-length] + footer + len(footer).to_bytes(4, "little") + table[-4:]
    )


def _read_parquet(folder: Path, document: bytes) -> None:
    (folder / "a.parquet").write_bytes(document)
    _documents(parquet_source([folder / "a.parquet"], encoding_errors="replace"))


def _tokenizer_documents(folder: Path) -> st.SearchStrategy[bytes]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    kinds = [
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]),
        models.BPE({**alphabet, "</s>": 256, "ab": 257}, [("a", "b")]),
        models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"),
        models.WordPiece({"a": 0, "##b": 1, "</s>": 2, "[UNK]": 3}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0), ("</s>", -2.0), ("ab", -0.5)], 0),
    ]
    documents = []
    for model in kinds:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "ab")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<pad>"])
        documents.append(json.loads(tokenizer.to_str()))
    return st.sampled_from(documents).flatmap(hostile.json_document)


def _read_tokenizer(folder: Path, document: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(document)
    with suppress(Malformed):
        token_of(document, 3)
    tokenizer = HuggingFaceTokenizer(folder)

    def encode() -> None:
        ids = tokenizer.encode(["ab é x abab", "", "b" * 300])
        assert all(int(array.max(initial=0)) < tokenizer.vocab_size for array in ids)

    hostile.in_child(encode, 1 << 30)


def _prepared(folder: Path) -> Path:
    if not (folder / "out").exists():
        prepare_in_process(jsonl_source(folder / "a.jsonl", [f"text {i} " * 9 for i in range(40)]), folder / "out")
    return folder / "out"


def _document_of(name: str) -> Callable[[Path], st.SearchStrategy[bytes]]:
    return lambda folder: hostile.json_document(json.loads((_prepared(folder) / name).read_bytes()))


def _read_tokens(folder: Path) -> None:
    """As training does: all of the stream, in windows, and the comparison with the checksums."""
    for split in ("train", "validation"):
        dataset = TokenDataset(folder, split)
        length = max(2, min(dataset.num_tokens, 100))
        for start in range(0, dataset.num_tokens - length + 1, length - 1):
            tokens, _ = dataset.window(start, length)
            assert len(tokens) == length
            batch = make_batch(dataset, np.array([start // (length - 1)]), length - 1, Borders.loss)
            assert int(batch.input_ids.max()) <= dataset.max_token_id
        dataset.verify()


def _read_manifest(folder: Path, document: bytes) -> None:
    shutil.copytree(_prepared(folder.parent / "good"), folder / "out")
    (folder / "out" / "manifest.json").write_bytes(document)
    _read_tokens(folder / "out")


def _shard_documents(folder: Path) -> st.SearchStrategy[bytes]:
    return hostile.damaged((_prepared(folder) / "train" / "000000.arrow").read_bytes())


def _read_shard(folder: Path, document: bytes) -> None:
    shutil.copytree(_prepared(folder.parent / "good"), folder / "out")
    (folder / "out" / "train" / "000000.arrow").write_bytes(document)
    manifest = json.loads((folder / "out" / "manifest.json").read_bytes())
    manifest["splits"]["train"]["shards"][0]["num_bytes"] = len(document)
    (folder / "out" / "manifest.json").write_text(json.dumps(manifest))
    _read_tokens(folder / "out")


def _read_config(folder: Path, document: bytes) -> None:
    """The config.json of a Hugging Face model with these weights."""
    try:
        config = parse_json(document)
    except Malformed:
        return
    if isinstance(config, dict):
        check_weights(folder, from_huggingface(config, folder), WEIGHTS)


def _read_unfinished(name: str) -> Callable[[Path, bytes], None]:
    """A preparation that goes on where a stranger has changed what it left."""

    def read(folder: Path, document: bytes) -> None:
        good = folder.parent / "good"
        shutil.copytree(_prepared(good), folder / "out")
        (folder / "out" / "manifest.json").unlink()
        (folder / "out" / name).write_bytes(document)
        prepare_in_process(text_source([good / "a.jsonl"]), folder / "out")

    return read


MODEL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
WEIGHTS = {name: tuple(tensor.shape) for name, tensor in MODEL.build().state_dict().items()}
CONFIG = to_huggingface(MODEL, 24, "float32", 1)
READERS = {
    "jsonl": Reader(_lines, _text("a.jsonl")),
    "json": Reader(lambda folder: hostile.json_document(ROWS), _text("a.json")),
    "text": Reader(lambda folder: hostile.damaged("ünï\r\n\r\n\n\n".encode() * 20), _text("a.txt", separator=r"\n\n")),
    "gzip": Reader(_packed(gzip.compress), _text("a.jsonl.gz")),
    "zstd": Reader(_packed(lambda data: pa.compress(data, "zstd", asbytes=True)), _text("a.json.zst", format="jsonl")),
    "parquet": Reader(_parquet_documents, _read_parquet),
    "tokenizer": Reader(_tokenizer_documents, _read_tokenizer),
    "manifest": Reader(_document_of("manifest.json"), _read_manifest),
    "shard": Reader(_shard_documents, _read_shard),
    "config": Reader(lambda folder: hostile.json_document(CONFIG), _read_config),
    "settings": Reader(_document_of("settings.json"), _read_unfinished("settings.json")),
    "unit": Reader(_document_of("units/000000.json"), _read_unfinished("units/000000.json")),
}
