from __future__ import annotations

import functools
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_lossy_tokenizer, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from windlass.data.tally import Tally
from windlass.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    encode_counting,
    load_tokenizer,
    token_of,
)
from windlass.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXT))
def test_bytes_are_utf8(texts: list[str]) -> None:
    tokenizer = ByteTokenizer()
    arrays = tokenizer.encode(texts)
    assert [list(a) for a in arrays] == [list(t.encode("utf-8")) for t in texts]
    assert all(a.dtype == np.uint16 for a in arrays)
    assert [tokenizer.decode(a) for a in arrays] == texts


def test_byte_tokenizer_leaves_out_eos_and_mends_cut_characters() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == tokenizer.eos_id + 1 == 257
    assert tokenizer.decode([104, 105, 256, 195]) == "hi�"


def test_hugging_face_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path))
    text = "the windlass lifts the anchor, and a </s> in the text is text; ünïcödé too"
    short, long = tokenizer.encode(["", text])
    assert short.size == 0
    assert long.dtype == np.uint32
    assert long.size > 4, "the truncation of the file is off"
    assert tokenizer.eos_id not in long, "neither added at the end nor found inside the text"
    assert tokenizer.decode(long) == text
    assert tokenizer.decode([*long, tokenizer.eos_id]) == text
    assert max(tokenizer.encode(["the windlass"])[0]) < tokenizer.vocab_size


def test_vocab_size_covers_gaps_between_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"a": 0, "b": 7, "<eos>": 3}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (8, 3)


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    first = HuggingFaceTokenizer(write_tokenizer(folders[0]))
    same = HuggingFaceTokenizer(write_tokenizer(folders[1]))
    other = HuggingFaceTokenizer(write_tokenizer(folders[2], eos="<|endoftext|>"))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_survives_pickling(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert (copy.encode(["anchor"])[0] == tokenizer.encode(["anchor"])[0]).all()


def test_load_tokenizer_takes_bytes_a_file_and_a_folder(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    loaded = [load_tokenizer(spec) for spec in ("bytes", str(path), str(tmp_path))]
    assert all(isinstance(tokenizer, Tokenizer) for tokenizer in loaded)
    assert isinstance(loaded[0], ByteTokenizer)
    assert loaded[1].fingerprint == loaded[2].fingerprint


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*nowhere\.json: must be `bytes` or an existing"):
        load_tokenizer(str(tmp_path / "nowhere.json"))


def test_malformed_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"version": "1.0"}\xff')
    with pytest.raises(ConfigError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(path))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_an_end_of_document_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must have a token that ends a document, one of </s>"):
        HuggingFaceTokenizer(write_tokenizer(tmp_path, eos="[CLS]"))


def written(tmp_path: Path, **model: object) -> Path:
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**document, "pre_tokenizer": None, "post_processor": None, "decoder": None, **model}))
    return path


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "[UNK]": 2}, "unk_token": "[UNK]"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {**WORDS, "unk_token": "nope"}}, r"cannot make tokens of a text \(WordLevel error: Missing \[UNK\]"),
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["</s>", 0.0]], "unk_id": None}},
            r"cannot make tokens of a text \(Encountered an unknown token",
        ),
        (
            {
                "model": WORDS,
                "pre_tokenizer": {
                    "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
                },
            },
            r"cannot make tokens of a text \(Onig: ",
        ),
        ({"model": WORDS, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, r"is not a Hugging"),
        ({"model": {**WORDS, "vocab": {"a": 0, "</s>": 1, "[UNK]": 2**32 - 1}}}, r"must have ids below 4,194,304"),
    ],
)  # fmt: skip
def test_what_the_library_fails_or_panics_with_is_one_message(tmp_path: Path, parts: dict, message: str) -> None:
    pytest.importorskip("tokenizers")
    path = written(tmp_path, **parts)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(path)).encode(["b " + "x" * 3000])


def test_a_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"cannot be read: it is no regular file"):
        load_tokenizer(str(tmp_path))


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = written(tmp_path, model=WORDS, pre_tokenizer={"type": "WhitespaceSplit"})
    tally = Tally()
    arrays = encode_counting(load_tokenizer(str(path)), ["a b", "c", "a"], tally)
    assert [list(ids) for ids in arrays] == [[0, 2], [2], [0]]
    assert tally == Tally(unknown_tokens=2)


@given(st.lists(st.text("abé你 ", max_size=9), max_size=5))
def test_dropped_characters_are_counted_and_ids_are_the_librarys(texts: list[str]) -> None:
    lossy, library = lossy_and_library()
    tally = Tally()
    arrays = lossy.encode_counting(texts, tally)
    assert [list(ids) for ids in arrays] == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert tally.dropped_characters == sum(text.count("é") + text.count("你") for text in texts)


@functools.cache
def lossy_and_library() -> tuple[HuggingFaceTokenizer, object]:
    tokenizers = pytest.importorskip("tokenizers")
    with tempfile.TemporaryDirectory() as folder:
        path = write_lossy_tokenizer(Path(folder))
        return HuggingFaceTokenizer(path), tokenizers.Tokenizer.from_file(str(path))


def test_tokenizers_of_bytes_drop_nothing_and_are_not_asked_twice(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path))
    tally = Tally()
    tokenizer.encode_counting(["ünï 你好"], tally)
    assert tokenizer._marking is None and tally == Tally()


def test_what_was_read_goes_to_other_processes(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(path))
    path.write_text("{}")
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("document", "token"),
    [
        ({"added_tokens": [{"id": 3, "content": "<x>"}], "model": {"vocab": {"y": 3}}}, "<x>"),
        ({"added_tokens": None, "model": {"vocab": {"y": 3}}}, "y"),
        ({"model": {"vocab": [["a", 0], ["b", 0], ["c", 0], ["d", 0]]}}, "d"),
        ({"added_tokens": 3, "model": {"vocab": [[], [], [], []]}}, None),
        ({"model": []}, None),
    ],
)
def test_the_name_of_a_token(document: dict, token: str | None) -> None:
    assert token_of(json.dumps(document).encode(), 3) == token


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'pip install "windlass\[hf\]"'):
        load_tokenizer(str(path))
