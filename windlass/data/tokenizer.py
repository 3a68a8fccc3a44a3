"""Text to token ids: raw UTF-8 bytes, or any Hugging Face `tokenizer.json`. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from windlass.data.source_files import said
from windlass.data.tally import Tally
from windlass.errors import ConfigError, require
from windlass.untrusted import Malformed, parse_json, read_bytes

EOS_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "[SEP]",
)
"""The names under which tokenizers keep their end-of-document token, the most telling first."""
MAX_FILE_BYTES = 128 << 20
"""The most of a tokenizer.json: those of a quarter of a million tokens have 35 MB."""
MAX_VOCAB_SIZE = 1 << 22
"""Tokens are counted by id, so a single large one would take the memory of all below it."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Must be picklable: documents are tokenised in other processes."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends every document; `encode` does not add it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that differs whenever the ids of some text would."""
        ...

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One integer array [num_tokens] a text, without the end-of-document id."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256 ends a document. Needs no vocabulary file and loses nothing."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    fingerprint = "utf-8-bytes-eos256"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One uint16 array [num_bytes] a text; all are views of one buffer."""
        encoded = [text.encode("utf-8") for text in texts]
        joined = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint16)
        arrays, start = [], 0
        for data in encoded:
            arrays.append(joined[start : start + len(data)])
            start += len(data)
        return arrays

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without end-of-document ids; bytes that are not UTF-8 become U+FFFD."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library (the extra `windlass[hf]`).

    No special tokens are added, none are recognised inside the text (a document that mentions `</s>` does not
    end there), and the truncation and padding that the file may ask for are off. The file is read once: what it says
    goes along to other processes, and into what is prepared, whatever becomes of the file.

    Args:
        content: what the file at `path` said; None reads it.

    Raises:
        ConfigError: the library or the file is missing, the file is malformed, or no token ends a document.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self.path = Path(path) if content is not None else _tokenizer_file(Path(path).expanduser())
        self.content = _read(self.path) if content is None else content
        self._tokenizer = _parse(self.path, self.content)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_token = _find_eos(self.path, vocab)
        self.eos_id = vocab[self.eos_token]
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps, so not the number of tokens
        require(
            self.vocab_size <= MAX_VOCAB_SIZE,
            "data.tokenizer",
            self.path,
            f"must have ids below {MAX_VOCAB_SIZE:,}, and has one of {self.vocab_size - 1:,}",
            "give its tokens ids without such gaps",
        )
        self.name = f"huggingface:{self.path.parent.name}/{self.path.name}"
        self.fingerprint = fingerprint_of(self.content, self.eos_id)
        model = _model_of(self.path, self.content)
        self._unknown_id = _unknown_id(model, vocab)
        self._marking = _marking_tokenizer(self.path, self.content, model, self.vocab_size)

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[str, bytes]]:
        return (HuggingFaceTokenizer, (str(self.path), self.content))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One uint32 array [num_tokens] a text."""
        return self.encode_counting(texts, Tally())

    def encode_counting(self, texts: list[str], tally: Tally) -> list[np.ndarray]:
        """As `encode`. Adds to `tally` the characters that vanish, and the tokens that stand for unknown ones."""
        if self._marking is None:
            arrays = self._encode(self._tokenizer, texts)
        else:
            arrays = self._encode(self._marking, texts)
            for i, ids in enumerate(arrays):
                if num_dropped := int(np.count_nonzero(ids == self.vocab_size)):
                    tally.dropped_characters += num_dropped
                    # What is on either side of a mark merges where there is none.
                    (arrays[i],) = self._encode(self._tokenizer, [texts[i]])
        if self._unknown_id is not None:
            tally.unknown_tokens += sum(int(np.count_nonzero(ids == self._unknown_id)) for ids in arrays)
        return arrays

    def _encode(self, tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
        with _library_errors(self.path, "cannot make tokens of a text"):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(spec: str) -> ByteTokenizer | HuggingFaceTokenizer:
    """The tokenizer of `spec`: `bytes`, or the path of a `tokenizer.json` or of a folder that holds one."""
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(spec)


def encode_counting(tokenizer: Tokenizer, texts: list[str], tally: Tally) -> list[np.ndarray]:
    """`tokenizer.encode`, with what it loses added to `tally` if it tells."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_counting(texts, tally)
    return tokenizer.encode(texts)


def fingerprint_of(content: bytes, eos_id: int) -> str:
    """The fingerprint of the tokenizer whose file has this content."""
    return hashlib.sha256(content + f"eos={eos_id}".encode()).hexdigest()


