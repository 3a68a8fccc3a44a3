"""Causal attention within documents, written once for all models.

No path makes a mask of all pairs of tokens. Where no row has a border it is one `scaled_dot_product_attention` of the
batch. Else, on CPUs, the documents are attended to one after the other: FlexAttention has no backward there, and a mask
makes the kernel compute all pairs. On CUDA `varlen_attn` takes all documents in one launch, and FlexAttention what that
cannot (soft caps, sinks, float32).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from windlass.models.values import has_values

_WINDOW_BLOCK = 128
"""The fewest queries of a sliding window that share their keys."""
_MAX_QUERIES, _MIN_QUERIES = 256, 16
_SCORES_BYTES = 32 << 20
"""The size of the scores that exist at a time where the softmax is explicit."""
_LENGTHS_OF_HALVES = 64
"""Documents of half precision are lengthened to multiples of it on CPUs."""
_VARLEN_MAX_HEAD_DIM, _FLEX_MIN_HEAD_DIM = 256, 16

OneDocument = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The attention of one document: queries, keys and values (seq_len, heads, head_dim) to values for each query."""


class Documents:
    """The documents of a batch of packed sequences, computed once a pass for all layers.

    Attributes:
        shape: (batch, seq_len).
        lengths: the tokens of each document, row after row; no document goes on in the next row.
        are_rows: each row is one document.
    """

    # What a compiled layer looks at is an attribute: of a bool or a number it makes one program or two.
    def __init__(self, shape: tuple[int, int], lengths: Sequence[int], device: torch.device) -> None:
        self.shape, self.lengths, self.device = shape, list(lengths), device
        self.are_rows = len(lengths) == shape[0]
        self.longest = max(lengths)
        self._block_masks: dict[int | None, Any] = {}

    @staticmethod
    def of(document_ids: Tensor) -> Documents:
        """The documents of int (batch, seq_len): one ends where the number changes. Waits for the device.

        Tensors without values have one document a row, which takes the longest.
        """
        batch_size, seq_len = document_ids.shape
        if not has_values(document_ids):
            return Documents.whole(batch_size, seq_len, document_ids.device)
        begins = torch.ones(batch_size, seq_len + 1, dtype=torch.bool)
        begins[:, 1:-1] = (document_ids[:, 1:] != document_ids[:, :-1]).cpu()
        # Each row's end is a begin, too, and so is left out of the lengths: 0 tokens to the next row's first.
        places = torch.arange(batch_size)[:, None] * seq_len + torch.arange(seq_len + 1)
        lengths = [length for length in places[begins].diff().tolist() if length]
        return Documents((batch_size, seq_len), lengths, document_ids.device)

    @staticmethod
    def whole(batch_size: int, seq_len: int, device: torch.device) -> Documents:
        """Rows of one document each."""
        return Documents((batch_size, seq_len), [seq_len] * batch_size, device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where documents begin and end among the tokens of all rows: int32 (documents + 1), on the device."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(self.device, non_blocking=True)

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's, made when it is first asked for."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self, window)
        return self._block_masks[window]


_rows = lru_cache(maxsize=8)(Documents.whole)
"""The same documents for all layers and passes, and with them their block masks."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Values weighted by causal attention: (batch, seq_len, heads, head_dim).

    Args:
        query: (batch, heads, seq_len, head_dim).
        key: (batch, kv_heads, seq_len, head_dim); each of its heads serves the same number of query heads, in order.
        value: as `key`.
        documents: a token attends only within its own; None: a row is one.
        scale: of the scores; None: head_dim ** -0.5.
        dropout: the share of weights that are dropped, now: 0 where nothing is trained.
        window: a token attends to itself and the `window - 1` tokens before it.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        sinks: (heads), logits that take part in the softmax and bring no value.
    """
    batch_size, _, seq_len, _ = query.shape
    _check(query, key, documents, window)
    if window is not None and window >= (seq_len if documents is None else documents.longest):
        window = None
    if (documents is None or documents.are_rows) and window is None and soft_cap is None and sinks is None:
        return _sdpa(query, key, value, scale, dropout).transpose(1, 2)
    documents = _rows(batch_size, seq_len, query.device) if documents is None else documents
    return _packed(query, key, value, documents, scale, dropout, window, soft_cap, sinks)


def _check(query: Tensor, key: Tensor, documents: Documents | None, window: int | None) -> None:
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries for {key.shape[2]} keys: each token has one of both")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot be shared evenly by {key.shape[1]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a token attends at least to itself, so 1 or more")
    if documents is not None and documents.shape != (query.shape[0], query.shape[2]):
        rows = "{} rows of {} tokens".format(*documents.shape)
        raise ValueError(f"documents of {rows} for queries of shape {tuple(query.shape)}")


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float, mask: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


