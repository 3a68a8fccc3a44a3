"""Packed text, JSON arrays, links and Parquet that a stranger may have made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from windlass.data import json_rows, source_files
from windlass.data.sources import Source, list_files, parquet_source, text_source
from windlass.data.tally import Tally
from windlass.errors import DataError


def texts(source: Source, tally: Tally | None = None) -> list[str]:
    tally = tally or Tally()
    return [document.text for unit in source.units for document in unit.documents(tally)]


def pack(data: bytes, suffix: str) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_text_is_read_as_what_it_is(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "BLOCK_BYTES", 7)
    rows = [{"text": f"row {i} é"} for i in range(50)]
    contents = {
        "a.txt": "one é\n".encode(),
        "b.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "c.json": json.dumps(rows).encode(),
    }
    for name, data in contents.items():
        (tmp_path / f"{name}{suffix}").write_bytes(pack(data[:9], suffix) + pack(data[9:], suffix))  # two members
    assert texts(text_source([tmp_path])) == ["one é\n"] + 2 * [row["text"] for row in rows]
    (tmp_path / f"d.txt{suffix}").write_bytes(pack(b"x\n\ny\n\nz", suffix))
    assert texts(text_source([tmp_path], glob="d*", separator=r"\n\n")) == ["x", "y", "z"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_packed_text_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = pack(b'{"text": "some text"}\n' * 1000, suffix)
    for damaged in (data[:-5], data[: len(data) // 2], b"plain text", data + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\..*: is not a sound (gzip|zstd) file"):
            texts(text_source([path]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_text_that_would_fill_the_disk_or_the_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "UNPACKED_FREE_BYTES", 1 << 16)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "a"}\n' * 500_000, suffix))
    with pytest.raises(DataError, match=r"is unpacked to .* and more: no text is packed to less than one 250th"):
        texts(text_source([path]))
    monkeypatch.setattr(source_files, "MAX_UNPACKED_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(source_files, "MAX_UNPACK_RATIO", 1 << 20)
    for name in ("b.txt", "c.jsonl", "d.json"):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(pack(b'[{"text": "' + b"a" * (4 << 20), suffix))
        with pytest.raises(DataError, match=r"has a document of more than 1,048,576 bytes"):
            texts(text_source([path]))


def test_what_is_packed_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt.bz2").write_bytes(b"BZh9")
    with pytest.raises(DataError, match=r"a\.txt\.bz2: is a compressed file or an archive, of which only \.gz"):
        text_source([tmp_path])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"b\.parquet: is a table and no text\. Fix: .*data=parquet"):
        text_source([tmp_path / "b.parquet"])
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"c\.txt: is packed \(gzip\), whatever its name says"):
        texts(text_source([tmp_path / "c.txt"], encoding_errors="replace"))


def array(tmp_path: Path, content: str | bytes, **options: str) -> list[str]:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return texts(text_source([path], **options))


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_json_arrays(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", block)
    odd = ' é "[{\\'
    rows = [{"text": f"r{i}{odd}", "n": [i, {"a": None}], "x": -1.5e3} for i in range(9)]
    expected = [row["text"] for row in rows]
    for indent in (None, 2):
        for ascii_only in (False, True):
            text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
            assert array(tmp_path, "\ufeff \n" + text + "\n ", format="json") == expected
    assert array(tmp_path, "[]", format="json") == []
    assert array(tmp_path, '[{"text": ""}, {"text": "b"}]', format="json") == ["b"]


def test_how_json_files_are_read_goes_by_how_they_begin(tmp_path: Path) -> None:
    assert array(tmp_path, ' [\n{"text": "a"}]') == ["a"]
    assert array(tmp_path, '{"text": "a"}\n{"text": "b"}\n') == ["a", "b"]
    document = '{\n "name": "package"\n}\n'
    assert array(tmp_path, document) == [document]
    assert array(tmp_path, "[1]", format="text") == ["[1]"]
    (tmp_path / "b.json").write_text("{\n}")
    assert text_source([tmp_path]).formats == (("json", 1), ("text", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"body": "b"}]', r"a\.json\[1\]: has no key data\.text_key='text'; its keys are: body"),
        ("[1]", r"a\.json\[0\]: must be a JSON object, not a number.*data\.format=text"),
        ('[{"text": "a"} {"text": "b"}]', r"a comma or the end of the array is missing"),
        ('[{"text": "a"},]', r"is not JSON \(.*\).*data\.format=text"),
        ('[{"text": "a"}', r"a comma or the end of the array is missing"),
        ('[{"text": "a', r"is not JSON \(Unterminated string"),
        ('[{"text": "a"}] and more', r"has more after the end"),
        ("[" * 100_000, r"nests too deep"),
        ('[{"text": "\\ud800"}]', r"escapes half of a surrogate pair"),
        (b'[{"text": "\xff"}]', r"must be UTF-8 text, and is not at byte 11"),
    ],
)
def test_bad_json_arrays(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        array(tmp_path, content)


def test_numbers_and_depths_of_strangers_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": ' + "1" * 5000 + "}\n" + '{"text": "b", "n": ' + "[" * 100_000 + "\n")
    documents = text_source([path]).units[0].documents(Tally())
    assert next(documents).text == "a"
    with pytest.raises(DataError, match=r"a\.jsonl:2: nests too deep"):
        next(documents)
    path.write_text('{"' + "k" * 100_000 + '": 1}')
    with pytest.raises(DataError) as caught:
        texts(text_source([path]))
    assert len(str(caught.value)) < 1000


def test_what_is_mended_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud800"}\n{"text": "fine"}\n')
    (tmp_path / "c.json").write_bytes(b'[{"text": "\xff"}]')
    tally = Tally()
    assert texts(text_source([tmp_path], encoding_errors="replace"), tally) == ["caf�", "?", "fine", "�"]
    assert tally.mended_documents == 3


@pytest.mark.parametrize("separator", [r"\n\n", r"\n---\n"])
def test_separators_with_the_line_ends_of_windows(tmp_path: Path, separator: str) -> None:
    raw = separator.replace("\\n", "\n")
    (tmp_path / "a.txt").write_bytes(f"one{raw}two{raw}".encode())
    (tmp_path / "b.txt").write_bytes(f"one{raw}two{raw}".replace("\n", "\r\n").encode())
    with pytest.raises(DataError, match=r"b\.txt has lines that end with CR LF .*--separator '.*\\r\\n'"):
        texts(text_source([tmp_path], separator=separator))
    windows = separator.replace("\\n", "\\r\\n")
    tally = Tally()
    assert texts(text_source([tmp_path / "b.txt"], separator=windows), tally) == ["one", "two"]
    assert tally.separators == 2


def test_links_that_lead_away_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "1234").write_text("as the cache of Hugging Face has it")
    (folder / "a.txt").symlink_to("../../blobs/1234")
    assert texts(text_source([folder])) == ["as the cache of Hugging Face has it"]
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "hub" / "blobs" / "5678").write_text("another")
    for target in ("../../../secret", str(tmp_path / "hub" / "blobs" / "5678")):
        (folder / "b.txt").symlink_to(target)
        with pytest.raises(DataError, match=r"b\.txt: is a symbolic link that leads away from its folder"):
            list_files([folder], "**/*")
        assert len(list_files([folder], "**/*", follow_links=True)) == 2
        assert len(list_files([folder], "a*")) == 1
        (folder / "b.txt").unlink()


@pytest.mark.slow
def test_parquet_that_stands_for_more_than_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of a dictionary in thousands of rows, and rows that repeat the one before: from bytes to gigabytes."""
    monkeypatch.setattr(source_files, "UNPACKED_FREE_BYTES", 1 << 23)
    path = tmp_path / "a.parquet"
    word = pa.array(["a" * (1 << 20)])
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), word)
    pq.write_table(pa.table({"text": rows}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=r"is unpacked to .* and more"):
        texts(parquet_source([path]))
    assert pa.default_memory_pool().max_memory() - before < 400 << 20
    pq.write_table(
        pa.table({"text": ["a" * 200_000 + str(i) for i in range(400)]}),
        path,
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(DataError, match=r"is unpacked to .* and more"):
        texts(parquet_source([path]))


def test_a_dictionary_of_large_words_is_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.data.parquet.MAX_BATCH_BYTES", 1 << 16)
    path = tmp_path / "a.parquet"
    words = [chr(97 + i) * 20_000 for i in range(3)]
    rows = [words[i % 3] for i in range(200)]
    pq.write_table(pa.table({"text": rows}), path, dictionary_pagesize_limit=1 << 20)
    sizes = []

    class Watched(pq.ParquetFile):
        def iter_batches(self, batch_size: int, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            sizes.append(batch_size)
            return super().iter_batches(batch_size, *args, **kwargs)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert texts(parquet_source([path])) == rows
    assert sizes == [1], "a page of 60,012 bytes, of which each row may be a word"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"data\.text_key=text: must be one column of .*, which has 2 of that name"):
        parquet_source([path])
