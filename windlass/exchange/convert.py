"""`windlass ckpt export` and `import`: checkpoints of windlass to and from what other programs read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.manifest import PARTIAL, Manifest, StoredTensor
from windlass.checkpoint.durable.reader import CheckpointReader, open_checkpoint
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.image import DTYPE_BYTES
from windlass.checkpoint.tensors import TORCH_DTYPES
from windlass.data.kept_tokenizer import KEY, KeptTokenizer, kept_content, kept_tokenizer
from windlass.data.progress import ProgressReport
from windlass.data.tokenizer import MAX_FILE_BYTES, ByteTokenizer
from windlass.errors import ConfigError, require
from windlass.exchange import dcp, huggingface
from windlass.exchange.dcp_state import read_state, state_dict_layout
from windlass.exchange.folder import new_folder, require_room
from windlass.exchange.huggingface import Weight
from windlass.exchange.imported import Described, Read, write_checkpoint
from windlass.files import atomic_file
from windlass.models.config import LlamaConfig
from windlass.models.huggingface import (
    EMBEDDING,
    GENERATION_CONFIG,
    HEAD,
    ROTARY_BUFFER,
    check_weights,
    from_huggingface,
    huggingface_name,
    overrides,
    to_huggingface,
    tokenizer_config,
    windlass_name,
)
from windlass.models.huggingface_folder import HuggingFaceFolder
from windlass.text import override
from windlass.train.build import TrainState
from windlass.untrusted import Malformed, convert, read_bytes

MODEL_PREFIX = "model."
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
BEGINS_ANEW = "what a run needs and the folder has not (optimizer state, schedule, data cursor) begins anew with it"


@dataclass(frozen=True)
class Exchanged:
    """The outcome of an export or an import."""

    source: str
    output: str
    step: int
    num_tensors: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)
    """Sentences that the user should know."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_huggingface(path: str, output: Path, dtype: str | None, max_shard_bytes: int) -> Exchanged:
    """Writes the weights of a checkpoint of a Llama as a folder that transformers loads.

    Args:
        dtype: of the exported weights; None keeps that of the checkpoint.

    Raises:
        ConfigError: `path` is no checkpoint, or not one of a Llama.
        CorruptCheckpoint: a byte of its weights is not as it was written.
        RunFolderError: `output` holds something, or the disk is full or refuses.
    """
    folder = find_checkpoint(path)
    with closing(open_checkpoint(folder)) as reader, new_folder(output) as writing:
        config = _stored_config(reader.manifest)
        model = _stored_model(reader.manifest, config, str(folder))
        stored = {
            name.removeprefix(MODEL_PREFIX): entry
            for name, entry in reader.manifest.tensors.items()
            if name.startswith(MODEL_PREFIX)
        }
        check_weights(folder, model, {name: entry.shape for name, entry in stored.items()})
        weights = [_weight(reader, name, entry, dtype) for name, entry in stored.items()]
        tokenizer, content, notes = _tokenizer(reader.manifest, config, folder)
        stored_dtype = dtype or next(iter(stored.values())).dtype
        train = config.get("train")
        seq_len = train.get("seq_len") if isinstance(train, dict) else None
        eos_id = None if tokenizer is None else tokenizer.eos_id
        document = to_huggingface(model, seq_len if isinstance(seq_len, int) else None, stored_dtype, eos_id)
        num_bytes = sum(weight.nbytes for weight in weights)
        require_room(output, num_bytes)
        with ProgressReport("export", num_bytes) as progress:
            huggingface.write_weights(writing, weights, document, max_shard_bytes, progress.set_done)
        if eos_id is not None:
            _write_file(writing / GENERATION_CONFIG, json.dumps({"eos_token_id": eos_id}, indent=2).encode())
        if tokenizer is not None and content is not None:
            _write_file(writing / TOKENIZER, content)
            settings = tokenizer_config(tokenizer.eos_token, seq_len)
            _write_file(writing / TOKENIZER_CONFIG, json.dumps(settings, indent=2).encode())
    return Exchanged(str(folder), str(output), reader.manifest.step, len(weights), num_bytes, notes)


def _weight(reader: CheckpointReader, name: str, stored: StoredTensor, dtype: str | None) -> Weight:
    return Weight(
        huggingface_name(name),
        stored.shape,
        TORCH_DTYPES[dtype or stored.dtype],
        lambda: reader.read_whole(MODEL_PREFIX + name),
    )


def _stored_config(manifest: Manifest) -> dict[str, Any]:
    info = manifest.objects.get("info")
    config = info.get("config") if isinstance(info, dict) else None
    return config if isinstance(config, dict) else {}


def _stored_model(manifest: Manifest, config: Mapping[str, Any], folder: str) -> LlamaConfig:
    try:
        return convert(config.get("model"), LlamaConfig, "model")
    except Malformed as error:
        raise ConfigError(
            "path",
            folder,
            f"does not say which Llama it is of: windlass train did not write it ({error})",
            "export it with --format dcp",
        ) from None


