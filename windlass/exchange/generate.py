"""`windlass generate`: what a run, a checkpoint or a Hugging Face folder answers, token by token.

transformers' own model and `generate`: a checkpoint's weights go straight into it, so that memory is one model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.manifest import step_folder
from windlass.checkpoint.durable.reader import CheckpointReader, open_checkpoint
from windlass.checkpoint.durable.storage import Location, split
from windlass.checkpoint.durable.store import DurableStore
from windlass.checkpoint.tensors import TORCH_DTYPES
from windlass.data.tokenizer import ByteTokenizer
from windlass.errors import EXIT_DONE, ConfigError, require
from windlass.exchange.exported import Exported, exported
from windlass.exchange.transformers_model import (
    build,
    expected_shapes,
    folder_of,
    model_config,
    transformers,
)
from windlass.models.hf_changes import GENERATION_CONFIG, TOKENIZER_FILES
from windlass.models.hf_files import CONFIG, read_description, read_files
from windlass.models.huggingface import check_expected
from windlass.models.huggingface_folder import HuggingFaceFolder
from windlass.parallel.fragment import Fragment

ROOM = 1.1
"""A model is put on a GPU whose free memory is so many times its weights."""


@dataclass
class Speaker:
    """A model with what makes text of its tokens."""

    name: str
    """The folder or checkpoint that it is of, for messages."""
    model: Any
    tokenizer: Any
    """transformers' own, or a `_Bytes`."""
    adds_special_tokens: bool
    """A text begins with what the tokenizer puts before it: not where training put nothing there."""

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def num_positions(self) -> int | None:
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None


