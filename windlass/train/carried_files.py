"""The files that a run keeps beside its checkpoints: those of its model, with the tokenizer that it trains with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.manifest import Manifest, committed_steps, step_folder
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.kept_files import KEY, kept_files, read_all_kept, sha256_of
from windlass.conf.schema import Config
from windlass.data.kept_tokenizer import KeptTokenizer
from windlass.errors import CorruptCheckpoint
from windlass.models.hf_changes import DTYPES_KEY, TOKENIZER, compact, weight_dtypes, with_tokenizer
from windlass.models.huggingface import tokenizer_config
from windlass.models.spec import Model
from windlass.train.build import checkpoint_dir


@dataclass(frozen=True)
class CarriedFiles:
    sha256: dict[str, str]
    """By name: for a checkpoint's `info`."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The dtypes of the weights that the model was imported with, see `Model.file_dtypes`."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """By name, of those that may not be beside the checkpoints yet."""

    def to_info(self) -> dict[str, dict[str, str]]:
        """The part of a checkpoint's `info` that names them."""
        return {KEY: self.sha256, DTYPES_KEY: self.dtypes}


def carried_files(
    config: Config,
    model: Model,
    tokenizer: KeptTokenizer,
    content: bytes | None,
    template: Mapping[str, bytes] = MappingProxyType({}),
) -> CarriedFiles:
    """The files that the run's checkpoints are to name.

    They are those of its newest checkpoint; before there is one, the model's own, or those of the checkpoint that it
    begins from.

    Args:
        content: the tokenizer.json that the tokens of the run are made with; None: it has none.
        template: what went with it to make tokens of conversations, the chat template among it, by name.

    Raises:
        CorruptCheckpoint: a file that is needed is not as it was kept.
        RunFolderError: the disk or the store does not give one.
    """
    newest = _newest(checkpoint_dir(config))
    if newest is not None:
        location, info = newest
        named, dtypes = kept_files(info, location), weight_dtypes(info)
        if named and _is_of(named, tokenizer):
            found = {**model.files(), **({} if content is None else {TOKENIZER: content})}
            same = {name: data for name, data in found.items() if sha256_of(data) == named.get(name)}
            return CarriedFiles(named, dtypes, same)  # what is at hand is written again, should it be lost there
        files = read_all_kept(info, location)
    elif files := dict(model.files()):
        dtypes = compact(model.file_dtypes())
    elif config.resume not in ("auto", "never"):
        location = find_checkpoint(config.resume)
        info = Manifest.read(location).objects.get("info")
        files, dtypes = read_all_kept(info, location), weight_dtypes(info)
    else:
        dtypes = {}
    if tokenizer.is_bytes or content is not None:
        settings = tokenizer_config(tokenizer.eos_token, config.train.seq_len)
        files = with_tokenizer(files, content, tokenizer.eos_id, settings)
    files = {**files, **template}
    return CarriedFiles({name: sha256_of(data) for name, data in files.items()}, dtypes, files)


def _is_of(named: Mapping[str, str], tokenizer: KeptTokenizer) -> bool:
    """True if the files have this tokenizer: nothing has to be read to go on with them."""
    return named.get(TOKENIZER) == tokenizer.sha256


def _newest(checkpoints: Location) -> tuple[Location, object] | None:
    """The newest checkpoint in a place that can be read, and its `info`."""
    for step in reversed(committed_steps(checkpoints)):
        location = step_folder(checkpoints, step)
        try:
            return location, Manifest.read(location).objects.get("info")
        except CorruptCheckpoint:  # it is set aside when it is its turn to be restored
            continue
    return None
