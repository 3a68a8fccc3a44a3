from __future__ import annotations

import errno
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import jsonl_source, prepare_in_process, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windlass.data import shard_writer, shards
from windlass.data import sources as sources_module
from windlass.data.config import Borders
from windlass.data.loader import make_batch
from windlass.data.manifest import write_json
from windlass.data.shards import TokenDataset
from windlass.data.tokenizer import ByteTokenizer
from windlass.errors import DataError


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record batches of a few documents, shards of a few batches, and caches that hold few of either."""
    monkeypatch.setattr(shard_writer, "BATCH_TOKENS", 20)
    monkeypatch.setattr(sources_module, "MIN_UNIT_BYTES", 90)
    monkeypatch.setattr(sources_module, "UNITS_AIMED_AT", 10**9)
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(shards, "MAX_CACHED_BATCHES", 2)


def naive_stream(folder: Path, split: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The split's tokens and documents, from the texts that its tokens decode to."""
    dataset = TokenDataset(folder, split)
    tokens = np.concatenate([dataset.window(i, 1)[0] for i in range(dataset.num_tokens)])
    documents = np.cumsum(tokens == 256) - (tokens == 256)
    found = [ByteTokenizer().decode(tokens[documents == i]) for i in range(dataset.num_documents)]
    assert found == [text for text in texts if text in set(found)]
    return tokens, documents


def test_shards_hold_no_descriptors(small_pieces: None, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare_in_process(jsonl_source(tmp_path / "a.jsonl", [f"{i} " * 20 for i in range(60)]), folder)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    dataset = TokenDataset(folder, "train")
    kept = [dataset.window(start, 5) for start in range(0, dataset.num_tokens - 5, 50)]
    assert len(dataset.manifest.splits["train"].shards) > 10 and len(kept) > 10
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(("number", "says"), [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "permissions")])
def test_a_shard_that_the_system_does_not_give_is_not_damaged(
    number: int, says: str, small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    prepare_in_process(jsonl_source(tmp_path / "a.jsonl", ["text " * 20] * 4), folder)
    dataset = TokenDataset(folder, "train")

    def refuse(path: Path) -> memoryview:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(shards, "map_file", refuse)
    with pytest.raises(DataError, match=says) as caught:
        dataset.window(0, 1)
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


@pytest.mark.slow
def test_windows_over_batches_and_shards(small_pieces: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{i}" + "x" * int(rng.integers(0, 60)) for i in range(120)]
    folder = tmp_path / "out"
    prepare_in_process(jsonl_source(tmp_path / "a.jsonl", texts), folder)
    dataset = TokenDataset(folder, "train")
    assert len(dataset.manifest.splits["train"].shards) > 10
    assert len(dataset._batch_stops) > 40
    tokens, documents = naive_stream(folder, "train", texts)
    assert dataset.num_tokens == len(tokens)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
    @given(start=st.integers(0, dataset.num_tokens), length=st.integers(0, 400) | st.integers(0, dataset.num_tokens))
    def check(start: int, length: int) -> None:
        length = min(length, dataset.num_tokens - start)
        window, ids = dataset.window(start, length)
        assert (window == tokens[start : start + length]).all()
        expected = documents[start : start + length]
        assert (ids == expected - (expected[0] if length else 0)).all()
        assert (window.dtype, ids.dtype, window.shape, ids.shape) == (np.uint16, np.int32, (length,), (length,))

    check()


def test_a_window_in_one_batch_is_not_copied(make_folder) -> None:
    dataset = TokenDataset(make_folder(["some text"] * 50), "train")
    first, second = dataset.window(3, 40)[0], dataset.window(10, 5)[0]
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 10**9), (3, -1)])
def test_windows_outside_the_stream(make_folder, start: int, length: int) -> None:
    dataset = TokenDataset(make_folder(["some text"] * 20), "train")
    with pytest.raises(IndexError, match=rf"of a stream of {dataset.num_tokens}"):
        dataset.window(start, length)


def test_attributes(make_folder) -> None:
    folder = make_folder([f"text {i}" for i in range(40)])
    train, validation = TokenDataset(folder, "train"), TokenDataset(str(folder), "validation")
    assert train.num_documents + validation.num_documents == 40
    assert train.num_tokens + validation.num_tokens == sum(len(f"text {i}") + 1 for i in range(40))
    assert (train.vocab_size, train.eos_id, train.max_token_id, train.tokenizer_spec) == (257, 256, 256, "bytes")
    assert train.fingerprint == validation.fingerprint == train.manifest.fingerprint
    assert 1 < train.unigram_entropy_nats < 4
    with pytest.raises(DataError, match=r"split=test: must be one of train, validation"):
        TokenDataset(folder, "test")


def test_missing_and_truncated_shards_are_named(make_folder) -> None:
    folder = make_folder(["some text"] * 20)
    shard = folder / "train" / "000000.arrow"
    dataset = TokenDataset(folder, "train")
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    message = rf"000000\.arrow: has {len(content) - 100:,} bytes, and {len(content):,} were written"
    for action in (lambda: TokenDataset(folder, "train"), lambda: dataset.window(0, 4), dataset.verify):
        with pytest.raises(DataError, match=message):
            action()
    shard.unlink()
    for action in (lambda: TokenDataset(folder, "train"), lambda: dataset.window(0, 4), dataset.verify):
        with pytest.raises(DataError, match=r"train/000000\.arrow: is missing from the prepared folder"):
            action()
    TokenDataset(folder, "validation")