def run(options: argparse.Namespace) -> int:
    """Generates, and writes to stdout. Raises WindlassError."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    require(bool(prompt.strip()), "--prompt", prompt, "is empty", "say something, or name - and pipe it in")
    require(options.max_new_tokens >= 1, "--max-new-tokens", options.max_new_tokens, "must be at least 1", "raise it")
    for flag, value, holds, rule in (
        ("--temperature", options.temperature, options.temperature is None or options.temperature > 0, "be above 0"),
        ("--top-p", options.top_p, options.top_p is None or 0 < options.top_p <= 1, "be above 0 and at most 1"),
        ("--seed", options.seed, options.seed is None or options.seed >= 0, "not be negative"),
    ):
        require(holds, flag, value, f"must {rule}", "leave it out")
    for flag, value in (("--top-p", options.top_p), ("--seed", options.seed)):
        needs = "chooses among tokens, and without --temperature the likeliest is taken"
        require(value is None or options.temperature is not None, flag, value, needs, "add --temperature 0.7")
    library = transformers()
    library.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of settings that are passed over on purpose
    with speaker(options.path, options.step) as found:
        ids = prompt_ids(found, prompt, options.system, not options.no_template)
        say(found, ids, options.max_new_tokens, options.temperature, options.top_p, options.seed)
    return EXIT_DONE


@contextmanager
def speaker(path: str, step: int | None = None) -> Iterator[Speaker]:
    """The model of a run's folder, a checkpoint, or a Hugging Face folder.

    Args:
        step: of a run's checkpoints; None is the newest.

    Raises:
        ConfigError: it is none of these, has no such checkpoint, or no model that writes text.
        CorruptCheckpoint: a byte of it is not as it was written.
    """
    with ExitStack() as stack:
        if is_huggingface_folder(Path(path)):
            require(step is None, "--step", step, "is of a run, and this is a Hugging Face folder", "leave it out")
            yield _of_folder(Path(path))
            return
        folder = _checkpoint(path, step)
        reader = stack.enter_context(closing(open_checkpoint(folder)))
        yield _of_checkpoint(reader, folder)


def is_huggingface_folder(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / CONFIG).exists()


def _checkpoint(path: str, step: int | None) -> Location:
    newest = find_checkpoint(path)
    if step is None:
        return newest
    place, _ = split(newest)
    steps = DurableStore(place).steps()
    have = ", ".join(map(str, steps[-8:])) or "none"
    require(step in steps, "--step", step, f"has no checkpoint in {path}; the newest are {have}", "name one of them")
    return step_folder(place, step)


def _of_folder(path: Path) -> Speaker:
    read_description(path, "path")  # refuses what is none, and code of its own
    files, name = read_files(path, "path"), str(path)
    HuggingFaceFolder(path)  # for its messages: a lacking or damaged file
    config = model_config(files, name)
    device = _device(sum(file.stat().st_size for file in path.glob("*.safetensors")))
    try:
        model, told = transformers().AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError("path", name, f"cannot be loaded: {said}", "check that the folder is whole") from None
    for key, what in (("missing_keys", "it lacks"), ("mismatched_keys", "of another shape is")):
        left = sorted(map(str, told.get(key) or ()))
        fix = "check that the configuration and the weights are of the same model"
        require(not left, "path", name, f"has not the weights of its config.json: {what} {', '.join(left[:3])}", fix)
    _set_generation(model, files)
    return Speaker(name, model.to(device).eval(), _tokenizer(files, name), True)


def _of_checkpoint(reader: CheckpointReader, folder: Location) -> Speaker:
    described, name = exported(reader, folder), str(folder)
    dtype = TORCH_DTYPES[described.dtypes[""]]
    config = model_config(described.files, name, len(described.shapes))
    num_bytes = sum(torch.Size(shape).numel() for shape in described.shapes.values()) * dtype.itemsize
    model = build(config, name, dtype, _device(num_bytes))
    check_expected(folder, expected_shapes(model), described.shapes)
    _read_into(model, reader, described)
    _set_generation(model, described.files)
    is_bytes = described.tokenizer is not None and described.tokenizer.is_bytes
    tokenizer = _Bytes() if is_bytes else _tokenizer(described.files, name)
    return Speaker(name, model, tokenizer, described.is_imported)


@torch.no_grad()
def _read_into(model: Any, reader: CheckpointReader, described: Exported) -> None:
    """Weights as an export has them, each read into the place where the model uses it."""
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, in_checkpoint in described.names.items():
        tensor, shape = tensors[name].data, described.shapes[name]
        reader.read(Fragment(in_checkpoint, shape, (0,) * len(shape), shape, tensor.dtype), tensor)


def _device(num_bytes: int) -> torch.device:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM * num_bytes:
        return torch.device("cuda")
    return torch.device("cpu")


def _set_generation(model: Any, files: dict[str, bytes]) -> None:
    """Takes generation_config.json over, so far as it is known to transformers; it says where to stop."""
    if GENERATION_CONFIG in files:
        with folder_of({GENERATION_CONFIG: files[GENERATION_CONFIG]}) as folder:
            model.generation_config = transformers().GenerationConfig.from_pretrained(folder)


def _tokenizer(files: dict[str, bytes], name: str) -> Any:
    own = {file: content for file, content in files.items() if file in TOKENIZER_FILES}
    fix = "name a folder or a run that has its tokenizer"
    require(bool(own), "path", name, "has no tokenizer", fix)
    with folder_of({**own, CONFIG: files[CONFIG]}) as folder:
        try:
            return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of a library in another language, which raises bare ones
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ConfigError("path", name, f"has a tokenizer that cannot be loaded: {said}", fix) from None


class _Bytes:
    """The tokenizer of bytes, so far as generating asks for one."""

    eos_token_id = ByteTokenizer.eos_id

    def decode(self, ids: list[int], **_: Any) -> str:
        return ByteTokenizer().decode(ids)


def prompt_ids(found: Speaker, prompt: str, system: str | None, uses_template: bool) -> torch.Tensor:
    """The ids of a prompt, (1, num_tokens): rendered as a user's turn where the tokenizer has a template.

    Raises:
        ConfigError: the template refuses it, or it is longer than the model's positions.
    """
    tokenizer = found.tokenizer
    if uses_template and found.has_template:
        roles = [] if system is None else [{"role": "system", "content": system}]
        turns = [*roles, {"role": "user", "content": prompt}]
        try:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
        except Exception as error:  # whatever a template may raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            what = f"has a chat template that does not take this: {said}"
            raise ConfigError("path", found.name, what, "leave --system out, or add --no-template") from None
        ids = list(ids["input_ids"])
    else:
        fix = "leave it out" if found.has_template else "write it into the prompt"
        require(system is None, "--system", system, "needs a chat template, and none is applied", fix)
        if isinstance(tokenizer, _Bytes):
            ids = list(prompt.encode())
        else:
            ids = list(tokenizer(prompt, add_special_tokens=found.adds_special_tokens)["input_ids"])
    require(bool(ids), "--prompt", prompt, "makes no token", "say something else")
    limit = found.num_positions
    is_short = limit is None or len(ids) < limit
    rule = f"has {len(ids)} tokens, and {found.name} has {limit} positions for them and the answer"
    require(is_short, "--prompt", f"{prompt[:40]}...", rule, "shorten it")
    return torch.tensor([ids])


def say(
    found: Speaker,
    ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    streams: bool = True,
) -> list[int]:
    """Generates after a prompt, and writes the text to stdout as it comes.

    Args:
        ids: as `prompt_ids` gives them.
        temperature: None takes the likeliest token each time.

    Returns:
        The new tokens.
    """
    if found.num_positions is not None:
        max_new_tokens = min(max_new_tokens, found.num_positions - ids.shape[1])
    if seed is not None:
        torch.manual_seed(seed)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampled = {"do_sample": True, "temperature": temperature, **({} if top_p is None else {"top_p": top_p})}
    stops = stop_ids(found)
    ids = ids.to(found.model.device)
    with torch.inference_mode():
        output = found.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
            streamer=_streamer(found.tokenizer) if streams else None,
            **(greedy if temperature is None else sampled),
        )
    return output[0, ids.shape[1] :].tolist()


def stop_ids(found: Speaker) -> list[int]:
    """The tokens that end an answer: those of generation_config.json, and the tokenizer's own end."""
    named = found.model.generation_config.eos_token_id
    stops = list(named) if isinstance(named, list | tuple) else [named]
    return list(dict.fromkeys(id for id in (*stops, found.tokenizer.eos_token_id) if id is not None))


def _streamer(tokenizer: Any) -> Any:
    base = transformers().TextStreamer

    class Shown(base):
        """Writes words as they are whole. What a terminal would obey is escaped: a model may say anything."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(shown(text) + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


def shown(text: str) -> str:
    """`text` without the characters that a terminal would obey, but for line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
