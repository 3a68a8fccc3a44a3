from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import without_privileges

from windlass.data import sources as sources_module
from windlass.data.config import EncodingErrors, ParquetDataConfig, StdlibDataConfig, TextDataConfig
from windlass.data.documents import FilesUnit, ParquetUnit, RecordsUnit
from windlass.data.sources import (
    Source,
    list_files,
    parquet_source,
    stdlib_source,
    text_source,
)
from windlass.data.tally import Tally
from windlass.errors import ConfigError, DataError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return root


def texts(source: Source) -> list[str]:
    return [document.text for unit in source.units for document in unit.documents(Tally())]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/*", ["a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt"]),
        ("*", ["a.txt", "b.md"]),
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "sub/c.txt", "sub/deep/d.txt"]),
        ("sub/**", ["sub/c.txt", "sub/deep/d.txt"]),
        ("sub/*", ["sub/c.txt"]),
        ("?.md", ["b.md"]),
        ("**/[!a-b].*", ["sub/c.txt", "sub/deep/d.txt"]),
        ("**/[cd].txt", ["sub/c.txt", "sub/deep/d.txt"]),
        ("a.tx", None),
    ],
)
def test_glob(tmp_path: Path, glob: str, expected: list[str] | None) -> None:
    tree(tmp_path, "b.md", "sub/deep/d.txt", "a.txt", "sub/c.txt", ".hidden", ".git/config")
    if expected is None:
        with pytest.raises(DataError, match=r"has no files that match data\.glob='a\.tx'"):
            list_files([tmp_path], glob)
    else:
        assert [file.name for file in list_files([tmp_path], glob)] == expected


def test_bad_glob(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match=r"data\.glob=\[z-a\]: is not a glob pattern"):
        list_files([tmp_path], "[z-a]")


def test_several_inputs_keep_their_order_and_names(tmp_path: Path) -> None:
    tree(tmp_path, "z/a.txt", "b/a.txt", "one.txt")
    names = [file.name for file in list_files([tmp_path / "z", tmp_path / "one.txt", tmp_path / "b"], "**/*")]
    assert names == ["z/a.txt", "one.txt", "b/a.txt"]


def test_a_file_given_twice(tmp_path: Path) -> None:
    tree(tmp_path, "sub/a.txt")
    with pytest.raises(ConfigError, match=r"a\.txt: must be given once"):
        list_files([tmp_path, tmp_path / "sub"], "**/*")


def test_missing_folder_and_empty_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*nowhere: must exist"):
        list_files([tmp_path / "nowhere"], "**/*")
    tree(tmp_path, "file.txt")
    with pytest.raises(DataError, match=r"must exist \(Not a directory\)"):
        list_files([tmp_path / "file.txt" / "inside"], "**/*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: has no files that match"):
        list_files([tmp_path / "empty"], "**/*")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match=r"has no text: all 1 files are empty"):
        list_files([tmp_path / "empty"], "**/*")


def test_folders_that_may_not_be_read_are_not_passed_over() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users as a whole
        folder = tree(Path(name), "a.txt", "locked/b.txt")
        folder.chmod(0o755)
        (folder / "locked").chmod(0)
        with without_privileges(), pytest.raises(DataError, match=r"locked: must be readable \(Permission denied"):
            list_files([folder], "**/*")
        (folder / "locked").chmod(0o755)


