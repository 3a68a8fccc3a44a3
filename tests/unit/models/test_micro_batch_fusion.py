from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.losses import count_tokens, forward_loss_sum, forward_loss_sums

from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.models.config import LlamaConfig
from windlass.models.llama import Llama
from windlass.models.micro_batch_fusion import over_micro_batches
from windlass.models.spec import Head
from windlass.train.objectives import cross_entropy
from windlass.train.objectives.objective import Objective
from windlass.train.step import forward

VOCAB = 67
SEQ_LEN = 24
Gradients = dict[str, torch.Tensor]


def build(
    dtype: torch.dtype = torch.float32, recompute: bool = False, tied: bool = False, compile_blocks: bool = False
) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.3,
        tie_embeddings=tied,
    )
    model = config.build()
    model.prepare(dtype, recompute, compile_blocks)
    model.materialize(torch.device("cpu"), seed=0)
    return model


def make_batches(num_slices: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(num_slices):
        tokens = torch.randint(0, VOCAB, (2, SEQ_LEN + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, int(torch.randint(1, SEQ_LEN, (), generator=generator)) :] = IGNORE_INDEX
        documents = torch.randint(0, 2, (2, SEQ_LEN), generator=generator).cumsum(1).int()
        batches.append(Batch(tokens[:, :-1], labels, documents))
    return batches


def gradients_of(model: Llama) -> Gradients:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_after_the_other(model: Llama, batches: list[Batch], masked: bool) -> tuple[list[torch.Tensor], Gradients]:
    """As the training loop does it."""
    num_tokens = count_tokens(batches)
    loss_sums = []
    for batch in batches:
        loss_sum = forward_loss_sum(model, batch, masked)
        (loss_sum / num_tokens).backward()
        loss_sums.append(loss_sum.detach())
    return loss_sums, gradients_of(model)


def fused(model: Llama, batches: list[Batch], masked: bool) -> tuple[list[torch.Tensor], Gradients]:
    num_tokens = count_tokens(batches)
    loss_sums = forward_loss_sums(model, batches, masked)
    torch.autograd.backward([loss_sum / num_tokens for loss_sum in loss_sums])
    return [loss_sum.detach() for loss_sum in loss_sums], gradients_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_slices", [1, 4])
def test_losses_and_gradients_have_the_bits_of_a_loop_over_micro_batches(
    dtype: torch.dtype, recompute: bool, tied: bool, num_slices: int
) -> None:
    batches = make_batches(num_slices)
    losses, gradients = one_after_the_other(build(dtype, recompute, tied), batches, masked=True)
    found_losses, found = fused(build(dtype, recompute, tied), batches, masked=True)
    assert all(torch.equal(a, b) for a, b in zip(losses, found_losses, strict=True))
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name


def test_the_order_of_slices_matters_to_the_bits() -> None:
    """Otherwise the test above would not tell whether the order is right."""
    batches = make_batches(4)
    _, gradients = fused(build(), batches, masked=True)
    _, other = fused(build(), batches[::-1], masked=True)
    torch.testing.assert_close(gradients, other, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(gradients[name], other[name]) for name in gradients)


def test_documents_are_masked_only_where_wanted() -> None:
    batches = make_batches(2)
    expected, _ = one_after_the_other(build(), batches, masked=False)
    found, _ = fused(build(), batches, masked=False)
    masked, _ = fused(build(), batches, masked=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(masked, found, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_runs_all_slices_before_its_neighbour_runs_one(recompute: bool) -> None:
    model = build(recompute=recompute)
    seen: list[str] = []
    for i, layer in enumerate(model.layers):
        layer.mlp.down_proj.register_full_backward_hook(lambda *_, i=i: seen.append(f"backward {i}"))
        layer.register_forward_hook(lambda *_, i=i: seen.append(f"forward {i}"))
    fused(model, make_batches(3), masked=False)
    assert seen[:3] == ["forward 0", "forward 1", "forward 2"], "a call a layer, whatever the number of micro-batches"
    runs = [(name, len(list(group))) for name, group in itertools.groupby(seen[3:])]
    assert runs == [("backward 2", 3), ("backward 1", 3), ("backward 0", 3)]


def test_each_unit_is_called_once_a_pass() -> None:
    model = build()
    calls: list[str] = []
    for name in ("embed_tokens", "norm", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    fused(model, make_batches(3), masked=False)
    assert calls == ["embed_tokens", "norm", "lm_head"]


class WholeLogits(Objective):
    """Keeps them for backward."""

    def loss_sum(self, hidden: torch.Tensor, head: Head, batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            head.logits(hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_one_micro_batch_at_most_are_saved(tied: bool) -> None:
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (2 * SEQ_LEN, VOCAB):
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    model, batches = build(tied=tied), make_batches(3)

    def count_logits(keep_logits: bool, num_slices: int) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sums = forward(model, WholeLogits(None), batches[:num_slices], False, keep_logits)
        assert len(loss_sums) == num_slices  # and they keep what was saved alive until here
        return len(saved)

    assert [count_logits(True, num_slices) for num_slices in (1, 3)] == [1, 1]
    assert [count_logits(False, num_slices) for num_slices in (1, 3)] == [0, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_head_are_made_for_one_micro_batch_before_backward(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    add = cross_entropy._add_gradients
    monkeypatch.setattr(cross_entropy, "_add_gradients", lambda *args: (made.append(1), add(*args)))
    loss_sums = forward_loss_sums(build(tied=tied), make_batches(3), mask_documents=False)
    assert len(made) == 1
    torch.autograd.backward(loss_sums)
    assert len(made) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_logits_that_are_computed_again_have_the_same_bits(tied: bool) -> None:
    batches = make_batches(3)
    _, expected = fused(build(tied=tied), batches, masked=True)
    model = build(tied=tied)
    loss_sums = forward_loss_sums(model, batches, mask_documents=True, keep_logits=False)
    torch.autograd.backward([loss_sum / count_tokens(batches) for loss_sum in loss_sums])
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients_of(model).items())


def test_without_gradients_it_is_the_loss_of_each_batch() -> None:
    model, batches = build(), make_batches(2)
    with torch.no_grad():
        found = forward_loss_sums(model, batches, mask_documents=True)
        expected = [forward_loss_sum(model, batch, mask_documents=True) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_can_be_traced(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `torch.compile` but the compiler. (Documents break the graph: each batch has others.)"""
    batches = make_batches(2)
    _, plain = fused(build(recompute=recompute), batches, masked=False)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **_: compile_(*args, backend="aot_eager", fullgraph=True))
    _, traced = fused(build(recompute=recompute, compile_blocks=True), batches, masked=False)
    torch.testing.assert_close(plain, traced, rtol=1e-3, atol=1e-3)


def test_slices_run_from_the_last_to_the_first_and_come_back_in_order() -> None:
    seen: list[tuple[float, str]] = []

    def run(x: torch.Tensor, own: str, shared: str) -> torch.Tensor:
        seen.append((x.item(), own + shared))
        return x + 1

    found = over_micro_batches(run, [torch.tensor(1.0), torch.tensor(2.0)], ["a", "b"], "z")
    assert seen == [(2.0, "bz"), (1.0, "az")]
    assert [x.item() for x in found] == [2.0, 3.0]


def test_a_batch_alone_is_run_as_it_is() -> None:
    double: Callable[[torch.Tensor], torch.Tensor] = lambda x: 2 * x  # noqa: E731
    assert torch.equal(over_micro_batches(double, torch.ones(3)), torch.full((3,), 2.0))
