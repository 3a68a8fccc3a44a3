"""The model of a checkpoint as transformers knows it: its files, and the names that its weights have there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.durable.manifest import Manifest
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.kept_files import read_all_kept
from windlass.checkpoint.tensors import TORCH_DTYPES
from windlass.data.kept_tokenizer import KEY, KeptTokenizer, kept_content, kept_tokenizer
from windlass.data.tokenizer import MAX_FILE_BYTES, ByteTokenizer
from windlass.errors import ConfigError, CorruptCheckpoint, require
from windlass.exchange import transformers_model
from windlass.models.config import HFConfig, LlamaConfig
from windlass.models.hf_changes import (
    CONFIG,
    DTYPE_KEYS,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    changed,
    parse_config,
    to_json,
    weight_dtypes,
    with_dtype,
)
from windlass.models.huggingface import (
    check_expected,
    check_weights,
    from_huggingface,
    huggingface_name,
    to_huggingface,
    tokenizer_config,
)
from windlass.untrusted import Malformed, convert, read_bytes

MODEL_PREFIX = "model."
"""The names of weights in a checkpoint begin with it."""


@dataclass(frozen=True)
class Exported:
    files: dict[str, bytes]
    """With config.json, by name."""
    names: dict[str, str]
    """The name of a weight in transformers' module -> its name in the checkpoint."""
    shapes: dict[str, tuple[int, ...]]
    """By transformers' names."""
    dtypes: dict[str, str]
    """Dtypes of the weights in a folder, by their names there; under the empty name that of all others."""
    tokenizer: KeptTokenizer | None
    is_imported: bool
    """Its config.json came with it."""
    is_llama: bool
    """The model is windlass's own."""
    notes: list[str] = field(default_factory=list)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in a folder of the weight that is called `name` there."""
        return TORCH_DTYPES[self.dtypes.get(name, self.dtypes[""])]


def exported(reader: CheckpointReader, folder: Location, dtype: str | None = None) -> Exported:
    """Describes the model of a checkpoint.

    Args:
        dtype: of the exported weights; None is that of the import, or else that of the checkpoint.

    Raises:
        ConfigError: it is of no model that can be exported, or lacks weights.
        CorruptCheckpoint: a file that was kept with it is damaged or gone.
        RunFolderError: the disk or the store does not give one.
    """
    manifest = reader.manifest
    info = manifest.objects.get("info")
    config = stored_config(manifest)
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(MODEL_PREFIX)}
    tokenizer, content, notes = tokenizer_of_run(manifest, config, folder)
    knows_tokenizer = tokenizer is not None and tokenizer.sha256 is not None
    files = read_all_kept(info, folder, leave_out=TOKENIZER if knows_tokenizer else "")
    is_imported = CONFIG in files
    if content is not None:
        files[TOKENIZER] = content
    if tokenizer is None and TOKENIZER in files:
        notes = []
    shapes = {name.removeprefix(MODEL_PREFIX): entry.shape for name, entry in stored.items()}
    llama = _llama(config, str(folder), is_imported)
    if llama is not None:
        check_weights(folder, llama, shapes)
        names = {huggingface_name(name): MODEL_PREFIX + name for name in shapes}
        files = _files_of_llama(files, llama, config, tokenizer, next(iter(stored.values())).dtype)
    else:
        names = {name: MODEL_PREFIX + name for name in shapes}
    dtypes, files[CONFIG] = _dtypes(info, files[CONFIG], dtype, stored, folder)
    return Exported(
        files,
        names,
        {name: stored[in_checkpoint].shape for name, in_checkpoint in names.items()},
        dtypes,
        tokenizer,
        is_imported,
        llama is not None,
        notes,
    )


def skeleton(model: Exported, folder: Location) -> Any:
    """The model on the meta device, by transformers. Raises ConfigError unless the checkpoint has its weights."""
    config = transformers_model.model_config(model.files, str(folder), len(model.shapes))
    built = transformers_model.build(config, str(folder), torch.float32, torch.device("meta"))
    check_expected(folder, transformers_model.expected_shapes(built), model.shapes)
    return built


def stored_config(manifest: Manifest) -> dict[str, Any]:
    info = manifest.objects.get("info")
    config = info.get("config") if isinstance(info, dict) else None
    return config if isinstance(config, dict) else {}


def _llama(config: Mapping[str, Any], folder: str, is_imported: bool) -> LlamaConfig | None:
    """Our Llama, if the checkpoint is of one; None: of a model that transformers has, and that brought its files."""
    model = config.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name == HFConfig.name:
        require(is_imported, "path", folder, "has no config.json of its model beside it", "export it with --format dcp")
        return None
    try:
        return convert(model, LlamaConfig, "model")
    except Malformed as error:
        raise ConfigError(
            "path",
            folder,
            f"does not say which Llama it is of: windlass train did not write it ({error})",
            "export it with --format dcp",
        ) from None


def _files_of_llama(
    files: Mapping[str, bytes],
    llama: LlamaConfig,
    config: Mapping[str, Any],
    tokenizer: KeptTokenizer | None,
    stored_dtype: str,
) -> dict[str, bytes]:
    """The files of a Llama of ours: those it came with, but for what is another now; or those that describe it."""
    if CONFIG in files:
        document = parse_config(files[CONFIG])
        before = to_huggingface(from_huggingface(document, Path(CONFIG)), None, stored_dtype, None)
        now = to_huggingface(llama, None, stored_dtype, None)
        new = {key: value for key, value in now.items() if value != before[key]}
        return {**files, CONFIG: changed(files[CONFIG], new)}
    train = config.get("train")
    seq_len = train.get("seq_len") if isinstance(train, dict) else None
    seq_len = seq_len if isinstance(seq_len, int) else None
    eos_id = None if tokenizer is None else tokenizer.eos_id
    made = {CONFIG: to_json(to_huggingface(llama, seq_len, stored_dtype, eos_id))}
    if eos_id is not None:
        made[GENERATION_CONFIG] = to_json({"eos_token_id": eos_id})
    if tokenizer is not None and TOKENIZER in files and TOKENIZER_CONFIG not in files:
        made[TOKENIZER_CONFIG] = to_json(tokenizer_config(tokenizer.eos_token, seq_len))
    return {**files, **made}


def _dtypes(
    info: object, config: bytes, dtype: str | None, stored: Mapping[str, Any], folder: Location
) -> tuple[dict[str, str], bytes]:
    """The dtypes of the weights in a folder, and a config.json that says so."""
    if dtype is not None:
        return {"": dtype}, with_dtype(config, dtype)
    recorded = weight_dtypes(info)
    if recorded:
        if "" not in recorded or not all(name in TORCH_DTYPES for name in recorded.values()):
            rule = "its manifest cannot be used: it names dtypes that there are not"
            raise CorruptCheckpoint("path", folder, rule, "import the folder again")
        return recorded, config
    document = parse_config(config)
    declared = next((document[key] for key in DTYPE_KEYS if document.get(key) in TORCH_DTYPES), None)
    if declared is not None:
        return {"": declared}, config
    own = next(iter(stored.values())).dtype
    return {"": own}, with_dtype(config, own)


def tokenizer_of_run(
    manifest: Manifest, config: Mapping[str, Any], folder: Location
) -> tuple[KeptTokenizer | None, bytes | None, list[str]]:
    """The tokenizer of the run, its file, and a note if there is none to export."""
    info = manifest.objects.get("info")
    tokenizer = kept_tokenizer(info, folder) if isinstance(info, dict) else None
    if tokenizer is None:
        data = config.get("data")
        if not isinstance(data, dict):
            return None, None, ["no tokenizer is exported: the checkpoint was imported, and knows of none"]
        if data.get(KEY) != ByteTokenizer.name:
            note = (
                "no tokenizer is exported, and no eos_token_id: the checkpoint is of a windlass that kept none; put "
                f"the {TOKENIZER} of its training beside the weights ({data.get(KEY) or data.get('path')}, if that is "
                "it still)"
            )
            return None, None, [note]
        tokenizer = KeptTokenizer(ByteTokenizer.name, ByteTokenizer.vocab_size, ByteTokenizer.eos_id, None, None)
    content = kept_content(tokenizer, folder)
    if content is not None:
        return tokenizer, content, _changed_since(config, content)
    if tokenizer.is_bytes:
        note = f"its tokens are UTF-8 bytes, for which there is no tokenizer file; {tokenizer.eos_id} ends a document"
    elif tokenizer.sha256 is None:
        note = f"no tokenizer is exported: the prepared data had no {TOKENIZER} of {tokenizer.name}"
    else:
        note = (
            f"no tokenizer is exported: {tokenizer.file} is not beside the checkpoint any more; put the {TOKENIZER} of "
            "that SHA-256 beside the weights"
        )
    return tokenizer, None, [note]


def _changed_since(config: Mapping[str, Any], content: bytes) -> list[str]:
    """A note if what the configuration names as the tokenizer is another one now: it is not what was trained with."""
    data = config.get("data")
    spec = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(spec, str):
        return []
    path = Path(spec).expanduser()
    path = path / TOKENIZER if path.is_dir() else path
    try:
        is_same = read_bytes(path, MAX_FILE_BYTES) == content
    except (OSError, ValueError):  # gone, or no path: there is nothing to take for it
        return []
    note = (
        f"{path.absolute()} has changed or is another: the tokenizer of the training was kept with it, and is exported"
    )
    return [] if is_same else [note]