def token_of(content: bytes, token_id: int) -> str | None:
    """The name of the token `token_id` in a tokenizer.json; None if it has none. Needs no library. Raises Malformed."""
    document = parse_json(content, MAX_FILE_BYTES)
    if not isinstance(document, dict):
        raise Malformed("it is no tokenizer.json")
    added_tokens, model = document.get("added_tokens"), document.get("model")
    for added in added_tokens if isinstance(added_tokens, list) else ():
        if isinstance(added, dict) and added.get("id") == token_id:
            return str(added.get("content"))
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return next((token for token, number in vocab.items() if number == token_id), None)
    if isinstance(vocab, list) and 0 <= token_id < len(vocab):  # of Unigram: pairs of a token and its score
        entry = vocab[token_id]
        return str(entry[0]) if isinstance(entry, list) and entry else None
    return None


def _tokenizer_file(path: Path) -> Path:
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(
            "data.tokenizer",
            path,
            "must be `bytes` or an existing tokenizer.json",
            "check the path, or set data.tokenizer=bytes",
        )
    return path.absolute()


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_FILE_BYTES)
    except (OSError, Malformed) as error:
        raise ConfigError(
            "data.tokenizer",
            path,
            f"cannot be read: {getattr(error, 'strerror', None) or error}",
            "set data.tokenizer=bytes or the path of a tokenizer.json",
        ) from None


def _parse(path: Path, content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "data.tokenizer",
            path,
            "needs the `tokenizers` library, which is not installed",
            'pip install "windlass[hf]", or set data.tokenizer=bytes',
        ) from None
    with _library_errors(path, "is not a Hugging Face tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # i.e. as ordinary text
    return tokenizer


@contextmanager
def _library_errors(path: Path, rule: str) -> Iterator[None]:
    """Turns what the library raises, of which panics of its Rust are no `Exception`, into a ConfigError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(
            "data.tokenizer",
            path,
            f"{rule} ({said(error)})",
            "export a sound one with `tokenizer.save('tokenizer.json')`, or set data.tokenizer=bytes",
        ) from None


def _model_of(path: Path, content: bytes) -> dict[str, Any]:
    """The model in a file that the library has parsed."""
    try:
        document = parse_json(content, MAX_FILE_BYTES)
    except Malformed as error:
        raise ConfigError("data.tokenizer", path, f"cannot be used: {error}", "set data.tokenizer=bytes") from None
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, dict) else {}


def _unknown_id(model: dict[str, Any], vocab: dict[str, int]) -> int | None:
    if model.get("unk_id") is not None:  # of Unigram
        return model["unk_id"]
    return vocab.get(model.get("unk_token") or "")


def _marking_tokenizer(path: Path, content: bytes, model: dict[str, Any], mark: int) -> Any:
    """The tokenizer with a token `mark` for each character that it would drop; None if it drops none.

    Only a BPE model does: without a token for what is unknown it passes over characters that it has no token for.
    """
    vocab = model.get("vocab")
    is_bpe = model.get("type", "BPE") == "BPE" and isinstance(vocab, dict) and "merges" in model
    if not is_bpe or model.get("unk_token") is not None or _is_of_bytes(content, model):
        return None
    import tokenizers

    token = "\0unknown"
    while token in vocab:
        token += "?"
    marking = _parse(path, content)
    with _library_errors(path, "is not a Hugging Face tokenizer.json"):
        with_mark = tokenizers.models.BPE()
        changes = {"vocab": {**vocab, token: mark}, "unk_token": token, "fuse_unk": False}
        with_mark.__setstate__(json.dumps({**model, "type": "BPE", **changes}).encode())
        marking.model = with_mark
    return marking


def _is_of_bytes(content: bytes, model: dict[str, Any]) -> bool:
    """True if the text is made letters for bytes beforehand, all of which the model has."""
    from tokenizers.pre_tokenizers import ByteLevel

    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    makes_bytes = b'"ByteLevel"' in content
    return makes_bytes and not affixes and all(letter in model["vocab"] for letter in ByteLevel.alphabet())


def _find_eos(path: Path, vocab: dict[str, int]) -> str:
    for token in EOS_TOKENS:
        if token in vocab:
            return token
    raise ConfigError(
        "data.tokenizer",
        path,
        f"must have a token that ends a document, one of {' '.join(EOS_TOKENS)}",
        "add one to the tokenizer: tokenizer.add_special_tokens(['<|endoftext|>'])",
    )