# Lengths are numbers of Python: a compiler would make a program for each batch.
@torch.compiler.disable
def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float | None,
    dropout: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    is_explicit = soft_cap is not None or sinks is not None
    if query.is_cuda and dropout == 0.0:
        if not is_explicit and _varlen_takes(query, value):
            return _varlen(query, key, value, documents, scale, window)
        if query.shape[-1] >= _FLEX_MIN_HEAD_DIM and has_triton():
            return _flex(query, key, value, documents, scale, window, soft_cap, sinks)
    tokens = [heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)]
    if is_explicit:
        one = _explicit(scale, dropout, window, soft_cap, sinks)
    elif window is not None:
        one = _windowed(scale, dropout, window)
    elif query.device.type == "cpu" and dropout == 0.0 and query.shape[-1] == value.shape[-1]:
        tokens = [heads if heads.stride(-1) == 1 else heads.contiguous() for heads in tokens]
        return _CPUDocuments.apply(*tokens, documents.lengths, scale).unflatten(0, documents.shape)
    else:
        one = _causal(scale, dropout)
    # Split and not cut: the gradient of a cut is as long as all documents, for each of them.
    parts = zip(*(heads.split(documents.lengths) for heads in tokens), strict=True)
    return torch.cat([one(*heads) for heads in parts]).unflatten(0, documents.shape)


def _causal(scale: float | None, dropout: float) -> OneDocument:
    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _sdpa(_as_batch(query), _as_batch(key), _as_batch(value), scale, dropout)[0].transpose(0, 1)

    return one


def _as_batch(heads: Tensor) -> Tensor:
    """(1, heads, seq_len, head_dim) of (seq_len, heads, head_dim)."""
    return heads.transpose(0, 1)[None]