def _tokenizer(
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


def _write_file(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def export_dcp(path: str, output: Path) -> Exchanged:
    """Writes a checkpoint of anything as a folder of torch.distributed.checkpoint.

    Raises:
        ConfigError, CorruptCheckpoint, RunFolderError: as `export_huggingface`.
    """
    folder = find_checkpoint(path)
    with closing(open_checkpoint(folder)) as reader, new_folder(output) as writing:
        stored = reader.manifest.tensors.values()
        num_bytes = sum(math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] for entry in stored)
        require_room(output, num_bytes)
        with ProgressReport("export", num_bytes) as progress:
            dcp.write_folder(writing, reader, *state_dict_layout(reader.manifest), progress.set_done)
        info = reader.manifest.objects.get("info")
        tokenizer = kept_tokenizer(info, folder) if isinstance(info, dict) else None
        if tokenizer is not None and (content := kept_content(tokenizer, folder)) is not None:
            _write_file(writing / tokenizer.file, content)
    return Exchanged(str(folder), str(output), reader.manifest.step, len(stored), num_bytes)


def import_huggingface(path: Path, output: Path, step: int | None, dtype: str | None) -> Exchanged:
    """Makes a checkpoint of the weights of a Hugging Face Llama, for a run to begin from.

    Args:
        output: the folder of the new checkpoint, as a run's `checkpoints/` is.
        step: that the run begins at; None is 0.
        dtype: of the weights; None is float32, in which windlass trains.

    Raises:
        ConfigError: it is no Llama, or weights are missing, too many or of other shapes.
        CorruptCheckpoint: a file is missing or cannot be read.
        RunFolderError: `output` holds something, or the disk is full or refuses.
    """
    folder = HuggingFaceFolder(path)
    model = from_huggingface(folder.config, path)
    names = {windlass_name(name): name for name in folder.tensors if not name.endswith(ROTARY_BUFFER)}
    notes = [BEGINS_ANEW]
    if model.tie_embeddings and HEAD in names and EMBEDDING in names:
        _check_head(folder, names[EMBEDDING], names.pop(HEAD))
        notes.append(f"{HEAD} equals {names[EMBEDDING]}, to which it is tied, and is left out")
    check_weights(path, model, {name: folder.tensors[flat][0] for name, flat in names.items()})
    target = TORCH_DTYPES[dtype or "float32"]
    tensors = {MODEL_PREFIX + name: (folder.tensors[flat][0], target) for name, flat in names.items()}
    step = step or 0
    seq_len = folder.config.get("max_position_embeddings")
    train = {"seq_len": seq_len} if isinstance(seq_len, int) else {}
    info = {PARTIAL: True, "imported_from": "hf", "config": {"model": asdict(model), "train": train}}
    num_bytes = _write(
        output,
        step,
        0,
        {**_progress(step), "info": info},
        tensors,
        lambda name: folder.read(names[name.removeprefix(MODEL_PREFIX)]),
    )
    begin = f"begin a run from it: windlass train {' '.join(overrides(model))} {override('resume', output)}"
    return Exchanged(str(path), str(output), step, len(tensors), num_bytes, [*notes, begin])


def _check_head(folder: HuggingFaceFolder, embedding: str, head: str) -> None:
    """Raises ConfigError unless the two have the same values."""
    if folder.tensors[embedding] != folder.tensors[head] or not _same_bits(folder.read(embedding), folder.read(head)):
        raise ConfigError(
            "path",
            folder.folder,
            f"has {head} that differs from {embedding}, and its config.json says that they are tied",
            "set tie_word_embeddings to false there if the head is its own, or remove it from the weights",
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also where they are not a number."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def import_dcp(path: Path, output: Path, step: int | None, dtype: str | None, optimizer_class: str | None) -> Exchanged:
    """Makes a checkpoint of a folder of torch.distributed.checkpoint.

    Args:
        step: that the run begins at; None is that of the checkpoint that windlass exported, or 0.
        dtype: of the weights; None keeps theirs.
        optimizer_class: see `read_state`.

    Raises:
        ConfigError: it is no such folder, or has no model; CorruptCheckpoint, RunFolderError: as above.
    """
    folder = dcp.DcpFolder(path)
    state = read_state(folder, optimizer_class)
    tensors = {}
    for name, flat in state.tensors.items():
        stored = folder.contents.tensors[flat]
        is_weight = name.startswith(MODEL_PREFIX) and stored.dtype.is_floating_point
        tensors[name] = (stored.shape, TORCH_DTYPES[dtype] if dtype and is_weight else stored.dtype)
    require(
        state.is_partial or step in (None, state.step),
        "--step",
        step,
        f"the checkpoint that was exported is of step {state.step}",
        "leave --step out",
    )
    step = state.step if step is None else step
    notes, objects = [], state.objects
    if state.is_partial:
        objects = {**objects, **_progress(step), "info": {PARTIAL: True, "imported_from": "dcp", "config": {}}}
        notes.append(BEGINS_ANEW)
        if state.left_out:
            notes.append(f"left out: {', '.join(state.left_out)} (--optimizer-class takes the state of an optimizer)")
    info = objects.get("info")
    tokenizer = kept_tokenizer(info, path) if isinstance(info, dict) else None
    content = None if tokenizer is None else kept_content(tokenizer, path / "checkpoint")
    files = {} if tokenizer is None or content is None else {tokenizer.file: content}
    num_bytes = _write(
        output, step, state.world_size, objects, tensors, lambda name: folder.read_tensor(state.tensors[name]), files
    )
    return Exchanged(str(path), str(output), step, len(tensors), num_bytes, notes)


def _progress(step: int) -> dict[str, Any]:
    """The state of a run that is to begin at `step`; none for 0, where it begins anyway."""
    if step == 0:
        return {}
    return {"train": asdict(TrainState(step)), "scheduler": {"step": step}}


def _write(
    output: Path,
    step: int,
    world_size: int,
    objects: dict[str, Any],
    tensors: Mapping[str, Described],
    read: Read,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    num_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    require_room(output, num_bytes)
    with new_folder(output) as writing, ProgressReport("import", num_bytes) as progress:
        write_checkpoint(writing, step, world_size, objects, tensors, read, progress.set_done)
        for name, content in files.items():
            _write_file(writing / name, content)
    return num_bytes
