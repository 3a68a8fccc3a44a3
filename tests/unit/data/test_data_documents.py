from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import run_python, without_privileges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windlass.data import documents as documents_module
from windlass.data.documents import (
    SKIP,
    FilesUnit,
    RecordsUnit,
    SourceFile,
    split_position,
    unit_identity,
)
from windlass.data.sources import parquet_source
from windlass.data.tally import Tally
from windlass.errors import DataError


def source_file(path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(str(path), path.name, stat.st_size, stat.st_mtime_ns)


def jsonl_unit(path: Path, content: bytes, errors: str = "strict") -> RecordsUnit:
    path.write_bytes(content)
    return RecordsUnit(source_file(path), 0, len(content), b"\n", "text", errors)


def texts(unit: documents_module.Unit) -> list[str]:
    return [document.text for document in unit.documents(Tally())]


def test_a_file_is_a_document_without_byte_order_mark(tmp_path: Path) -> None:
    contents = {"a.txt": b"\xef\xbb\xbfanchor", "b.txt": "ünï\r\n".encode(), "c.txt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    unit = FilesUnit(tuple(source_file(tmp_path / name) for name in contents), "strict")
    documents = list(unit.documents(Tally()))
    assert [(d.identity, d.text) for d in documents] == [("a.txt", "anchor"), ("b.txt", "ünï\r\n")]
    assert unit.num_bytes == sum(map(len, contents.values()))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    file = source_file(path)
    with pytest.raises(
        DataError,
        match=r"latin\.txt: must be UTF-8 text, and is not at byte 3\. Fix: .*"
        r"data\.encoding_errors=replace",
    ):
        texts(FilesUnit((file,), "strict"))
    assert texts(FilesUnit((file,), "replace")) == ["caf� au lait"]
    assert texts(FilesUnit((file,), "ignore")) == ["caf au lait"]
    assert texts(FilesUnit((file,), SKIP)) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    records=st.lists(st.text("ab<|\n é", max_size=12), max_size=12),
    separator=st.sampled_from(["\n", "<|end|>", "é", "|"]),
    cuts=st.lists(st.integers(0, 120), max_size=4),
    block=st.integers(1, 9),
)
def test_any_cut_into_ranges_yields_every_record_once(
    tmp_path: Path, records: list[str], separator: str, cuts: list[int], block: int
) -> None:
    path = tmp_path / "records"
    content = separator.join(records).encode()
    path.write_bytes(content)
    expected = [t for r in content.decode().split(separator) if r.strip() and (t := r.strip("\r\n"))]
    bounds = sorted({0, len(content), *(c for c in cuts if c < len(content))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK_BYTES", block)
        file = source_file(path)
        found = [
            document
            for start, stop in pairwise(bounds)
            for document in RecordsUnit(file, start, stop, separator.encode(), None, "strict").documents(Tally())
        ]
    assert [document.text for document in found] == expected
    assert len({document.identity for document in found}) == len(found)


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one", "n": 1}\r',
        b"",
        '{"id": 7, "text": "zwö \\u00e9 \\ud83d\\ude00"}'.encode(),
        b'{"text": ""}',
        b'{"text": "last"}',
    ]
    assert texts(jsonl_unit(tmp_path / "a.jsonl", b"\n".join(lines))) == ["one", "zwö é \U0001f600", "last"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl:3: is not JSON \(.*\)\. Fix: mend or remove the line"),
        (b"[1]", r"a\.jsonl:3: must be a JSON object, not an array"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:3: has no key data\.text_key='text'; its keys are: body, id"),
        (b'{"text": 3}', r"a\.jsonl:3: must hold a string under data\.text_key='text', not a number"),
        (b'{"text": null}', r"a\.jsonl:3: must hold a string .*, not null"),
        (b'{"text": "\\ud83d"}', r"a\.jsonl:3: escapes half of a surrogate pair"),
        (b'{"text": "\xff"}', r"a\.jsonl: must be UTF-8 text, and is not at byte 26\."),
    ],
)
def test_bad_json_lines_are_told_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    good = b'{"text": "ok"}\n\n'
    unit = jsonl_unit(tmp_path / "a.jsonl", good + line + b"\n" + good)
    with pytest.raises(DataError, match=message):
        texts(unit)


def test_half_a_surrogate_pair_can_be_replaced(tmp_path: Path) -> None:
    unit = jsonl_unit(tmp_path / "a.jsonl", b'{"text": "a\\ud83db"}', errors="replace")
    assert texts(unit) == ["a?b"]


def test_parquet_rows_in_order_with_row_numbers(tmp_path: Path) -> None:
    rows = [f"row {i} é" if i % 10 else "" for i in range(2500)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"id": list(range(2500)), "text": pa.array(rows, kind)}), path, row_group_size=700)
        (unit,) = parquet_source([path]).units
        found = list(unit.documents(Tally()))
        assert [d.text for d in found] == [r for r in rows if r]
        assert found[0].identity == "a.parquet\x001"


