from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from windlass.errors import ConfigError
from windlass.models.config import LlamaConfig
from windlass.models.llama import Llama
from windlass.offload.activations import ActivationOffload
from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine
from windlass.offload.tier_file import TierFolder

VOCAB, SEQ_LEN, WIDTH, INNER, HEADS, KV_WIDTH = 61, 40, 32, 48, 4, 16
FRACTIONS = [0.0, 0.3, 0.75, 1.0]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def build(
    saved_fraction: float | None, dtype: torch.dtype = torch.float32, dropout: float = 0.0, layers: int = 2
) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=2,
        init_std=0.3,
        dropout=dropout,
    )
    model = config.build()
    model.prepare(dtype, recompute=False, compile_blocks=False, saved_fraction=saved_fraction)
    model.materialize(torch.device("cpu"), seed=0)
    return model


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def documents(batch: int = 2) -> torch.Tensor:
    return (torch.arange(SEQ_LEN) // 15).expand(batch, -1)


def run(model: Llama, masked: bool = False) -> Result:
    torch.manual_seed(7)
    loss = model(tokens(), documents() if masked else None).float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("saved_fraction", FRACTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_fraction_gives_the_same_loss_and_gradients(
    saved_fraction: float, masked: bool, dtype: torch.dtype
) -> None:
    expected_loss, expected = run(build(None, dtype), masked)
    loss, gradients = run(build(saved_fraction, dtype), masked)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def test_all_tokens_are_as_without_it_to_the_bit() -> None:
    (expected_loss, expected), (loss, gradients) = run(build(None)), run(build(1.0))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("saved_fraction", FRACTIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_fraction_has_its_own_bits(saved_fraction: float, dropout: float) -> None:
    first_loss, first = run(build(saved_fraction, dropout=dropout))
    second_loss, second = run(build(saved_fraction, dropout=dropout))
    assert torch.equal(first_loss, second_loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_with_dropout_are_those_of_the_masks_of_the_forward_pass() -> None:
    model = build(0.4, dropout=0.3, layers=1).double()
    model.compute_dtype = torch.float64
    weight = model.layers[0].mlp.down_proj.weight

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return model(tokens()).sin().sum()

    loss().backward()
    assert weight.grad is not None
    direction, step = torch.randn_like(weight), 1e-6
    losses = []
    for shift in (step, -2 * step):
        weight.data += shift * direction
        losses.append(loss().detach())
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(slope, (weight.grad * direction).sum(), rtol=1e-5, atol=1e-6)


def count_calls(model: Llama, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many tokens go through the attention and the MLP's first product, forward and backward."""
    seen = {"attention": 0, "gate_proj": 0, "q_proj": 0}
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen["attention"] += query.shape[2]
        return attention(query, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for layer in model.layers:
        for name, module in (("gate_proj", layer.mlp.gate_proj), ("q_proj", layer.self_attn.q_proj)):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: seen[name] + args[0].shape[1]})
            )
    return seen


@pytest.mark.parametrize("saved_fraction", FRACTIONS)
def test_the_attention_runs_once_and_the_rest_again_for_the_other_tokens(
    saved_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(saved_fraction, layers=1)
    seen = count_calls(model, monkeypatch)
    run(model)
    again = SEQ_LEN - round(saved_fraction * SEQ_LEN)
    assert seen == {"attention": SEQ_LEN, "gate_proj": SEQ_LEN + again, "q_proj": SEQ_LEN + again}


def saved_bytes(model: Llama, batch: int) -> int:
    """Of the storages that autograd keeps of the model's layers, but for its parameters and masks."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens(batch))
    return sum(storage.nbytes() for storage in storages.values())


def test_what_is_kept_grows_with_the_fraction_alone() -> None:
    """Kept for every token: the layer's input, the attention's output and log-sum-exp."""

    def of_two_layers(saved_fraction: float | None) -> int:
        three, one = (saved_bytes(build(saved_fraction, layers=layers), batch=1) for layers in (3, 1))
        return (three - one) // 4

    always = 2 * SEQ_LEN * (2 * WIDTH + HEADS)
    # of both norms a number, the normal and the scaled tokens; queries, keys, values; the residual; the MLP's four
    rest = 2 * SEQ_LEN * (2 * (1 + 2 * WIDTH) + WIDTH + 2 * KV_WIDTH + WIDTH + 4 * INNER)
    assert of_two_layers(None) == always + rest
    assert of_two_layers(0.0) == always
    assert of_two_layers(0.3) == always + 0.3 * rest
    assert of_two_layers(1.0) == always + rest


@pytest.fixture
def offload(tmp_path: Path) -> Iterator[ActivationOffload]:
    engine = Engine(num_threads=2)
    folder = TierFolder(tmp_path, engine, "activations")
    arena = Arena(1 << 16)
    yield ActivationOffload(torch.device("cpu"), 0, arena, folder, min_bytes=64)
    folder.close()
    engine.close()
    arena.close()


@pytest.mark.parametrize("saved_fraction", FRACTIONS)
def test_what_is_kept_can_be_moved(offload: ActivationOffload, saved_fraction: float) -> None:
    expected_loss, expected = run(build(saved_fraction))
    model = build(saved_fraction)
    with offload.offloaded():
        loss = model(tokens()).float().square().mean()
    loss.backward()
    offload.close()
    assert torch.equal(loss, expected_loss)
    assert offload.figures.write_bytes > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_second_backward_pass_finds_what_it_needs() -> None:
    model = build(0.5)
    loss = model(tokens()).square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("recompute", "compile_blocks"), [(True, False), (False, True)])
def test_it_is_not_combined_with_what_it_replaces(recompute: bool, compile_blocks: bool) -> None:
    model = build(None)
    prepare: Callable[[], None] = lambda: model.prepare(torch.float32, recompute, compile_blocks, saved_fraction=0.5)  # noqa: E731
    with pytest.raises(ConfigError, match="train.compile" if compile_blocks else "train.activation_checkpoint"):
        prepare()
