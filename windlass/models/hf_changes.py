"""Changes the files that go with a model of a Hugging Face folder where training has changed the model. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from windlass.errors import CorruptCheckpoint
from windlass.models.hf_files import CARRIED, CONFIG
from windlass.untrusted import Malformed, parse_json

GENERATION_CONFIG = "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = tuple(name for name in CARRIED if name not in (CONFIG, GENERATION_CONFIG))
"""Those that tokenizers of transformers consist of, with the template that is made of their tokens."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE_KEYS = ("dtype", "torch_dtype")
"""The keys of config.json that name it: the second is that of transformers 4."""

DTYPES_KEY = "weight_dtypes"
"""The key in a checkpoint's `info`: the dtypes that its model was imported with, as `compact` has them."""


def with_tokenizer(
    files: Mapping[str, bytes], content: bytes | None, eos_id: int, settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a model once it is trained on the ids of a tokenizer, which may be another than came with it.

    Args:
        files: of the model; as they are where they have this tokenizer.
        content: the tokenizer.json; None: it has none, ids are bytes.
        eos_id: the id that ends a document.
        settings: a tokenizer_config.json with which transformers takes the tokenizer as it is.
    """
    if content is not None:
        is_same = files.get(TOKENIZER) == content
    else:
        has_own = any(name in files for name in TOKENIZER_FILES)
        is_same = not has_own and CONFIG in files and parse_config(files[CONFIG]).get("eos_token_id") == eos_id
    if is_same:
        return dict(files)
    own = {} if content is None else {TOKENIZER: content}
    if CONFIG not in files:
        return own
    kept = {name: data for name, data in files.items() if name not in (*TOKENIZER_FILES, GENERATION_CONFIG)}
    ids = {name: eos_id if name == "eos_token_id" else None for name in SPECIAL_IDS}
    kept[CONFIG] = changed(files[CONFIG], ids)
    kept[GENERATION_CONFIG] = to_json({"eos_token_id": eos_id})
    return {**kept, **own, **({} if content is None else {TOKENIZER_CONFIG: to_json(settings)})}


def changed(config: bytes, values: Mapping[str, Any]) -> bytes:
    """A config.json with some keys of other values; byte for byte as it was where they have these already."""
    document = parse_config(config)
    missing = object()
    if all(document.get(key, missing) == value for key, value in values.items()):
        return config
    return to_json({**document, **values})


def with_dtype(config: bytes, dtype: str) -> bytes:
    """A config.json that says that its weights are of `dtype`, in the key that it has for it."""
    document = parse_config(config)
    keys = [key for key in DTYPE_KEYS if key in document] or [DTYPE_KEYS[1]]
    return changed(config, dict.fromkeys(keys, dtype))


def parse_config(content: bytes) -> dict[str, Any]:
    """The value of a config.json that was kept. Raises CorruptCheckpoint if it is none."""
    try:
        document = parse_json(content)
        if not isinstance(document, dict):
            raise Malformed("it is no JSON object")
    except Malformed as error:
        rule, fix = f"was kept with the model, and cannot be used: {error}", "import the folder again"
        raise CorruptCheckpoint("path", CONFIG, rule, fix) from None
    return document


def to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def compact(dtypes: Mapping[str, str]) -> dict[str, str]:
    """Dtypes by name as `info` has them: the one that most have once, under the empty name."""
    if not dtypes:
        return {}
    counts = list(dtypes.values())
    most = max(sorted(set(counts)), key=counts.count)
    return {"": most, **{name: dtype for name, dtype in dtypes.items() if dtype != most}}


def weight_dtypes(info: object) -> dict[str, str]:
    """The dtypes in a checkpoint's `info`; none where its model was not imported."""
    found = info.get(DTYPES_KEY) if isinstance(info, Mapping) else None
    return {str(name): str(dtype) for name, dtype in found.items()} if isinstance(found, Mapping) else {}
