"""Conversations become a prepared folder, whose tokenizer stays with it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import InProcessPool, folder_bytes, prepare_in_process
from support.chat import FAMILIES, write_chat_folder, write_template

from windlass import cli
from windlass.conf.compose import compose
from windlass.data import prepare as prepare_module
from windlass.data.chat import chat_source
from windlass.data.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from windlass.data.config import ChatDataConfig, TokensDataConfig
from windlass.data.kept_tokenizer import tokenizer_of
from windlass.data.manifest import Manifest
from windlass.data.prepare import prepared_folder, vocab_size_of
from windlass.data.shards import TokenDataset
from windlass.errors import ConfigError, DataError, WindlassError

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.slow  # transformers takes seconds to import

FAMILY = FAMILIES["chatml"]
NUM_ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("model"), FAMILY)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [{"instruction": f"What is {i}?", "input": "", "output": f"The anchor, {i} of it."} for i in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_what_is_prepared(folder: Path, rows: Path, tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(str(folder))
    manifest = prepare_in_process(chat_source([rows]), tmp_path / "out", 0.2, tokenizer)
    assert manifest.tally.answers == NUM_ROWS and manifest.tally.unended_answers == 0
    shutil.rmtree(tmp_path / "out" / "units")
    learned = []
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        dataset.verify()
        starts = dataset.document_starts()
        assert len(starts) == dataset.num_documents + 1 and starts[-1] == dataset.num_tokens
        flags = dataset.targets(0, dataset.num_tokens)
        assert flags is not None and int(flags.sum()) == dataset.num_targets
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            ids, _ = dataset.window(start, stop - start)
            text = tokenizer.decode(ids)
            assert text.startswith("<|im_start|>system\nYou are") and text.endswith("<|im_end|>\n")
            learned.append(tokenizer.decode(ids[flags[start:stop] != 0]))
    assert sorted(learned) == sorted(f"The anchor, {i} of it.<|im_end|>" for i in range(NUM_ROWS))
    assert dataset.max_token_id == max(
        int(TokenDataset(tmp_path / "out", s).window(0, 10**3)[0].max()) for s in ["train"]
    )
    kept = load_chat_tokenizer(str(tmp_path / "out"))
    assert kept.files == tokenizer.files and kept.files_fingerprint == tokenizer.files_fingerprint
    info, content = tokenizer_of(dataset)
    assert content == (folder / "tokenizer.json").read_bytes() and info.eos_token == "<|im_end|>"


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        made = [{"prompt": f"Q{number} {i}", "completion": f"A {i}"} for i in range(20)]
        (tmp_path / f"in{number}.json").write_text(json.dumps(made))
    files, tokenizer = sorted(tmp_path.glob("in*.json")), load_chat_tokenizer(str(folder))
    prepare_in_process(chat_source(files), tmp_path / "whole", 0.2, tokenizer)
    encode, calls = ChatTokenizer.encode_conversation, iter(range(1000))

    def failing(self: ChatTokenizer, *args: Any) -> Any:
        if next(calls) == 50:
            raise KeyboardInterrupt
        return encode(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, "encode_conversation", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare_in_process(chat_source(files), tmp_path / "again", 0.2, tokenizer)
    assert len(list((tmp_path / "again" / "units").iterdir())) == 2
    done = []
    monkeypatch.setattr(ChatTokenizer, "encode_conversation", lambda self, *args: done.append(0) or encode(self, *args))
    prepare_in_process(chat_source(files), tmp_path / "again", 0.2, load_chat_tokenizer(str(folder)))
    assert len(done) == 40, "two of the four files were done"
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "whole")


def test_the_cache_knows_tokenizer_template_and_settings(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    monkeypatch.setattr(prepare_module, "WorkerPool", InProcessPool)

    def prepared(**changes: Any) -> Path:
        options = {"path": str(rows), "tokenizer": str(model), "cache_dir": str(tmp_path / "cache"), **changes}
        return prepared_folder(ChatDataConfig(**options), progress=False)

    first = prepared()
    with monkeypatch.context() as patch:
        patch.setattr(
            "windlass.data.chat_tokenizer._load", lambda *_: pytest.fail("a finished folder needs no library")
        )
        assert prepared() == first
    assert prepared(validation_fraction=0.3) != first
    write_template(model, FAMILY, FAMILY.marked)
    second = prepared()
    assert second != first
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    assert prepared() not in (first, second)
    datasets = [TokenDataset(path, "train") for path in (first, second)]
    assert np.array_equal(*(dataset.targets(0, dataset.num_tokens) for dataset in datasets))
    assert datasets[0].fingerprint == datasets[1].fingerprint, "the same tokens, whatever made them"


def test_a_prepared_folder_is_trained_on_without_the_model(folder: Path, rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    out = tmp_path / "out"
    prepare_in_process(chat_source([rows]), out, 0.2, load_chat_tokenizer(str(model)))
    assert prepared_folder(ChatDataConfig(path=str(out), tokenizer=str(model))) == out
    assert vocab_size_of(ChatDataConfig(path=str(out))) == Manifest.load(out).tokenizer["vocab_size"]
    other = write_chat_folder(tmp_path / "other", FAMILIES["llama_3"])
    with pytest.raises(ConfigError, match=r"is not the tokenizer that .*out was prepared with"):
        prepared_folder(ChatDataConfig(path=str(out), tokenizer=str(other)))
    shutil.rmtree(model)
    assert prepared_folder(ChatDataConfig(path=str(out), tokenizer=str(model))) == out
    with pytest.raises(DataError, match=r"holds conversations, .*Fix: set data=chat data\.path="):
        prepared_folder(TokensDataConfig(path=str(out)))


def test_text_that_was_prepared_is_no_conversations(make_folder: Any) -> None:
    with pytest.raises(DataError, match=r"was prepared from text and not from conversations. Fix: set data=tokens"):
        prepared_folder(ChatDataConfig(path=str(make_folder(["a", "b", "c", "d", "e", "f"] * 4))))


def broken(folder: Path, tmp_path: Path, what: str) -> Path:
    """A folder of a tokenizer that cannot be used."""
    path = tmp_path / "broken"
    shutil.copytree(folder, path)
    if what == "template":
        (path / "chat_template.jinja").unlink()
    elif what in ("gguf", "sentencepiece"):
        name = {"gguf": "model.Q4_K.gguf", "sentencepiece": "tokenizer.model"}[what]
        (path / "tokenizer.json").rename(path / name)
    elif what == "missing":
        (path / "tokenizer.json").unlink()
    elif what == "damaged":
        (path / "tokenizer.json").write_text("{}")
    elif what == "syntax":
        (path / "chat_template.jinja").write_text("{% for %}")
    elif what == "code":
        (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    elif what == "no_eos":
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("template", "has no chat template. Fix: put one into it as chat_template.jinja"),
        ("gguf", r"only model\.Q4_K\.gguf\. Fix: convert it once: .*gguf_file='model\.Q4_K\.gguf'\)\.save_pretrained"),
        ("sentencepiece", r"only tokenizer\.model\. Fix: convert it once: .*save_pretrained\('NEW_FOLDER'\)"),
        ("missing", r"has no tokenizer\.json\. Fix: give a folder"),
        ("damaged", "cannot be loaded by transformers"),
        ("syntax", "its chat template refuses it"),
        ("code", r"auto_map.*does not run"),
        ("no_eos", "has no eos_token"),
    ],
)
def test_folders_that_are_no_tokenizers(folder: Path, rows: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(WindlassError, match=message):
        tokenizer = load_chat_tokenizer(str(broken(folder, tmp_path, what)))
        prepare_in_process(chat_source([rows]), tmp_path / "out", 0.2, tokenizer)


def test_no_folder_at_all(rows: Path, tmp_path: Path) -> None:
    for name in (None, "bytes", str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=r"data\.tokenizer=.*must (name the|be a) Hugging Face folder"):
            load_chat_tokenizer(name)


@pytest.mark.parametrize("library", ["transformers", "jinja2"])
def test_a_library_that_is_missing(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf'needs the library {library}.*pip install "windlass\[hf\]"'):
        load_chat_tokenizer(str(folder)).eos_id  # noqa: B018


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "model", FAMILIES["gemma"])
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "Q", "completion": "A"}\n{"system": "S", "instruction": "Q", "output": "A"}\n'
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:2: its chat template refuses it \(System role not supported\)"):
        source = chat_source([tmp_path / "rows.jsonl"])
        prepare_in_process(source, tmp_path / "out", 0.2, load_chat_tokenizer(str(folder)))


def test_the_tokenizer_of_a_run_is_that_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose(["data=chat", "data.path=x"]).data.tokenizer is None
    assert compose(["data=text", "data.path=x"]).data.tokenizer == "bytes"
    monkeypatch.setattr("windlass.models.config.ModelConfig.folder", property(lambda self: "/models/a"))
    assert compose(["data=chat", "data.path=x"]).data.tokenizer == "/models/a"
    assert compose(["data=text", "data.path=x"]).data.tokenizer == "/models/a"
    assert compose(["data=text", "data.path=x", "data.tokenizer=bytes"]).data.tokenizer == "bytes"


def test_show(folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", str(rows), "--tokenizer", str(folder), "--num", "1", "--seq-len", "10"]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n\u27e6The anchor, 0 of it.<|im_end|>\u27e7\n" in shown
    assert re.search(rf"rows: +{NUM_ROWS}\n", shown) and f"{NUM_ROWS} of more than 10 tokens" in shown
    prepare_in_process(chat_source([rows]), tmp_path / "out", 0.2, load_chat_tokenizer(str(folder)))
    assert cli.main(["data", "show", str(tmp_path / "out"), "--num", "2", "--split", "validation"]) == 0
    prepared = capsys.readouterr().out
    assert prepared.count("\u27e6") == 2 and "The anchor" in prepared
    assert cli.main(["data", "show", str(rows)]) == 2
    assert "data.tokenizer=None: must name the Hugging Face folder" in capsys.readouterr().err


def test_show_in_colour(
    folder: Path, rows: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["data", "show", str(rows), "--tokenizer", str(folder), "--num", "1"]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for is_coloured in (True, False):
        monkeypatch.setattr("windlass.data.show.sys.stdout.isatty", lambda: True, raising=False)
        assert cli.main(arguments) == 0
        assert ("\x1b[32mThe anchor, 0 of it.<|im_end|>\x1b[0m" in capsys.readouterr().out) == is_coloured
        monkeypatch.setenv("NO_COLOR", "1")
