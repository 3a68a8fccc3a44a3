"""How long a run trains, in what steps, and what a pass keeps. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from windlass.bounds import bounded, check_bounds
from windlass.errors import require


class DType(StrEnum):
    """The dtype of the forward and backward pass. Weights and optimizer state are float32 in either."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ActivationCheckpoint(StrEnum):
    """The ways to treat a layer's activations between its forward and its backward pass."""

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


@dataclass
class TrainConfig:
    steps: int = bounded(300, at_least=1)
    seed: int = bounded(0, at_least=0)
    deterministic: bool = False
    """Only deterministic kernels (`torch.use_deterministic_algorithms`). Needed for bitwise resumes on a GPU."""
    batch_size: int = bounded(8, at_least=1)
    """Sequences a rank and micro-step."""
    seq_len: int = bounded(256, at_least=1)
    grad_accum_steps: int = bounded(1, at_least=1)
    max_norm: float | None = bounded(1.0, above=0, fix="set train.max_norm=null to leave gradients as they are")
    """Largest global gradient norm; null does not clip."""
    max_skipped_steps: int | None = bounded(
        10, at_least=1, fix="set train.max_skipped_steps=10, or null to go on however many steps are skipped"
    )
    """Steps in a row that are skipped, their gradients not being finite, which end the run; null goes on for ever. The
    checkpoints from before them are kept."""
    dtype: DType = DType.float32
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint.none
    activation_fraction: float | None = None
    """`activation_checkpoint=fraction`: of the tokens whose activations are saved. Results of different fractions agree
    to rounding."""
    compile: bool = False
    """Compile each block with `torch.compile`."""
    eval_every: int = bounded(100, at_least=0)
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_first: bool = False
    """Evaluate before the first step, too: what a model that is not new knew already."""
    eval_samples: int = bounded(128, at_least=1)
    """Most sequences of the validation split to evaluate, over all ranks; always the same ones."""
    log_every: int = bounded(10, at_least=1)
    mock_step: bool = True
    """Run forward, backward and optimizer once on made-up tokens before step 1: fails early on too little memory."""
    device: Device = Device.auto

    def __post_init__(self) -> None:
        check_bounds(self, "train")
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
