"""Text to token ids: raw UTF-8 bytes, or any Hugging Face `tokenizer.json`. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from windlass.errors import ConfigError

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
    end there), and the truncation and padding that the file may ask for are off.

    Raises:
        ConfigError: the library or the file is missing, the file is malformed, or no token ends a document.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _tokenizer_file(Path(path).expanduser())
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(
                "data.tokenizer",
                path,
                f"cannot be read: {error.strerror}",
                "set data.tokenizer=bytes or the path of a tokenizer.json",
            ) from None
        self._tokenizer = _parse(self.path, content)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_id = _find_eos(self.path, vocab)
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps, so not the number of tokens
        self.name = f"huggingface:{self.path.parent.name}/{self.path.name}"
        self.fingerprint = hashlib.sha256(content + f"eos={self.eos_id}".encode()).hexdigest()

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[str]]:
        return (HuggingFaceTokenizer, (str(self.path),))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One uint32 array [num_tokens] a text."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(spec: str) -> ByteTokenizer | HuggingFaceTokenizer:
    """The tokenizer of `spec`: `bytes`, or the path of a `tokenizer.json` or of a folder that holds one."""
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(spec)


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
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ConfigError(
            "data.tokenizer",
            path,
            f"is not a Hugging Face tokenizer.json ({error})",
            "export it with `tokenizer.save('tokenizer.json')`, or set data.tokenizer=bytes",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # i.e. as ordinary text
    return tokenizer


def _find_eos(path: Path, vocab: dict[str, int]) -> int:
    for token in EOS_TOKENS:
        if token in vocab:
            return vocab[token]
    raise ConfigError(
        "data.tokenizer",
        path,
        f"must have a token that ends a document, one of {' '.join(EOS_TOKENS)}",
        "add one to the tokenizer: tokenizer.add_special_tokens(['<|endoftext|>'])",
    )