def _windowed(scale: float | None, dropout: float, window: int) -> OneDocument:
    """Blocks of queries against the keys that they can see; whole blocks are the rows of one batch."""
    num_queries = max(_WINDOW_BLOCK, window // 4)
    causal = _causal(scale, dropout)

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rest = query.shape[0] - window
        if num_rest <= 0:
            return causal(query, key, value)
        first = causal(query[:window], key[:window], value[:window])
        num_last = num_rest % num_queries
        outputs = [first]
        for length, begin, end in ((num_queries, 0, num_rest - num_last), (num_last, num_rest - num_last, num_rest)):
            if begin == end:
                continue
            queries = query[window + begin : window + end].unflatten(0, (-1, length)).transpose(1, 2)
            # The first query of a block sees the `window - 1` keys before it, and its own.
            keys, values = (
                heads[begin + 1 : window + end].unfold(0, window - 1 + length, length).transpose(2, 3)
                for heads in (key, value)
            )
            mask = _band(length, window, query.device)
            outputs.append(_sdpa(queries, keys, values, scale, dropout, mask).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    return one


def _band(num_queries: int, window: int, device: torch.device) -> Tensor:
    """Which of the keys that a block of queries has are in the window of which query."""
    ones = torch.ones(num_queries, window - 1 + num_queries, dtype=torch.bool, device=device)
    return ones.triu().tril(window - 1)


def _explicit(
    scale: float | None, dropout: float, window: int | None, soft_cap: float | None, sinks: Tensor | None
) -> OneDocument:
    """Scores and softmax, query block by query block; backward computes each block's again."""

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seq_len, num_heads, head_dim = query.shape
        factor = head_dim**-0.5 if scale is None else scale
        span = seq_len if window is None else min(seq_len, window + _MAX_QUERIES)
        num_queries = max(_MIN_QUERIES, min(_MAX_QUERIES, _SCORES_BYTES // (4 * num_heads * span)))

        def block(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
            return _softmax_block(queries, keys, values, sinks, factor, dropout, window, soft_cap)

        outputs, keep = [], not torch.is_grad_enabled()
        for begin in range(0, seq_len, num_queries):
            end = min(seq_len, begin + num_queries)
            first = 0 if window is None else max(0, begin - window + 1)
            inputs = query[begin:end], key[first:end], value[first:end], sinks
            again = {"use_reentrant": False, "preserve_rng_state": dropout > 0.0}
            outputs.append(block(*inputs) if keep else checkpoint(block, *inputs, **again))
        return torch.cat(outputs)

    return one


def _softmax_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    dropout: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Weighted values of the last queries of a document, of which `key` has all keys up to the last, or fewer."""
    (num_queries, num_heads, _), (num_keys, num_kv_heads, _) = query.shape, key.shape
    # Query heads of the same key head are as more queries of it: (kv_heads, heads each * queries, ...).
    grouped = query.transpose(0, 1).reshape(num_kv_heads, -1, query.shape[-1])
    scores = (grouped @ key.permute(1, 2, 0)).view(num_heads, num_queries, num_keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    distance = distance - torch.arange(num_keys, device=query.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., :num_keys], dropout).to(value.dtype)
    mixed = weights.reshape(num_kv_heads, -1, num_keys) @ value.transpose(0, 1)
    return mixed.view(num_heads, num_queries, -1).transpose(0, 1)


class _CPUDocuments(torch.autograd.Function):
    """The CPU's flash attention, a document at a time, into one output.

    Autograd would keep each document's output besides all of them together, and pay for three cuts a document.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype)
        sums = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for *heads, mixed, log_sums in _split(lengths, query, key, value, output, sums):
            length, heads = mixed.shape[2], _padded(*heads)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, is_causal=True, scale=scale)
            mixed.copy_(found[0][:, :, :length])
            log_sums.copy_(found[1][:, :, :length])
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        results = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in saved[:3]]
        for grad, *heads, query, key, value in _split(ctx.lengths, grads[0], *saved, *results):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_padded(grad, *heads), 0.0, True, scale=ctx.scale
            )
            for result, part in zip((query, key, value), found, strict=True):
                result.copy_(part[:, :, : result.shape[2]])
        return *results, None, None


def _split(lengths: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The parts of each document of (tokens, heads, ...), with the heads first; of equal lengths all together."""
    if len(set(lengths)) == 1:
        return [tuple(tensor.unflatten(0, (len(lengths), -1)).transpose(1, 2) for tensor in tensors)]
    parts = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
    return [tuple(part.transpose(0, 1)[None] for part in document) for document in parts]


def _padded(*parts: Tensor) -> list[Tensor]:
    """With tokens of zeros behind them, which causal attention does not see and whose gradients are 0.

    Products of halves keep a program for each length that they have seen, of 3 MiB: these have one of few.
    """
    extra = -parts[0].shape[2] % _LENGTHS_OF_HALVES if parts[0].element_size() == 2 else 0
    return [F.pad(part, (0,) * (2 * part.ndim - 5) + (extra,)) for part in parts] if extra else list(parts)


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return is_half and head_dim == value.shape[-1] <= _VARLEN_MAX_HEAD_DIM and _varlen_function() is not None


@lru_cache(maxsize=1)
def _varlen_function() -> Callable[..., Any] | None:
    """torch's, where it has windows, scales and grouped queries: its first versions did not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needs = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needs <= inspect.signature(varlen_attn).parameters.keys() else None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None, window: int | None
) -> Tensor:
    varlen = _varlen_function()
    assert varlen is not None
    tokens = [heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)]
    places = documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest
    mixed = varlen(
        *tokens,
        *places,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # so many before it, none after
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed.unflatten(0, documents.shape)


@lru_cache(maxsize=2)
def _compiled(name: str) -> Callable[..., Any]:
    """A function of FlexAttention: as it is, it would make all pairs."""
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name))


def _block_mask(documents: Documents, window: int | None) -> Any:
    lengths = torch.tensor(documents.lengths)
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths).to(documents.device)
    numbers = numbers.view(documents.shape)

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (numbers[batch, query] == numbers[batch, key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    batch_size, seq_len = documents.shape
    return _compiled("create_block_mask")(is_seen, batch_size, None, seq_len, seq_len, device=documents.device)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert soft_cap is not None
        return soft_cap * torch.tanh(score / soft_cap)

    from torch.nn.attention.flex_attention import AuxRequest

    mixed, sums = _compiled("flex_attention")(
        query,
        key,
        value,
        score_mod=None if soft_cap is None else capped,
        block_mask=documents.block_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        # exp(scores) / (exp(sink) + sum exp(scores)) = softmax(scores) * sigmoid(log sum exp(scores) - sink)
        share = torch.sigmoid(sums.lse - sinks.to(sums.lse.dtype)[None, :, None])
        mixed = (mixed * share[..., None]).to(value.dtype)
    return mixed.transpose(1, 2)
