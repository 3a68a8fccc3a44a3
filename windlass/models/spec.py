"""The seam between architectures and everything else: what a model has to be, to be trained here.

A model is built on the meta device, cut into shards there, and then given its weights, a unit at a time. A unit is what
is gathered, streamed from a tier and recomputed together. Hidden states and the head are apart: what is made of them,
logits or a loss, is an argument of the forward pass: no objective is in a model, and whole logits need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windlass.errors import ConfigError, require
from windlass.models.micro_batch_fusion import MicroBatches
from windlass.parallel.fragment import Fragment, fragment_of, local_tensor
from windlass.parallel.zero import Unit


@dataclass(frozen=True)
class Head:
    """The projection of hidden states on the vocabulary, as the pass uses it: gathered, and brought from its tier.

    Args:
        weight: (vocab_size, hidden_size), of any float dtype.
        bias: (vocab_size).
        scale: multiplies the logits, bias included.
        soft_cap: then logits become `soft_cap * tanh(logits / soft_cap)`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) of `hidden` (..., hidden_size), in its dtype.

        They are as large as a vocabulary; losses need them a chunk of tokens at a time, see
        `windlass.train.objectives.cross_entropy`.
        """
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


Reduction = Callable[[Tensor, Head], Tensor]
"""Makes something of hidden states (batch, seq_len, hidden_size) and the head, e.g. a summed loss."""


class Model(nn.Module):
    """A causal language model. Derived classes give `forward`, `units`, `fill` and `flops_per_token`.

    Attributes:
        compute_dtype: the dtype of the passes; weights may be float32 all the same.
        fuses_micro_batches: `forward` takes lists of micro-batches, see `micro_batch_fusion`. Where weights are
            streamed they are then read twice a step; else twice a micro-batch.
    """

    fuses_micro_batches = False
    compute_dtype: torch.dtype = torch.float32

    def forward(
        self,
        input_ids: MicroBatches,
        document_ids: MicroBatches | None = None,
        reduce: Reduction | list[Reduction] | None = None,
    ) -> MicroBatches:
        """Calls `reduce` with the hidden states and the head, inside the head's unit; without it returns logits.

        Args:
            input_ids: int64 (batch, seq_len).
            document_ids: int (batch, seq_len); a token attends only to those of its own document. None: to all before.
            reduce: its result is the result of the pass.

        Returns:
            What `reduce` returns, or (batch, seq_len, vocab_size) in `compute_dtype`. Lists give the list of theirs.
        """
        raise NotImplementedError

    def units(self) -> list[Unit]:
        """The units in the order of the forward pass; what no unit names goes with the model itself."""
        raise NotImplementedError

    def fill(self, name: str, local: Tensor, fragment: Fragment, seed: int) -> None:
        """Writes this rank's part of a parameter's first weights: drawn, or read from a file at that range.

        They must depend on `seed`, the name and the place in the whole tensor alone, so that every way of sharding
        starts from the same model.

        Args:
            local: to be overwritten; the part that `fragment` describes.
        """
        raise NotImplementedError

    def fill_buffers(self, module: nn.Module) -> None:
        """Writes the buffers that are a module's own."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of the forward and backward pass for one token of a sequence; what is recomputed does not count."""
        raise NotImplementedError

    def files(self) -> Mapping[str, bytes]:
        """The files that an export carries as they are, by name: what the model was described by, its tokenizer's."""
        return {}

    def file_dtypes(self) -> Mapping[str, str]:
        """The dtype of each weight in the folder that the model comes from, by its name there: `bfloat16`."""
        return {}

    def prepare(
        self, dtype: torch.dtype, recompute: bool, compile_blocks: bool, saved_fraction: float | None = None
    ) -> None:
        """Sets how the passes run. To be called before the model is sharded.

        Args:
            dtype: of the passes.
            recompute: keep the input of a layer alone.
            compile_blocks: compile each layer with `torch.compile`.
            saved_fraction: keep the input of a layer, what the attention gives, and the rest for this fraction of the
                tokens.

        Raises:
            ConfigError: the model cannot run so.
        """
        for key, value in (("train.activation_checkpoint", recompute), ("train.compile", compile_blocks)):
            require(
                saved_fraction is None or not value,
                key,
                "full" if value is recompute else value,
                f"cannot be combined with train.activation_fraction={saved_fraction}",
                f"leave {key} at its default",
            )
        self.compute_dtype = dtype
        self.save_activations(recompute, saved_fraction)
        if compile_blocks:
            self.compile_blocks()

    def save_activations(self, recompute: bool, saved_fraction: float | None) -> None:
        """Sets what backward keeps, as `prepare` does; between steps, and whether the model is sharded or not."""
        name = type(self).__name__
        if recompute:
            raise _cannot("train.activation_checkpoint", "full", name, "none")
        if saved_fraction is not None:
            raise _cannot("train.activation_checkpoint", "fraction", name, "none or full")

    def compile_blocks(self) -> None:
        """Compiles each layer on its own."""
        raise _cannot("train.compile", True, type(self).__name__, "false")

    @torch.no_grad()
    def materialize(
        self, device: torch.device, seed: int, filled: Callable[[list[nn.Parameter]], None] | None = None
    ) -> None:
        """Gives a model on the meta device, whole or sharded, its first weights, as `fill` writes them.

        Args:
            filled: called with a unit's parameters as soon as they have their weights, last with those of no unit; it
                may take their memory away before the next unit gets any.
        """
        name_of_module = {module: name for name, module in self.named_modules()}
        modules = [[module for part in unit.modules for module in part.modules()] for unit in self.units()]
        in_units = {module for unit in modules for module in unit}
        for unit in (*modules, [module for module in self.modules() if module not in in_units]):
            for module in unit:
                module.to_empty(device=device, recurse=False)
                if module._buffers:
                    self.fill_buffers(module)
            parameters = {
                f"{name_of_module[module]}.{name}": parameter
                for module in unit
                for name, parameter in module.named_parameters(recurse=False)
            }
            for name, parameter in parameters.items():
                self.fill(name, local_tensor(parameter), fragment_of(name, parameter), seed)
            if filled is not None:
                filled(list(parameters.values()))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cannot(key: str, value: object, name: str, instead: str) -> ConfigError:
    return ConfigError(key, value, f"cannot be had with {name}", f"set {key}={instead}")
