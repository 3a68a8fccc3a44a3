"""`windlass ckpt export` and `import`: checkpoints of windlass to and from what other programs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.manifest import PARTIAL
from windlass.checkpoint.durable.reader import CheckpointReader, open_checkpoint
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.image import DTYPE_BYTES
from windlass.checkpoint.kept_files import KEY, read_all_kept, sha256_of, stored_name
from windlass.checkpoint.tensors import TORCH_DTYPES
from windlass.data.kept_tokenizer import kept_content, kept_tokenizer
from windlass.data.progress import ProgressReport
from windlass.errors import ConfigError, require
from windlass.exchange import dcp, huggingface
from windlass.exchange.dcp_state import read_state, state_dict_layout
from windlass.exchange.exported import MODEL_PREFIX, Exported, exported, skeleton
from windlass.exchange.folder import new_folder, require_room
from windlass.exchange.huggingface import Weight
from windlass.exchange.imported import Described, Read, write_checkpoint
from windlass.exchange.transformers_model import FileWeight, file_weights
from windlass.files import atomic_file
from windlass.models.hf_changes import DTYPES_KEY, TOKENIZER, compact
from windlass.models.hf_files import read_files
from windlass.models.huggingface import (
    EMBEDDING,
    HEAD,
    ROTARY_BUFFER,
    check_weights,
    from_huggingface,
    overrides,
    windlass_name,
)
from windlass.models.huggingface_folder import HuggingFaceFolder, same_bits
from windlass.text import override
from windlass.train.build import TrainState

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
    """Writes the model of a checkpoint as a folder that transformers loads.

    Args:
        dtype: of the exported weights; None is that of the folder that was imported, or else of the checkpoint.

    Raises:
        ConfigError: `path` is no checkpoint, or not one of a model that can be exported.
        CorruptCheckpoint: a byte of its weights is not as it was written.
        RunFolderError: `output` holds something, or the disk is full or refuses.
    """
    folder = find_checkpoint(path)
    with closing(open_checkpoint(folder)) as reader, new_folder(output) as writing:
        model = exported(reader, folder, dtype)
        weights = _weights(reader, model, folder)
        num_bytes = sum(weight.nbytes for weight in weights)
        require_room(output, num_bytes)
        with ProgressReport("export", num_bytes) as progress:
            huggingface.write_weights(writing, weights, model.files, max_shard_bytes, progress.set_done)
    return Exchanged(str(folder), str(output), reader.manifest.step, len(weights), num_bytes, model.notes)


def _weights(reader: CheckpointReader, model: Exported, folder: Location) -> list[Weight]:
    """The tensors of a folder: those of the checkpoint, or for models of transformers what it makes of them."""

    def read(name: str) -> torch.Tensor:
        return reader.read_whole(model.names[name])

    if model.is_llama:
        found = [FileWeight(name, shape, partial(read, name)) for name, shape in model.shapes.items()]
    else:
        found = file_weights(skeleton(model, folder), model.shapes, read, str(folder))
    weights = []
    for each in found:
        dtype = model.dtype_of(each.name)
        weights.append(Weight(each.name, each.shape, dtype, partial(_cast, each, dtype, folder)))
    return weights


def _cast(weight: FileWeight, dtype: torch.dtype, folder: Location) -> torch.Tensor:
    """The weight in the dtype of the export. Raises ConfigError where float16 is too narrow for a value."""
    tensor = weight.read()
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(cast.isinf(), tensor.isinf()):
        what = f"has values in {weight.name} that are too large for float16, in which it was imported"
        raise ConfigError("path", folder, what, "export it with --dtype bfloat16 or float32")
    return cast


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
        for name, content in _kept(reader.manifest.objects.get("info"), folder).items():
            _write_file(writing / name, content)
    return Exchanged(str(folder), str(output), reader.manifest.step, len(stored), num_bytes)


def _kept(info: object, checkpoint: Location) -> dict[str, bytes]:
    """The files beside a checkpoint, as they are named there."""
    tokenizer = kept_tokenizer(info, checkpoint) if isinstance(info, dict) else None
    files = read_all_kept(info, checkpoint, leave_out="" if tokenizer is None else TOKENIZER)
    contents = {stored_name(name, sha256_of(content)): content for name, content in files.items()}
    if tokenizer is not None and (content := kept_content(tokenizer, checkpoint)) is not None:
        contents[tokenizer.file] = content
    return contents


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
    files = read_files(path, "path")
    info = {
        PARTIAL: True,
        "imported_from": "hf",
        "config": {"model": asdict(model), "train": train},
        KEY: {name: sha256_of(content) for name, content in files.items()},
        DTYPES_KEY: compact({name: str(dtype).removeprefix("torch.") for name, (_, dtype) in folder.tensors.items()}),
    }
    num_bytes = _write(
        output,
        step,
        0,
        {**_progress(step), "info": info},
        tensors,
        lambda name: folder.read(names[name.removeprefix(MODEL_PREFIX)]),
        {stored_name(name, sha256_of(content)): content for name, content in files.items()},
    )
    begin = f"begin a run from it: windlass train {' '.join(overrides(model))} {override('resume', output)}"
    return Exchanged(str(path), str(output), step, len(tensors), num_bytes, [*notes, begin])


def _check_head(folder: HuggingFaceFolder, embedding: str, head: str) -> None:
    """Raises ConfigError unless the two have the same values."""
    if folder.tensors[embedding] != folder.tensors[head] or not same_bits(folder.read(embedding), folder.read(head)):
        raise ConfigError(
            "path",
            folder.folder,
            f"has {head} that differs from {embedding}, and its config.json says that they are tied",
            "set tie_word_embeddings to false there if the head is its own, or remove it from the weights",
        )


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
    files = _kept(info, path / "checkpoint")
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
