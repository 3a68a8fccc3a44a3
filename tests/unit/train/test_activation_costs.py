from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from windlass.models.config import LlamaConfig
from windlass.models.llama import Block, rope_angles
from windlass.train.activation_costs import layer_costs

CPU = torch.device("cpu")
SEQ_LEN = 40


def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products, and not of the attention, for which CPUs have no count."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def run(saved_fraction: float, batch_size: int) -> tuple[int, int, int]:
    """Bytes that a real pass of one layer saves, and FLOPs of the forward and the backward pass."""
    block = Block(config())
    block.saved_fraction = saved_fraction
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    rope = rope_angles(SEQ_LEN, config().head_dim, config().rope_theta, CPU)
    x = torch.randn(batch_size, SEQ_LEN, config().hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Products() as forward:
        y = block(x, rope, None)
    with Products() as backward:
        y.sum().backward()
    for constant in (rope, *block.parameters()):
        storages.pop(constant.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values()), forward.flops, backward.flops


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_costs_are_those_of_a_real_layer(batch_size: int) -> None:
    costs = layer_costs(config(), torch.float32, batch_size, SEQ_LEN, CPU)
    none_bytes, forward_flops, none_backward_flops = run(0.0, batch_size)
    all_bytes, _, all_backward_flops = run(1.0, batch_size)
    attention_flops = 2 * batch_size * SEQ_LEN**2 * config().hidden_size
    assert costs.input_bytes + costs.attention_bytes == none_bytes
    assert costs.rest_bytes == all_bytes - none_bytes
    assert costs.forward_flops == forward_flops + attention_flops
    assert costs.rest_flops == none_backward_flops - all_backward_flops


def test_what_is_no_product_is_counted_in_bytes() -> None:
    costs = layer_costs(config(), torch.float32, 1, SEQ_LEN, CPU)
    hidden, inner = SEQ_LEN * config().hidden_size, SEQ_LEN * config().intermediate_size
    keys = hidden // 2
    residuals, gate = 2 * 3 * hidden, (2 + 3) * inner
    # A norm reads and writes at least its input; a rotation the queries and the keys.
    least = 4 * (residuals + gate + 2 * 2 * hidden + 2 * (hidden + keys))
    assert least < costs.forward_touched_bytes < 3 * least, "and neither weights nor what products read"
    assert costs.rest_touched_bytes == costs.forward_touched_bytes, "the attention is no part of either"


def test_half_the_width_of_numbers_is_about_half_the_bytes() -> None:
    single, half = (layer_costs(config(), dtype, 1, SEQ_LEN, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert half.input_bytes == single.input_bytes // 2
    assert 0.5 <= half.rest_bytes / single.rest_bytes < 0.75, "norms compute in float32"
    assert half.rest_flops == single.rest_flops


def test_fused_micro_batches_are_there_together() -> None:
    one = layer_costs(config(), torch.float32, 1, SEQ_LEN, CPU)
    four = layer_costs(config(), torch.float32, 1, SEQ_LEN, CPU, num_micro_batches=4)
    assert four.rest_bytes == 4 * one.rest_bytes and four.input_bytes == 4 * one.input_bytes
    assert four.forward_flops == 4 * one.forward_flops


def test_the_default_dtype_is_left_as_it_was() -> None:
    layer_costs(config(), torch.bfloat16, 1, SEQ_LEN, CPU)
    assert torch.get_default_dtype() == torch.float32
