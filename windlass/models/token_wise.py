"""Token-wise activations: what backward keeps of a layer for some tokens and computes again for the others.

Everything in a layer but the attention itself works on each token alone. So of each layer its input and the attention's
output are kept whole, which is what is costly to compute again, or impossible; of the rest (norms, queries, keys,
values, and the MLP's intermediates) the first tokens of a sequence, its saved fraction, keep theirs, and those of the
others are computed again in backward. The attention is run once, whatever the fraction: 1 computes nothing again, 0
all that is linear in the length of the sequence.

A matrix product over two parts of the tokens, and the sum of two parts' weight gradients, round otherwise than over the
whole: results of different fractions agree to rounding, those of one fraction to the bit.

MEMO: Fine-grained Tensor Management For Ultra-long Context LLM Training, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from windlass.models.attention import Documents


class Layer(Protocol):
    """A layer in the parts that it is cut into."""

    def before_attention(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, seq_len, heads, head_dim) of tokens `x` (batch, seq_len, hidden)."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """Returns what the attention makes of them: (batch, seq_len, heads * head_dim)."""
        ...

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output, of its input `x` and the attention's output."""
        ...

    def parameters_before_attention(self) -> Sequence[Tensor]:
        """All that `before_attention` uses."""
        ...


def token_wise(layer: Layer, x: Tensor, rope: Tensor, documents: Documents | None, saved_fraction: float) -> Tensor:
    """The output of `layer` for `x` (batch, seq_len, hidden), keeping what the saved fraction of the tokens needs."""
    num_kept = round(saved_fraction * x.shape[1])
    if num_kept == x.shape[1]:
        return layer.after_attention(x, layer.attention(*layer.before_attention(x, rope), documents))
    kept, rest = x[:, :num_kept], x[:, num_kept:]
    heads = layer.before_attention(kept, rope[:, :num_kept])
    parameters = layer.parameters_before_attention()
    mixed = _Attention.apply(layer, rope[:, num_kept:], documents, rest, *heads, *parameters)
    kept = layer.after_attention(kept, mixed[:, :num_kept])
    rest = checkpoint(layer.after_attention, rest, mixed[:, num_kept:], use_reentrant=False)
    return torch.cat((kept, rest), dim=1)


class _Attention(torch.autograd.Function):
    """The attention over all tokens, which keeps queries, keys and values of the first of them."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, rope: Tensor, documents: Documents | None, rest: Tensor, *inputs: Tensor
    ) -> Tensor:
        """`inputs`: queries, keys and values of the tokens that are kept, then the parameters before the attention."""
        ctx.layer, ctx.rope, ctx.replay = layer, rope, _Replay()
        heads = _join(inputs[:3], layer.before_attention(rest, rope))
        mixed, saved = ctx.replay.record(lambda query, key, value: layer.attention(query, key, value, documents), heads)
        ctx.save_for_backward(rest, *inputs, *saved)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rest, *saved = ctx.saved_tensors
        parameters = ctx.layer.parameters_before_attention()
        with torch.enable_grad():
            rest = rest.detach().requires_grad_()
            rest_heads = ctx.layer.before_attention(rest, ctx.rope)
        heads = _join(saved[:3], [head.detach() for head in rest_heads])
        head_grads = ctx.replay.gradients(heads, saved[3 + len(parameters) :], grads[0])
        num_kept = saved[0].shape[1]
        rest_grads = [grad[:, num_kept:] for grad in head_grads]
        rest_grad, *parameter_grads = torch.autograd.grad(rest_heads, (rest, *parameters), rest_grads)
        kept_grads = [grad[:, :num_kept] for grad in head_grads]
        return None, None, None, rest_grad, *kept_grads, *parameter_grads


class _Replay:
    """Autograd's graph of one function, whatever kernels it chose, without the tensors that the graph saves.

    What it saves of its inputs is given again in backward; the rest is handed out, for the caller to save.
    """

    def __init__(self) -> None:
        self._inputs: Sequence[Tensor] = ()
        self._saved: Sequence[Tensor] = ()
        """Both only while gradients are computed."""

    def record(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns what `run` makes of `inputs`, each alone in its storage; and what its gradient needs besides them."""
        saved: list[Tensor] = []
        places = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(inputs)}

        def pack(tensor: Tensor) -> Callable[[], Tensor]:
            input_place = places.get(tensor.untyped_storage()._cdata)
            if input_place is None:
                place = len(saved)
                saved.append(tensor.detach())
                return lambda: self._saved[place]
            layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
            return lambda: self._inputs[input_place].as_strided(*layout)

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda find: find()):
            source = torch.empty(0, requires_grad=True)
            anchored = [_Anchor.apply(source, tensor) for tensor in inputs]
            output = run(*anchored)
        self._input_edges = [get_gradient_edge(tensor) for tensor in anchored]
        self._output_edge = get_gradient_edge(output)
        return output.detach(), saved

    def gradients(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """Those of the inputs. `inputs` and `saved` must hold what they did."""
        self._inputs, self._saved = inputs, saved
        try:
            return torch.autograd.grad([self._output_edge], self._input_edges, [grad], retain_graph=True)
        finally:
            self._inputs = self._saved = ()


class _Anchor(torch.autograd.Function):
    """A tensor as it is, with a gradient, but no leaf: the graph would keep the data of a leaf."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise AssertionError("gradients are taken before they come here")


def _join(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(parts, dim=1) for parts in zip(first, second, strict=True)]
