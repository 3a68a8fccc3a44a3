"""Reads what a Hugging Face folder says beside its weights. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from windlass.errors import ConfigError
from windlass.os_errors import remedy, said
from windlass.text import command
from windlass.untrusted import Malformed, read_bytes, read_json

CONFIG = "config.json"
CARRIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that describe a model and its tokenizer: they go from an import to an export as they are."""
MAX_BYTES = 256 << 20


def read_description(folder: Path, key: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        key: what a user calls the folder by.

    Raises:
        ConfigError: there is none, it cannot be used, or it asks for code of the folder's own.
    """
    if folder.suffix == ".gguf":
        name = folder.name
        code = (
            f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"m = M.from_pretrained({str(folder.parent)!r}, gguf_file={name!r}); m.hf_quantizer = None; "
            f"del m.config.quantization_config; m.save_pretrained('model'); "
            f"T.from_pretrained({str(folder.parent)!r}, gguf_file={name!r}).save_pretrained('model')"
        )
        raise ConfigError(
            key, folder, "is a GGUF file, and not a Hugging Face folder", f"convert it: {command('python', '-c', code)}"
        )
    path = folder / CONFIG
    try:
        document = read_json(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        what = f"is not a Hugging Face folder: it has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise ConfigError(key, folder, what, "name a folder that has one") from None
    except Malformed as error:
        raise ConfigError(key, path, f"cannot be used: {error}", "copy or download the folder again, whole") from None
    except OSError as error:
        raise ConfigError(key, path, f"cannot be read: {said(error)}", remedy(error, "mend that")) from None
    if not isinstance(document, dict):
        raise ConfigError(key, path, "is not a JSON object", "copy or download the folder again, whole")
    if document.get("auto_map"):
        raise ConfigError(
            key,
            path,
            "asks for code of the folder's own (auto_map), and no code of a folder is run",
            "give a model of a family that transformers has",
        )
    return document


def read_files(folder: Path, key: str) -> dict[str, bytes]:
    """The files of a folder that an export carries, by name. Raises ConfigError if one cannot be read."""
    files = {}
    for name in CARRIED:
        try:
            files[name] = read_bytes(folder / name, MAX_BYTES)
        except FileNotFoundError:
            continue
        except (Malformed, OSError) as error:
            what = said(error) if isinstance(error, OSError) else str(error)
            raise ConfigError(key, folder / name, f"cannot be read: {what}", "mend that and start again") from None
    return files
