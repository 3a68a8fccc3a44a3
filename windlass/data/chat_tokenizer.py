"""A Hugging Face folder's tokenizer with its chat template: conversations to tokens, and which of them are learned.

Needs the extra `windlass[hf]`, which is imported only here. No code of the folder is run but the template, in Jinja's
sandbox. Torch-free itself; transformers imports torch where it is installed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from windlass.data.chat_rendering import Renderer, RowRefused, Span, flags_of
from windlass.data.chat_rows import Conversation
from windlass.data.manifest import TOKENIZER_FILE
from windlass.data.source_files import said
from windlass.data.tally import Tally
from windlass.data.tokenizer import MAX_FILE_BYTES, MAX_VOCAB_SIZE, fingerprint_of
from windlass.errors import ConfigError
from windlass.untrusted import Malformed, read_bytes

KEY = "data.tokenizer"
EXTRA = 'pip install "windlass[hf]"'
RULES = 1
"""The version of what becomes of a conversation."""
CONFIG_FILE = "tokenizer_config.json"
FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",  # the class of the tokenizer may depend on the model's
)
TEMPLATES = "additional_chat_templates"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens. `targets` has 1 for each that is learned, else 0: uint8 [num_tokens]."""

    ids: np.ndarray
    targets: np.ndarray


