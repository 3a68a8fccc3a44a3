from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import InProcessPool, write_tokenizer

from windlass.data import prepare as prepare_module
from windlass.data.cli import add_parser, run
from windlass.data.shards import TokenDataset
from windlass.errors import ConfigError, DataError, WindlassError
from windlass.text import override


def call(*args: object) -> int:
    parser = argparse.ArgumentParser(prog="windlass data")
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(["prepare", *map(str, args)]))


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "WorkerPool", InProcessPool)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "my texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text number {i}")
    return folder


def test_summary(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "the tokens"
    assert call(texts, "--out", out, "--validation-fraction", 0.3) == 0
    train, validation = TokenDataset(out, "train"), TokenDataset(out, "validation")
    printed = capsys.readouterr().out
    assert f"documents:       {train.num_documents} train, {validation.num_documents} validation\n" in printed
    assert f"tokens:          {train.num_tokens} train, {validation.num_tokens} validation\n" in printed
    assert f"unigram entropy: {train.unigram_entropy_nats:.4f} nats/token" in printed
    assert f"train on it:     windlass train data=tokens {override('data.path', out)}\n" in printed
    assert "tokens/s" in printed
    assert call(texts, "--out", out, "--validation-fraction", 0.3) == 0, "the same again is done already"
    assert "speed:           an earlier run did part or all\n" in capsys.readouterr().out


def test_options_reach_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"body": f"caf{i}"}) + "\n" for i in range(20))
    (tmp_path / "in" / "a.log").write_bytes(lines.encode() + b'{"body": "\xff"}\n')
    (tmp_path / "in" / "b.skip").write_text("not JSON")
    args = ("--format", "jsonl", "--text-key", "body", "--glob", "*.log", "--validation-fraction", 0.3)
    with pytest.raises(DataError, match=r"must be UTF-8"):
        call(tmp_path / "in", "--out", tmp_path / "strict", *args)
    call(tmp_path / "in", "--out", tmp_path / "out", *args, "--encoding-errors", "replace", "--num-workers", 1)
    assert "21" not in capsys.readouterr().err
    info = TokenDataset(tmp_path / "out", "train").manifest.splits
    assert info["train"].num_documents + info["validation"].num_documents == 21


def test_separator_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"the anchor {i}" for i in range(30)))
    tokenizer = write_tokenizer(tmp_path)
    call(tmp_path / "a.txt", "--out", tmp_path / "out", "--separator", r"\n\n", "--tokenizer", tokenizer,
         "--validation-fraction", 0.3)  # fmt: skip
    dataset = TokenDataset(tmp_path / "out", "train")
    assert dataset.num_documents > 10
    assert dataset.manifest.tokenizer["spec"] == "tokenizer.json"


def test_parquet_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20)]}), tmp_path / "in" / "a.parquet")
    call(tmp_path / "in", "--out", tmp_path / "out", "--validation-fraction", 0.3)
    (tmp_path / "in" / "README.md").write_text("read me")
    with pytest.raises(ConfigError, match=r"--format=auto: 1 of the 2 files are Parquet and the others are not"):
        call(tmp_path / "in", "--out", tmp_path / "mixed")
    call(tmp_path / "in", "--out", tmp_path / "said", "--validation-fraction", 0.3, "--format", "parquet")
    fingerprints = {TokenDataset(tmp_path / name, "train").fingerprint for name in ("out", "said")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--validation-fraction", "1"], r"--validation-fraction=1\.0: must be between 0 and 1"),
        (["--num-workers", "0"], r"--num-workers=0: must be at least 1"),
        (["--separator", ""], r"--separator='': must not be empty"),
        (["--tokenizer", "nowhere.json"], r"data\.tokenizer=nowhere\.json: must be `bytes` or an existing"),
    ],
)
def test_mistakes(texts: Path, tmp_path: Path, args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(texts, "--out", tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_out_inside_the_input(texts: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out=.*tokens: must not lie inside the input"):
        call(texts, "--out", texts / "tokens")


@pytest.mark.parametrize("args", [[], ["text"], ["text", "--out", "x", "--format", "csv"]])
def test_wrong_arguments_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert caught.value.code == 2
    assert not issubclass(SystemExit, WindlassError)
    assert "usage: windlass data prepare" in capsys.readouterr().err
