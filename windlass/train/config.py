"""What a run trains, on what, for how long, and how it is watched. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from windlass.errors import require

if TYPE_CHECKING:
    from windlass.train.model import Llama


class DType(StrEnum):
    """The dtype of the forward and backward pass. Weights and optimizer state are float32 in either."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ActivationCheckpoint(StrEnum):
    """What becomes of a layer's activations between its forward and its backward pass."""

    none = "none"
    """They are saved."""
    fraction = "fraction"
    """Those of `train.activation_fraction` of the tokens are saved, the others' computed again; the layer's input and
    the attention's output are saved for all."""
    full = "full"
    """The layer's input is saved, the rest computed again."""
    auto = "auto"
    """One of the above, whichever is expected to be fastest with the memory that is free; a run keeps it."""


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Borders(StrEnum):
    """What respects the borders between the documents that are packed into one sequence."""

    none = "none"
    loss = "loss"
    attention = "attention"


class EncodingErrors(Enum):
    """What becomes of bytes that are not UTF-8: an error, U+FFFD, nothing."""

    strict = "strict"
    replace = "replace"
    ignore = "ignore"


class TextFormat(Enum):
    """How text files are read: by their names, as documents, as a JSON row a line, as a JSON array of rows."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    json = "json"


class WandbMode(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class ConsoleMode(StrEnum):
    auto = "auto"
    rich = "rich"
    plain = "plain"


@dataclass
class ModelConfig:
    """A Llama-style decoder (LLaMA: Open and Efficient Foundation Language Models, 2023; GQA, 2023).

    `vocab_size=null` takes the tokenizer's vocabulary, rounded up to a multiple of 64.
    """

    name: str = "tiny"
    vocab_size: int | None = None
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key}", value, "must be at least 1", "give a positive number")
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "model.hidden_size",
            self.hidden_size,
            f"must be a multiple of 2 * model.num_heads={2 * self.num_heads}, so that a head has an even width",
            "change model.hidden_size or model.num_heads",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide model.num_heads={self.num_heads}",
            f"set model.num_kv_heads={self.num_heads} for plain multi-head attention, or another divisor",
        )
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)", "set model.dropout=0.0")
        if self.vocab_size is not None:
            require(self.vocab_size >= 1, "model.vocab_size", self.vocab_size, "must be at least 1", "leave it null")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def build(self) -> Llama:
        """The model on the meta device; `Llama.materialize` gives it weights."""
        from windlass.train.model import Llama

        return Llama.on_meta(self)


@dataclass
class DataConfig:
    """What every data group has. `borders`: see `Borders`; a label across a border is not counted unless `none`."""

    name: str = "stdlib"
    borders: Borders = Borders.loss
    prefetch: int = 4
    """Micro-batches that a rank's background thread keeps ready."""
    shuffle: bool = True

    def __post_init__(self) -> None:
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "must be at least 1", "set data.prefetch=4")


@dataclass
class PreparedDataConfig(DataConfig):
    """A group whose text is tokenised before the run, once, into `cache_dir`."""

    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face `tokenizer.json`."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null is `$XDG_CACHE_HOME/windlass` or `~/.cache/windlass`."""
    validation_fraction: float = 0.05
    num_workers: int | None = None
    """Processes that tokenise; null is one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "must be between 0 and 1",
            "set data.validation_fraction=0.05",
        )
        require(
            self.num_workers is None or self.num_workers >= 1,
            "data.num_workers",
            self.num_workers,
            "must be at least 1",
            "leave it null for one process a core",
        )


@dataclass
class StdlibDataConfig(PreparedDataConfig):
    """The `.py` files of the running Python's standard library, split into train and validation by file."""