def test_parquet_null_and_bad_utf8_are_told_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2 of column 'text' is null"):
        texts(parquet_source([path]).units[0])
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary())
    as_string = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    pq.write_table(pa.table({"text": as_string}), path)
    with pytest.raises(DataError, match=r"row 1 of column 'text' is not UTF-8 at its byte 3\. Fix: .*replace"):
        texts(parquet_source([path]).units[0])
    assert texts(parquet_source([path], encoding_errors="replace").units[0]) == ["fine", "caf�"]


def test_parquet_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"some text {i}" for i in range(5000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)  # the footer, at the end, stays sound
    path.write_bytes(content)
    (unit,) = parquet_source([path]).units
    with pytest.raises(DataError, match=r"a\.parquet: is not a sound Parquet file \(.+\)"):
        texts(unit)


def test_a_file_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    file = source_file(path)
    path.write_text("behind")  # as long as before
    os.utime(path, ns=(0, file.mtime_ns + 1))
    with pytest.raises(DataError, match=r"a\.txt: must not change while it is prepared"):
        texts(FilesUnit((file,), "strict"))
    unknown_time = SourceFile(file.path, file.name, file.size, 0)
    assert texts(FilesUnit((unknown_time,), "strict")) == ["behind"]


def test_a_file_that_goes_or_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    unit = FilesUnit((source_file(path),), "strict")
    path.chmod(0)
    with without_privileges(), pytest.raises(DataError, match=r"must be readable \(Permission denied\).*chmod"):
        texts(unit)
    path.unlink()
    with pytest.raises(DataError, match=r"must exist \(No such file or directory\)"):
        texts(unit)


def test_split_position_is_even_and_for_ever() -> None:
    positions = [split_position(f"folder/file{i}.txt") for i in range(20_000)]
    assert all(0 <= p < 1 for p in positions)
    for fraction in (0.01, 0.05, 0.5):
        assert sum(p < fraction for p in positions) / 20_000 == pytest.approx(
            fraction, abs=4 * (fraction / 20_000) ** 0.5
        )
    assert split_position("os.py") == 0.038588363595147945, "another hash would move documents between the splits"


def test_identity_of_a_unit_tells_files_apart_that_have_a_time(tmp_path: Path) -> None:
    identities = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        path = folder / "a.jsonl"
        path.write_bytes(b"{}")
        os.utime(path, ns=(5, 5))
        unit = RecordsUnit(source_file(path), 0, 2, b"\n", "text", "strict")
        timeless = RecordsUnit(replace(unit.file, mtime_ns=0), 0, 2, b"\n", "text", "strict")
        identities.append([json.dumps(unit_identity(unit)), json.dumps(unit_identity(timeless))])
    assert identities[0][0] != identities[1][0]
    assert identities[0][1] == identities[1][1]
    assert str(tmp_path) not in identities[0][1]


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from windlass.data.documents import ParquetUnit, RecordsUnit
from windlass.data.sources import parquet_source, list_files
from windlass.data.tally import Tally
path = Path(sys.argv[1])
if path.suffix == ".parquet":
    (unit,) = parquet_source([path]).units
else:
    (file,) = list_files([path], "*")
    unit = RecordsUnit(file, 0, file.size, b"\\n", "text", "strict")
count = sum(1 for _ in unit.documents(Tally()))
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(count, int(peak) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    peaks_mib = {}
    for num_rows in (2_000, 40_000):  # 3 and 60 MB; Parquet in one row group
        path = tmp_path / f"{num_rows}.{suffix}"
        rows = [os.urandom(750).hex() for _ in range(num_rows)]
        if suffix == "parquet":
            pq.write_table(pa.table({"text": rows}), path, row_group_size=num_rows, compression="none")
        else:
            path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
        result = run_python(MEMORY_SCRIPT, path)
        assert result.returncode == 0, result.stderr
        count, peak = result.stdout.split()
        assert int(count) == num_rows
        peaks_mib[num_rows] = float(peak)
    assert peaks_mib[40_000] < peaks_mib[2_000] + 25, peaks_mib