class ChatTokenizer:
    """The tokenizer and the template that `files` hold. Picklable; loaded when it is first used.

    Args:
        path: the folder that they come from, for messages.
        files: their contents by their names in the folder.
    """

    def __init__(self, path: str, files: Mapping[str, bytes]) -> None:
        self.path, self.files = path, dict(files)
        self.name = f"huggingface:{Path(path).name}"
        digest = hashlib.sha256(f"chat rules {RULES}".encode())
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        self.files_fingerprint = digest.hexdigest()
        """A hash of all that decides what becomes of a conversation, the template included."""

    def __reduce__(self) -> tuple[Any, tuple[str, dict[str, bytes]]]:
        return (_loaded, (self.path, self.files))

    @cached_property
    def _tokenizer(self) -> Any:
        return _load(self.path, self.files)

    @cached_property
    def _backend(self) -> Any:
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _renderer(self) -> Renderer:
        added = self._backend.get_added_tokens_decoder().values()
        contents: list[str] = [token.content for token in added if token.special and token.content]
        special = sorted(contents, key=len, reverse=True)
        pattern = "|".join(re.escape(content) for content in special) or "(?!)"
        return Renderer(self._render, re.compile(pattern), self._tokenizer.eos_token)

    @cached_property
    def eos_id(self) -> int:
        """The id that ends a text, which fills samples up."""
        for number in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            if number is not None:
                return int(number)
        raise ConfigError(KEY, self.path, f"has no eos_token in its {CONFIG_FILE}", "name one there")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        largest = max(self._backend.get_vocab(with_added_tokens=True).values())
        if largest >= MAX_VOCAB_SIZE:
            rule = f"must have ids below {MAX_VOCAB_SIZE:,}, and has one of {largest:,}"
            raise ConfigError(KEY, self.path, rule, "give its tokens ids without such gaps")
        return largest + 1

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer alone, without the template: as `HuggingFaceTokenizer.fingerprint`."""
        return fingerprint_of(self.files[TOKENIZER_FILE], self.eos_id)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of conversations, each as JSON."""
        return [self.encode_conversation(json.loads(text), Tally()).ids for text in texts]

    def encode_conversation(self, conversation: Conversation, tally: Tally) -> Encoded:
        """Renders a conversation and makes tokens of it. What is behind the last token that is learned stays.

        Raises:
            RowRefused: the template refuses it, shows nothing of it to learn, or shows it in a way that hides where
                the answers are.
        """
        if self._is_marked(conversation):
            rendering, answers = self._render_marked(conversation)
            num_unended = 0
        else:
            rendering = self._render(conversation)
            answers, num_unended = self._renderer.answers(conversation, rendering)
        spelled = self._renderer.spelled(conversation)
        if spelled:
            places = [self._renderer.place(conversation, number, rendering) for number in spelled]
            ids, offsets = self._encode_spelled(rendering, places)
        else:
            ids, offsets = self._encode(rendering, 0)
        targets = flags_of(offsets, answers)
        if not targets.any():
            rule = "has nothing to learn: its chat template renders no token of an answer"
            raise RowRefused(rule, "mend or remove the row, or mend the {% generation %} marks of the template")
        tally.answers += len(answers)
        tally.unended_answers += num_unended
        return Encoded(ids, targets.astype(np.uint8))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _is_marked(self, conversation: Conversation) -> bool:
        return MARK.search(self._tokenizer.get_chat_template(tools=conversation.get("tools"))) is not None

    def _render(self, conversation: Conversation, is_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation.get("tools"),
                tokenize=False,
                add_generation_prompt=is_prompt,
            )
        except Exception as error:  # a template raises what it likes
            raise _refused_by_template(error) from None

    def _render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendering, and what the template's {% generation %} marks enclose."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        tools = conversation.get("tools")
        try:
            renderings, places = render(
                conversations=[conversation["messages"]],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused_by_template(error) from None
        return renderings[0], [(start, stop) for start, stop in places[0] if stop > start]

    def _encode(self, text: str, at: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, uint32 [n], and characters, int64 [n, 2], of `text`, which is at the character `at`."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + at
        return np.array(encoding.ids, dtype=np.uint32), offsets

    def _encode_spelled(self, rendering: str, contents: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """As `_encode` of a rendering whose `contents` spell special tokens: those are text.

        The text between the special tokens of the template is encoded piece by piece. For a rendering without such
        contents that gives the same as encoding it whole, which is checked with letters in their place.

        Raises:
            RowRefused: it is not the same.
        """
        own = self._renderer.own_special(rendering, contents)
        innocent = self._renderer.innocent(rendering, contents)
        whole, whole_offsets = self._encode(innocent, 0)
        ids, offsets = self._encode_pieces(innocent, own)
        if not np.array_equal(whole, ids) or not np.array_equal(whole_offsets, offsets):
            rule = "spells a special token, and its tokenizer makes other tokens of text between special tokens"
            raise RowRefused(rule, "mend or remove the row")
        return self._encode_pieces(rendering, own)

    def _encode_pieces(self, text: str, special: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """As `_encode`, where only those at `special` are special tokens."""
        pieces, position = [], 0
        self._backend.encode_special_tokens = True  # i.e. as ordinary text
        try:
            for start, stop in [*special, (len(text), len(text))]:
                if start > position:
                    pieces.append(self._encode(text[position:start], position))
                if stop > start:
                    token_id = self._backend.token_to_id(text[start:stop])
                    pieces.append((np.array([token_id], np.uint32), np.array([[start, stop]], np.int64)))
                position = stop
        finally:
            self._backend.encode_special_tokens = False
        ids, offsets = zip(*pieces, strict=True)
        return np.concatenate(ids), np.concatenate(offsets)


def load_chat_tokenizer(folder: str | None) -> ChatTokenizer:
    """Reads the tokenizer files of a Hugging Face folder.

    Raises:
        ConfigError: there is no folder, or it lacks what is needed; or the extra is not installed.
    """
    if folder is None:
        raise ConfigError(
            KEY,
            folder,
            "must name the Hugging Face folder whose tokenizer and chat template are used: this model has none",
            "set data.tokenizer=FOLDER (--tokenizer FOLDER), or train a model of a folder: model=hf model.path=FOLDER",
        )
    path = Path(folder).expanduser()
    if path.name == TOKENIZER_FILE:
        path = path.parent
    if folder == "bytes" or not path.is_dir():
        rule = "must be a Hugging Face folder: conversations need a chat template"
        raise ConfigError(KEY, folder, rule, "check the path")
    _require_fast(path)
    names = [*FILES, *(f"{TEMPLATES}/{file.name}" for file in sorted((path / TEMPLATES).glob("*.jinja")))]
    files = {}
    for name in names:
        try:
            files[name] = read_bytes(path / name, MAX_FILE_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, Malformed) as error:
            rule = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            raise ConfigError(KEY, path / name, rule, "mend that") from None
    _refuse_code(path, files)
    return ChatTokenizer(str(path.absolute()), files)


def _require_fast(path: Path) -> None:
    """Raises ConfigError, with what to do, for a folder that has its tokenizer in another form."""
    if (path / TOKENIZER_FILE).exists():
        return
    others = [file.name for file in sorted(path.iterdir()) if file.suffix in (".gguf", ".model")]
    fix = "give a folder that `tokenizer.save_pretrained(FOLDER)` of transformers wrote"
    if others:
        gguf = f", gguf_file={others[0]!r}" if others[0].endswith(".gguf") else ""
        fix = (
            f"convert it once: python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{path}'"
            f"{gguf}).save_pretrained('NEW_FOLDER')\", which may ask for a package"
        )
    rule = f"has no {TOKENIZER_FILE}{', only ' + others[0] if others else ''}"
    raise ConfigError(KEY, path, rule, fix)


def _refuse_code(path: Path, files: Mapping[str, bytes]) -> None:
    try:
        config = json.loads(files.get(CONFIG_FILE, b"{}"))  # its model_max_length may be 10^30
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, path / CONFIG_FILE, f"cannot be used: {error}", "mend that") from None
    if not isinstance(config, dict) or config.get("auto_map") is not None:
        raise ConfigError(
            KEY,
            path / CONFIG_FILE,
            "asks for code of its own (auto_map), which windlass does not run",
            "use a tokenizer that transformers has, or remove auto_map if tokenizer.json alone is right",
        )


def _loaded(path: str, files: Mapping[str, bytes]) -> ChatTokenizer:
    """In another process: loads at once, before memory is limited."""
    tokenizer = ChatTokenizer(path, files)
    assert tokenizer.vocab_size and tokenizer.eos_id is not None
    return tokenizer


def _load(path: str, files: Mapping[str, bytes]) -> Any:
    try:
        import jinja2  # noqa: F401
        import transformers
    except ImportError as error:
        rule = f"needs the library {error.name}, which is not installed"
        raise ConfigError(KEY, path, rule, EXTRA) from None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="windlass-tokenizer-") as folder:
            for name, content in files.items():
                file = Path(folder, name)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever the library makes of such files
        rule = f"cannot be loaded by transformers ({said(error)})"
        raise ConfigError(KEY, path, rule, "write it again with `tokenizer.save_pretrained(FOLDER)`") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    if not tokenizer.is_fast:
        raise ConfigError(KEY, path, "has no fast tokenizer, which tells the place of tokens", "give tokenizer.json")
    if not tokenizer.chat_template:
        raise ConfigError(
            KEY,
            path,
            "has no chat template",
            "put one into it as chat_template.jinja, or use the folder of the model that was tuned for chat",
        )
    return tokenizer


def _refused_by_template(error: Exception) -> RowRefused:
    return RowRefused(f"its chat template refuses it ({said(error)})", "mend or remove the row, or mend the template")