def test_folder_that_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a folder that `windlass data prepare` wrote"):
        TokenDataset(tmp_path / "nowhere", "train")


def test_verify_finds_a_flipped_bit(make_folder) -> None:
    folder = make_folder(["some text"] * 20)
    dataset = TokenDataset(folder, "train")
    dataset.verify()
    shard = folder / "train" / "000000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"000000\.arrow: its bytes are not those that were written \(SHA-256"):
        TokenDataset(folder, "train").verify()
    TokenDataset(folder, "validation").verify()


def test_shards_that_are_damaged_inside(make_folder) -> None:
    folder = make_folder(["some text"] * 20)
    shard = folder / "train" / "000000.arrow"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"000000\.arrow: is damaged \(.+\)"):
        TokenDataset(folder, "train").window(0, 4)
    shard.write_bytes(content)
    manifest = TokenDataset(folder, "train").manifest
    info = manifest.splits["train"].shards[0]
    for counts, says in (
        ([info.num_tokens - 1], r"does not add up"),
        ([info.num_tokens - 5, 5], r"000000\.arrow: is damaged \(its number of record bat"),
    ):
        info.batch_num_tokens[:] = counts
        manifest.save(folder)
        with pytest.raises(DataError, match=says):
            TokenDataset(folder, "train").window(0, 4)


def crafted(folder: Path, old: bytes, new: bytes, more_tokens: int = 0) -> None:
    """Changes bytes of the only training shard, and has the manifest agree."""
    shard = folder / "train" / "000000.arrow"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new, 1))
    manifest = TokenDataset(folder, "train").manifest
    info = manifest.splits["train"].shards[0]
    changed = replace(info, num_tokens=info.num_tokens + more_tokens, batch_num_tokens=[info.num_tokens + more_tokens])
    split = replace(manifest.splits["train"], num_tokens=changed.num_tokens, shards=[changed])
    replace(manifest, splits={**manifest.splits, "train": split}).save(folder)


@pytest.mark.parametrize("more", [1, 100, 1 << 28])
def test_a_shard_that_claims_more_tokens_than_it_has(make_folder, more: int) -> None:
    """Bytes behind the tokens, and behind the file, are never read as tokens."""
    folder = make_folder(["some text"] * 20)
    num_tokens = TokenDataset(folder, "train").num_tokens
    crafted(folder, struct.pack("<qq", num_tokens, 0), struct.pack("<qq", num_tokens + more, 0), more_tokens=more)
    with pytest.raises(DataError, match=r"is damaged|more tokens than bytes"):
        TokenDataset(folder, "train").window(0, num_tokens + more)


@pytest.mark.parametrize("start", [-5, 3, 1 << 40])
def test_a_document_that_starts_elsewhere(make_folder, start: int) -> None:
    folder = make_folder(["some text"] * 20)
    crafted(folder, struct.pack("<3q", 0, 10, 20), struct.pack("<3q", 0, 200 if start == 3 else start, 20))
    with pytest.raises(DataError, match="is damaged"):
        TokenDataset(folder, "train").window(0, 4)


def test_a_flipped_bit_that_makes_a_token_of_another_vocabulary(make_folder) -> None:
    folder = make_folder(["some text"] * 20)
    crafted(folder, struct.pack("<3H", *b"som"), struct.pack("<3H", ord("s"), ord("o") | 0x8000, ord("m")))
    with pytest.raises(DataError, match=r"000000\.arrow: is damaged \(it has the token 32879, and its largest was 256"):
        make_batch(TokenDataset(folder, "train"), np.array([0]), 16, Borders.loss)


@pytest.mark.slow
def test_readers_share_nothing_that_threads_could_break(small_pieces: None, make_folder) -> None:
    from concurrent.futures import ThreadPoolExecutor

    dataset = TokenDataset(make_folder([f"{i} text" for i in range(100)]), "train")
    expected = dataset.window(0, dataset.num_tokens)[0].copy()

    def read(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, dataset.num_tokens - 30, 300).tolist()
        return all((dataset.window(s, 30)[0] == expected[s : s + 30]).all() for s in starts)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
import numpy as np
from windlass.data.shards import TokenDataset
def anonymous_kib():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
dataset = TokenDataset(sys.argv[1], "train")
dataset.window(0, 1000)
before, total = anonymous_kib(), 0
for start in range(0, dataset.num_tokens - 4096, 4096):
    total += int(dataset.window(start, 4096)[0][7])
print(dataset.num_tokens, (anonymous_kib() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_reading_everything_takes_no_memory(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare_in_process(jsonl_source(tmp_path / "a.jsonl", ["0123456789abcde" * 60_000] * 40), folder)
    result = run_python(MEMORY_SCRIPT, folder)
    assert result.returncode == 0, result.stderr
    num_tokens, grown_mib = result.stdout.split()
    assert int(num_tokens) * 2 > 40 * 2**20
    assert float(grown_mib) < 8


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert re.sub(r"\s", "", path.read_text()) == '{"old":1}'
    assert list(tmp_path.iterdir()) == [path]
