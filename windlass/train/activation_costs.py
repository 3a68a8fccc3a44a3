"""The costs that `choose_activations` chooses by: of a layer's activations, and of computing them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from windlass.models.config import LlamaConfig
from windlass.models.llama import Block, rope_angles
from windlass.offload.saved_fraction import LayerCosts


def layer_costs(
    config: LlamaConfig,
    dtype: torch.dtype,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    num_micro_batches: int = 1,
) -> LayerCosts:
    """The costs of one layer.

    Bytes are of what autograd saves in a pass over tensors without data, with the kernels that torch chooses for
    `device`; it must be of a kind that this torch was built for. Products are counted in FLOPs, what else there is in
    bytes: in a narrow layer, or where bfloat16 products are fast, that takes as long again.

    Args:
        dtype: of the pass.
        num_micro_batches: whose activations exist at a time: all of a step's where passes are fused, else 1.
    """
    tokens, hidden = batch_size * seq_len, config.hidden_size
    always = _saved_bytes(config, dtype, batch_size, seq_len, device, saved_fraction=0.0)
    everything = _saved_bytes(config, dtype, batch_size, seq_len, device, saved_fraction=1.0)
    kv_width = config.num_kv_heads * config.head_dim
    # Multiplications and additions of the products. The last one of a layer, down, has only its input computed again.
    again = 2.0 * tokens * (2 * hidden * hidden + 2 * hidden * kv_width + 2 * hidden * config.intermediate_size)
    down = 2.0 * tokens * hidden * config.intermediate_size
    attention = 2.0 * tokens * seq_len * hidden  # half of the products of all pairs: it is causal
    input_bytes = tokens * hidden * dtype.itemsize
    touched = _touched_bytes(config, dtype, batch_size, seq_len, device)
    return LayerCosts(
        input_bytes=num_micro_batches * input_bytes,
        attention_bytes=num_micro_batches * (always - input_bytes),
        rest_bytes=num_micro_batches * (everything - always),
        forward_flops=num_micro_batches * (again + down + attention),
        rest_flops=num_micro_batches * again,
        forward_touched_bytes=num_micro_batches * touched,
        rest_touched_bytes=num_micro_batches * touched,
    )


def _touched_bytes(config: LlamaConfig, dtype: torch.dtype, batch_size: int, seq_len: int, device: torch.device) -> int:
    """The bytes that a layer's forward reads and writes besides its products and the attention."""
    counter = _Touched()
    with FakeTensorMode(), device:
        block, x, rope = _layer(config, dtype, batch_size, seq_len, device)
        with counter:
            block(x.view_as(x), rope, None)
    return counter.num_bytes


class _Touched(TorchDispatchMode):
    """Counts bytes of tensors that go into operators and come out, but for products, the attention and views."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten" or func.overloadpacket in flop_registry or "attention" in str(func):
            return result
        before, after = _tensors((args, kwargs)), _tensors(result)
        places = {tensor.untyped_storage()._cdata for tensor in before.values()}
        is_view = all(tensor.untyped_storage()._cdata in places for tensor in after.values())
        if func._schema.is_mutable or not is_view:
            self.num_bytes += sum(tensor.nbytes for tensor in (before | after).values())
        return result


def _tensors(tree: Any) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _saved_bytes(
    config: LlamaConfig, dtype: torch.dtype, batch_size: int, seq_len: int, device: torch.device, saved_fraction: float
) -> int:
    """The bytes of storages that autograd saves of a layer, but for its weights and their copies in `dtype`."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor.detach()

    with FakeTensorMode(), device:
        block, x, rope = _layer(config, dtype, batch_size, seq_len, device)
        block.saved_fraction = saved_fraction
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x.view_as(x), rope, None)
        for constant in (rope, *block.parameters()):
            saved.pop(constant.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in saved.values())


def _layer(
    config: LlamaConfig, dtype: torch.dtype, batch_size: int, seq_len: int, device: torch.device
) -> tuple[Block, Tensor, Tensor]:
    """A layer, its input and its rotations, in the fake tensors and on the device that are entered."""
    # Weights of the pass's dtype: copies in it are not kept (see `windlass.offload.saved.Cast`).
    block = _with_default_dtype(dtype, lambda: Block(config))
    x = torch.empty(batch_size, seq_len, config.hidden_size, dtype=dtype, requires_grad=True)
    return block, x, rope_angles(seq_len, config.head_dim, config.rope_theta, device)


def _with_default_dtype(dtype: torch.dtype, make: Callable[[], Block]) -> Block:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)