def test_broken_links_are_named_and_other_than_files_left_out(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert [file.name for file in list_files([tmp_path], "**/*")] == ["a.txt"]
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(DataError, match=r"link: must exist"):
        list_files([tmp_path], "**/*")


def test_order_does_not_depend_on_the_place_and_the_fingerprint_does(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "a.txt", "c.jsonl"]
    for place, order in (("x", names), ("y", names[::-1])):
        tree(tmp_path / place, *order)
        for path in (tmp_path / place).rglob("*.*"):
            path.write_text('{"text": "t"}')
            os.utime(path, ns=(1, 1))
    first, second = text_source([tmp_path / "x"]), text_source([tmp_path / "y"])
    assert texts(first) == texts(second)
    assert first.fingerprint != second.fingerprint == text_source([tmp_path / "y"]).fingerprint
    os.utime(tmp_path / "y" / "b.txt", ns=(1, 2))
    assert text_source([tmp_path / "y"]).fingerprint != second.fingerprint


@pytest.mark.parametrize(
    "options", [{"text_key": "body"}, {"encoding_errors": "replace"}, {"separator": "|"}, {"format": "jsonl"}]
)
def test_fingerprint_depends_on_how_files_are_read(tmp_path: Path, options: dict) -> None:
    tree(tmp_path, "a.txt")
    assert text_source([tmp_path], **options).fingerprint != text_source([tmp_path]).fingerprint


def test_text_and_json_lines_mixed_stay_in_order(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "c.txt")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = text_source([tmp_path])
    assert texts(source) == ["text of a.txt", "one", "two", "text of c.txt"]
    assert [type(unit) for unit in source.units] == [FilesUnit, RecordsUnit, FilesUnit]
    assert texts(text_source([tmp_path / "b.jsonl"], format="text")) == ['{"text": "one"}\n{"text": "two"}\n']


def test_separator_splits_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|end|>\ntwo\nlines<|end|>\n")
    assert texts(text_source([tmp_path], separator="<|end|>")) == ["one", "two\nlines"]
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n\nthree")
    assert texts(text_source([tmp_path], separator=r"\n\n")) == ["one", "two", "three"]


def test_units_are_cut_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MIN_UNIT_BYTES", 40)
    monkeypatch.setattr(sources_module, "UNITS_AIMED_AT", 1000)
    tree(tmp_path / "t", *(f"{i}.txt" for i in range(7)))  # 13 bytes each
    assert [len(unit.files) for unit in text_source([tmp_path / "t"]).units] == [4, 3]  # type: ignore[union-attr]
    (tmp_path / "a.jsonl").write_text('{"text": "0123456789"}\n' * 10)  # 23 bytes each
    source = text_source([tmp_path / "a.jsonl"])
    assert len(source.units) == 6
    assert texts(source) == ["0123456789"] * 10
    overlapping = text_source([tmp_path / "a.jsonl"], format="text", separator="\n\n")
    assert len(overlapping.units) == 1, "cuts would depend on where the search for the separator began"


def test_parquet_units_cover_the_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MIN_UNIT_BYTES", 1000)
    monkeypatch.setattr(sources_module, "UNITS_AIMED_AT", 10**9)
    rows = [f"{i:0100d}" for i in range(50)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    source = parquet_source([tmp_path])
    assert len(source.units) == 5
    assert all(isinstance(unit, ParquetUnit) for unit in source.units)
    assert texts(source) == rows
    identities = [d.identity for unit in source.units for d in unit.documents(Tally())]
    assert identities == [f"a.parquet\0{i}" for i in range(50)]


def test_parquet_errors_name_the_file_and_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"data\.text_key=text: must be a column of .*a\.parquet, which has: id, body"):
        parquet_source([path])
    with pytest.raises(DataError, match=r"must be a string column of .*, not int64\. Fix: .*string column, of: body"):
        parquet_source([path], text_key="id")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=r"its 1 Parquet files have no rows"):
        parquet_source([path])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.parquet: is not a sound Parquet file \(.*footer.*\)"):
        parquet_source([tmp_path])


def test_stdlib_is_python_source_without_tests_and_packages() -> None:
    source = stdlib_source()
    names = [file.name for unit in source.units for file in unit.files]  # type: ignore[union-attr]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
    assert all(name.endswith(".py") for name in names)
    assert len(source.units) > 4
    assert source.num_bytes > 5e6
    assert sum(document.num_bytes for unit in source.units for document in unit.documents(Tally())) == source.num_bytes
    assert stdlib_source().fingerprint == source.fingerprint


def test_stdlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"has no standard library in source"):
        stdlib_source()


def test_the_source_of_a_configuration(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "b.md")
    cfg = TextDataConfig(path=str(tmp_path), glob="*.txt", encoding_errors=EncodingErrors.replace)
    expected = text_source([tmp_path], glob="*.txt", encoding_errors="replace")
    assert cfg.source().fingerprint == expected.fingerprint
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert texts(ParquetDataConfig(path=str(tmp_path), text_key="body").source()) == ["x"]
    assert StdlibDataConfig().source().name == "stdlib"
    with pytest.raises(ConfigError, match=r"data\.path=\?\?\?: must name the file or folder"):
        TextDataConfig().source()
    with pytest.raises(ConfigError, match=r"data\.separator"):
        TextDataConfig(separator="")