@dataclass
class TextDataConfig(PreparedDataConfig):
    """Text files (a document each) and JSON files (a document a row) in `path`, a file or folder; `.gz`, `.zst` too."""

    name: str = "text"
    path: str = "???"
    glob: str = "**/*"
    format: TextFormat = TextFormat.auto
    """`auto` goes by the names: `.jsonl` and `.ndjson` have a JSON row a line; `.json` files that begin with `[` are an
    array of rows, those whose first line is a row have a row a line; all others are text."""
    follow_links: bool = False
    """Take the files that symbolic links lead to, wherever; else only of relative links to near `path`."""
    text_key: str = "text"
    """The field of a JSON line that holds the text."""
    encoding_errors: EncodingErrors = EncodingErrors.strict
    """For text that is not UTF-8."""
    separator: str | None = None
    """What ends a document in a text file, e.g. `<|endoftext|>` or `\\n\\n`; null: a file is one document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.separator != "", "data.separator", "''", "must not be empty", "leave it null")


@dataclass
class ParquetDataConfig(PreparedDataConfig):
    """Parquet files in `path`, a file or folder; a document a row of the column `text_key`."""

    name: str = "parquet"
    path: str = "???"
    glob: str = "**/*.parquet"
    follow_links: bool = False
    text_key: str = "text"
    encoding_errors: EncodingErrors = EncodingErrors.strict


@dataclass
class TokensDataConfig(DataConfig):
    """A folder that `windlass data prepare` wrote."""

    name: str = "tokens"
    path: str = "???"


@dataclass
class TrainConfig:
    steps: int = 300
    seed: int = 0
    deterministic: bool = False
    """Only deterministic kernels (`torch.use_deterministic_algorithms`). Needed for bitwise resumes on a GPU."""
    batch_size: int = 8
    """Sequences a rank and micro-step."""
    seq_len: int = 256
    grad_accum_steps: int = 1
    max_norm: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    max_skipped_steps: int | None = 10
    """Steps in a row that are skipped, their gradients not being finite, which end the run; null goes on for ever. The
    checkpoints from before them are kept."""
    dtype: DType = DType.float32
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint.none
    activation_fraction: float | None = None
    """`activation_checkpoint=fraction`: of the tokens whose activations are saved. Results of different fractions agree
    to rounding."""
    compile: bool = False
    """Compile each block with `torch.compile`."""
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_samples: int = 128
    """Most sequences of the validation split to evaluate, over all ranks; always the same ones."""
    log_every: int = 10
    mock_step: bool = True
    """Run forward, backward and optimizer once on made-up tokens before step 1: fails early on too little memory."""
    device: Device = Device.auto

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "seq_len", "grad_accum_steps", "eval_samples", "log_every"):
            value = getattr(self, key)
            require(value >= 1, f"train.{key}", value, "must be at least 1", f"give a positive train.{key}")
        for key in ("seed", "eval_every"):
            value = getattr(self, key)
            require(value >= 0, f"train.{key}", value, "must not be negative", f"give a train.{key} of 0 or more")
        require(
            self.max_norm is None or self.max_norm > 0,
            "train.max_norm",
            self.max_norm,
            "must be above 0",
            "set train.max_norm=null to leave gradients as they are",
        )
        require(
            self.max_skipped_steps is None or self.max_skipped_steps >= 1,
            "train.max_skipped_steps",
            self.max_skipped_steps,
            "must be at least 1",
            "set train.max_skipped_steps=10, or null to go on however many steps are skipped",
        )
        self._check_activations()

    def _check_activations(self) -> None:
        kind, fraction = self.activation_checkpoint, self.activation_fraction
        needs_fraction = kind == ActivationCheckpoint.fraction
        require(
            needs_fraction or fraction is None,
            "train.activation_fraction",
            fraction,
            f"is a setting of train.activation_checkpoint=fraction, not of {kind}",
            "leave it out, or set train.activation_checkpoint=fraction",
        )
        require(
            not needs_fraction or (fraction is not None and 0 <= fraction <= 1),
            "train.activation_fraction",
            fraction,
            "must be between 0 and 1 with train.activation_checkpoint=fraction",
            "set train.activation_fraction=0.5, or train.activation_checkpoint=auto to have it chosen",
        )
        require(
            not self.compile or kind in (ActivationCheckpoint.none, ActivationCheckpoint.full),
            "train.compile",
            self.compile,
            f"cannot be combined with train.activation_checkpoint={kind}: the compiler takes a layer as one piece",
            "set train.compile=false, or train.activation_checkpoint to none or full",
        )


@dataclass
class MetricsConfig:
    wandb: WandbMode = WandbMode.disabled
    wandb_project: str = "windlass"
    console: ConsoleMode = ConsoleMode.auto
    """`rich` is a live view, `plain` a line every `train.log_every` steps; `auto` is rich on a terminal."""
    report: bool = True
    """Draws `report.html` when the run is done, where matplotlib is installed: seconds of one core."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device for the MFU; null looks the GPU up, and times a matrix product on a CPU."""
