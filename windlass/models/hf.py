"""Causal language models of transformers, as they are: its modelling code under our sharding, tiers and objectives.

A model is built on the meta device from its config.json, with the names that transformers gives its modules. Each rank
reads the byte ranges of its own fragments. The decoder runs as transformers wrote it; the attention is ours
(`windlass.models.attention`), and so is what comes behind the last hidden state, so that no whole logits need exist.

What cannot be taken over faithfully is refused by name, and looked for: in the code that makes logits, by running it
with known numbers (`read_head`); in the masks, since our attention gets no other but ours; in buffers, which have to
be written by the family's own initialisation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from windlass.errors import ConfigError, WindlassError
from windlass.models.attention import Documents, attention
from windlass.models.config import HFConfig
from windlass.models.hf_files import read_files
from windlass.models.hf_weights import DrawnWeights, FileWeights
from windlass.models.micro_batch_fusion import MicroBatches
from windlass.models.spec import Head, Model, Reduction
from windlass.models.values import real_tensors
from windlass.parallel.fragment import Fragment
from windlass.parallel.zero import Unit

ATTENTION = "windlass"
"""The name under which transformers knows our attention."""
PASSED_OVER = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
)
"""Arguments of an attention that say nothing of what it computes."""


class HFModel(Model):
    """A causal LM of transformers.

    Args:
        config: what was asked for.
        causal: the model on the meta device, its attention ours.
        folder: where its weights are.
    """

    _causal: Any
    """The model as transformers made it. No module of this one: its children are, under the names they have there."""
    layers: list[nn.Module]

    def __init__(self, config: HFConfig, causal: Any, folder: Path) -> None:
        super().__init__()
        self.config, self.folder = config, folder
        for name, child in causal.named_children():
            self.add_module(name, child)
        self.__dict__["_causal"] = causal
        self._base_name: str = causal.base_model_prefix
        self._head_name = _name_of(causal, causal.get_output_embeddings())
        with real_tensors():
            self._head_form = read_head(causal, self._base_name, self._head_name)
        self.is_tied = _untie(causal)
        self.layers = _layers_of(causal)
        self._num_attended = 0
        head = self.get_submodule(self._head_name)
        head.forward = self._run_head  # type: ignore[method-assign]
        _refuse_kept_buffers(causal)
        parameters = dict(self.named_parameters())
        self.weights = (
            DrawnWeights(causal, parameters, config.path_key)
            if config.path is None
            else FileWeights(folder, causal, parameters, config.path_key)
        )

    def forward(
        self,
        input_ids: MicroBatches,
        document_ids: MicroBatches | None = None,
        reduce: Reduction | list[Reduction] | None = None,
    ) -> MicroBatches:
        assert isinstance(input_ids, Tensor) and not isinstance(document_ids, list) and not isinstance(reduce, list)
        documents = None if document_ids is None else Documents.of(document_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        if document_ids is not None:
            positions = positions_of(document_ids)
        self._num_attended = 0
        base = self.get_submodule(self._base_name)
        output = base(
            input_ids=input_ids, position_ids=positions, attention_mask=_mask(self, documents), use_cache=False
        )
        self._check_attended()
        return self.get_submodule(self._head_name)(output.last_hidden_state, reduce)

    def _run_head(self, hidden: Tensor, reduce: Reduction | None) -> Tensor:
        module = self._causal.get_input_embeddings() if self.is_tied else self.get_submodule(self._head_name)
        weight: Any = module.weight
        head = Head(weight, getattr(module, "bias", None), self._head_form.scale, self._head_form.soft_cap)
        return head.logits(hidden) if reduce is None else reduce(hidden, head)

    def _check_attended(self) -> None:
        """Raises ConfigError if tokens were mixed by others than our attention, which would not see documents."""
        if self._num_attended != len(self.layers):
            raise _refusal(
                self.config,
                f"has {len(self.layers)} layers, of which {self._num_attended} use an attention that can be replaced",
                "train a family whose layers all do",
            )

    def units(self) -> list[Unit]:
        layers = [Unit([layer]) for layer in self.layers]
        if self.is_tied:
            return layers  # a tied embedding is used first and last, so it stays with the model
        return [
            Unit([self._causal.get_input_embeddings()]),
            *layers,
            Unit([self._causal.get_output_embeddings()], True),
        ]

    def prepare(
        self, dtype: torch.dtype, recompute: bool, compile_blocks: bool, saved_fraction: float | None = None
    ) -> None:
        super().prepare(dtype, recompute, compile_blocks, saved_fraction)
        if dtype != torch.float32:
            for module in self.modules():
                if module._parameters:
                    _compute_in(module, dtype)

    def save_activations(self, recompute: bool, saved_fraction: float | None) -> None:
        if saved_fraction is not None:
            super().save_activations(False, saved_fraction)  # refuses it
        for layer in self.layers:
            _set_recompute(layer, recompute)

    def fill(self, name: str, local: Tensor, fragment: Fragment, seed: int) -> None:
        self.weights.fill(name, local, fragment, seed)

    def fill_buffers(self, module: nn.Module) -> None:
        """By the family's own initialisation; what that leaves alone is refused."""
        buffers = dict(module.named_buffers(recurse=False))
        for buffer in buffers.values():
            buffer.fill_(torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
        with torch.random.fork_rng(devices=[]):
            self._causal._init_weights(module)
        for name, buffer in buffers.items():
            is_left = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
            if is_left.any():
                raise _refusal(self.config, f"has a buffer {name} of unknown content", "train another family")

    def files(self) -> Mapping[str, bytes]:
        return read_files(self.folder, self.config.path_key)

    def file_dtypes(self) -> Mapping[str, str]:
        return self.weights.file_dtypes()

    def flops_per_token(self, seq_len: int) -> float:
        """As `windlass.models.flops` counts; of experts those that a token is routed to."""
        config = self._causal.config
        embedding = self._causal.get_input_embeddings().weight.numel()
        num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        share = getattr(config, "num_experts_per_tok", 1) / num_experts if num_experts > 1 else 1.0
        weights = sum(
            parameter.numel() * (share if ".experts." in name else 1.0)
            for name, parameter in self.named_parameters()
            if parameter.ndim > 1
        )
        weights -= 0 if self.is_tied else embedding
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return 6.0 * weights + 6.0 * len(self.layers) * width * seq_len


def build(config: HFConfig, device: str) -> HFModel:
    """The model on `device`, without weights.

    Raises:
        ConfigError: the folder has no such model, or one that cannot be trained here.
        CorruptCheckpoint: a file of it is damaged.
    """
    transformers = _transformers(config)
    folder = config.model_folder
    description = config.description()
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config.json may do to transformers' parsers
        model_type = description.get("model_type")
        raise _refusal(
            config,
            f"has a config.json (model_type {model_type!r}) that transformers does not take: {_first_line(error)}",
            "check the file, or install a newer transformers",
        ) from None
    if type(parsed) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(
            config,
            f"has a {description.get('model_type')!r}, which is no causal language model of text",
            "give a folder of one that transformers' AutoModelForCausalLM takes",
        )
    family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
    if not getattr(family, "_supports_attention_backend", False):
        raise _refusal(config, f"is a {family.__name__}, whose attention cannot be replaced", "train another family")
    _refuse_masks(config, parsed)
    _register_attention()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with torch.device(device):
            causal = transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except WindlassError:
        raise
    except Exception as error:
        raise _refusal(config, f"cannot be built: {_first_line(error)}", "train another family") from None
    return HFModel(config, causal, folder)


# --- Attention. ---


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


def _mask(model: HFModel, documents: Documents | None) -> Tensor:
    """A mask as transformers hands it through to every attention: one with four dims, and with what ours needs."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    mask.windlass = (model, documents)  # type: ignore[attr-defined]
    return mask


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Our attention with the arguments of transformers': (batch, heads, seq_len, head_dim) each.

    Returns:
        (batch, seq_len, heads, head_dim), and no weights.
    """
    handed = getattr(attention_mask, "windlass", None)
    if handed is None:
        raise TypeError(f"{type(module).__name__} makes a mask of its own")
    model, documents = handed
    unknown = [name for name, given in others.items() if given is not None and name not in PASSED_OVER]
    if unknown or is_causal is False or getattr(module, "is_causal", True) is False:
        what = f"an argument {unknown[0]}" if unknown else "attention to later tokens"
        raise _refusal(model.config, f"gives {type(module).__name__} {what}", "train another family")
    model._num_attended += 1
    mixed = attention(
        query,
        key,
        value,
        documents,
        scale=scaling,
        dropout=dropout,
        window=sliding_window,
        soft_cap=softcap,
        sinks=s_aux,
    )
    return mixed, None


def positions_of(document_ids: Tensor) -> Tensor:
    """The position of each token in its document, int64 (batch, seq_len), for ids that rise at each border."""
    seq_len = document_ids.shape[1]
    index = torch.arange(seq_len, device=document_ids.device).expand(document_ids.shape)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


def _refuse_masks(config: HFConfig, parsed: Any) -> None:
    """Raises ConfigError for layers whose masks are neither causal nor sliding windows: ours are not told of them."""
    text = parsed.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown or getattr(text, "attention_chunk_size", None):
        kind = sorted(unknown)[0] if unknown else "chunked_attention"
        raise _refusal(config, f"has layers of the kind {kind!r}", "train another family")
    if getattr(text, "is_encoder_decoder", False):
        raise _refusal(config, "is an encoder and a decoder", "train a decoder")


# --- The head. ---


@dataclass(frozen=True)
class HeadForm:
    """A scale and a cap that a family puts on the products of hidden states and head, see `Head`."""

    scale: float = 1.0
    soft_cap: float | None = None


class _Output(dict[str, Any]):
    """A decoder's output: its last hidden state, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return next(iter(self.values())) if key == 0 else super().__getitem__(key)


class _Answer(nn.Module):
    """Gives the same whatever it is asked, and keeps what it was asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.asked: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = args[0] if args else None
        return self.answer


def read_head(causal: Any, base_name: str, head_name: str) -> HeadForm:
    """Finds what a family's code makes of its head's products, by running it on known numbers.

    Raises:
        ConfigError: it is neither a scale nor a soft cap, or hidden states are changed before they get there.
    """
    config = causal.config.get_text_config()
    form = HeadForm(
        scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )
    # Without a symmetry that a change could hide behind.
    hidden = torch.linspace(-2.0, 3.0, 5, device="cpu").exp().view(1, 1, 5)
    products = torch.linspace(-40.0, 90.0, 11, device="cpu").view(1, 1, 11)
    decoder, head = _Answer(_Output(last_hidden_state=hidden)), _Answer(products)
    with _replaced(causal, base_name, decoder), _replaced(causal, head_name, head), torch.no_grad():
        try:
            logits = causal(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu")).logits
        except Exception as error:
            raise ConfigError(
                "model.path",
                type(causal).__name__,
                f"cannot be run apart from its decoder: {_first_line(error)}",
                "train another family",
            ) from None
    expected = Head(torch.eye(11, device="cpu"), None, form.scale, form.soft_cap).logits(products)
    is_same_hidden = isinstance(head.asked, Tensor) and torch.equal(head.asked.cpu(), hidden)
    if not is_same_hidden or not torch.allclose(logits.float(), expected, rtol=1e-6, atol=1e-6):
        raise ConfigError(
            "model.path",
            type(causal).__name__,
            "makes its logits in a way that is not known here",
            "train another family",
        )
    return form


@contextlib.contextmanager
def _replaced(root: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    parent_name, _, child = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    before = parent._modules[child]
    parent._modules[child] = module
    try:
        yield
    finally:
        parent._modules[child] = before


# --- Modules. ---


def _name_of(root: nn.Module, module: nn.Module | None) -> str:
    found = [name for name, other in root.named_modules() if other is module and module is not None]
    if not found:
        raise ConfigError("model.path", type(root).__name__, "has no head of its own", "give a causal language model")
    return found[0]


def _untie(causal: Any) -> bool:
    """Takes the weight of a tied head away, as it is the embedding's; returns whether it was tied."""
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    is_tied = head.weight is embedding.weight or bool(causal.config.get_text_config().tie_word_embeddings)
    if is_tied:
        del head._parameters["weight"]
        if getattr(head, "bias", None) is not None:
            raise ConfigError(
                "model.path",
                type(causal).__name__,
                "ties its head to the embedding and gives it a bias",
                "train another family",
            )
    return is_tied


def _layers_of(causal: Any) -> list[nn.Module]:
    """The layers of the decoder: the longest list of modules of it."""
    lists = [module for module in causal.modules() if isinstance(module, nn.ModuleList)]
    kinds = set(causal._no_split_modules or ())
    layers = [found for found in lists if len(found) and type(found[0]).__name__ in kinds]
    if not layers:
        raise ConfigError(
            "model.path", type(causal).__name__, "does not say which of its modules are layers", "train another family"
        )
    return list(max(layers, key=len))


def _refuse_kept_buffers(causal: Any) -> None:
    """Raises ConfigError for a buffer that belongs to the weights: it would be neither read nor saved."""
    kept = set(causal.state_dict(keep_vars=True)) & {name for name, _ in causal.named_buffers()}
    if kept:
        raise ConfigError(
            "model.path",
            type(causal).__name__,
            f"has a buffer among its weights, {sorted(kept)[0]}",
            "train another family",
        )


def _set_recompute(layer: nn.Module, recompute: bool) -> None:
    layer.__dict__.pop("forward", None)
    if not recompute:
        return
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed  # type: ignore[method-assign]


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Has a module compute with its weights in `dtype`, which FSDP2's gathered weights have; an embedding gives it."""
    forward: Callable[..., Any] = module.forward
    if isinstance(module, nn.Embedding):
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs).to(dtype)  # type: ignore[method-assign]
        return

    def cast(*args: Any, **kwargs: Any) -> Any:
        weights = module._parameters
        module.__dict__["_parameters"] = {
            name: None if weight is None else weight.to(dtype) for name, weight in weights.items()
        }
        try:
            return forward(*args, **kwargs)
        finally:
            module.__dict__["_parameters"] = weights

    module.forward = cast  # type: ignore[method-assign]


def _transformers(config: HFConfig) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model", "hf", f"needs transformers ({error})", "pip install 'windlass[hf]'") from None
    return transformers


def _refusal(config: HFConfig, rule: str, fix: str) -> ConfigError:
    return ConfigError(config.path_key, config.model_folder, rule, fix)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
