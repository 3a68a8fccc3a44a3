from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import nn

from windlass.conf.compose import compose
from windlass.models.config import LlamaConfig
from windlass.models.llama import (
    Llama,
    RMSNorm,
    rope_angles,
    rotate,
)
from windlass.models.spec import count_parameters

CPU = torch.device("cpu")
VOCAB = 61


def config(**changes: object) -> LlamaConfig:
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    return LlamaConfig(**{**small, "num_kv_heads": 2, "init_std": 0.3, **changes})  # type: ignore[arg-type]


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    compile_blocks: bool = False,
    **changes: object,
) -> Llama:
    model = config(**changes).build()
    model.prepare(dtype, recompute, compile_blocks)
    model.materialize(CPU, seed)
    return model


def tokens(batch: int = 2, seq_len: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_a_number_for_every_token_of_the_vocabulary(dtype: torch.dtype) -> None:
    logits = build(dtype=dtype)(tokens(3, 7))
    assert logits.shape == (3, 7, VOCAB)
    assert logits.dtype == dtype


@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_nothing_before_it(masked: bool) -> None:
    model, ids = build(), tokens()
    documents = torch.zeros_like(ids) if masked else None
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % VOCAB
    before, after = model(ids, documents), model(changed, documents)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_an_earlier_token_changes_what_follows() -> None:
    model, ids = build(), tokens()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    assert ((model(ids) - model(changed)).abs().amax(dim=-1) > 1e-4).all(dim=0).all()


def test_a_masked_document_is_as_if_alone() -> None:
    """Rotary positions are relative, so it does not matter where in the sequence a document begins."""
    model, ids = build(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = model(ids, documents)
    torch.testing.assert_close(together[:, 5:], model(ids[:, 5:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:, :5], model(ids[:, :5]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:, 5:], model(ids)[:, 5:], atol=1e-2), "unmasked, it sees the first document"


def test_the_order_of_tokens_matters() -> None:
    model = build(num_layers=1)
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    assert not torch.allclose(model(one)[:, -1], model(other)[:, -1], atol=1e-3)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    rope = rope_angles(20, 8, 10_000.0, CPU)
    query, key = torch.randn(8), torch.randn(8)
    queries, keys = rotate(query.expand(20, 8), rope), rotate(key.expand(20, 8), rope)
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(20))
    scores = queries @ keys.T
    for distance in (0, 3, 7):
        along = torch.diagonal(scores, -distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(queries[0], query)


def test_norm_is_root_mean_square() -> None:
    norm = RMSNorm(5, eps=1e-6)
    nn.init.constant_(norm.weight, 2.0)
    x = torch.randn(3, 5)
    torch.testing.assert_close(norm(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = build(tie_embeddings=True), build(tie_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == VOCAB * 32
    assert "lm_head.weight" in untied.state_dict()
    assert "lm_head.weight" not in tied.state_dict()


def test_the_number_of_parameters_is_as_the_shapes_say() -> None:
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention + 3 * 32 * 48 + 2 * 32
    assert count_parameters(build(tie_embeddings=False)) == 2 * layer + 32 + 2 * VOCAB * 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama_60m", 58e6),
        ("llama_130m", 134e6),
        ("llama_350m", 368e6),
        ("llama_1b", 1.339e9),
        ("llama_7b", 6.738e9),
    ],
)
def test_presets_have_the_published_sizes(preset: str, published: float) -> None:
    model = compose([f"model={preset}"]).model.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(model) == pytest.approx(published, rel=0.01)


def test_grouped_queries_equal_heads_with_repeated_keys_and_values() -> None:
    grouped, full = build(num_kv_heads=2), build(num_kv_heads=4)
    state = dict(grouped.state_dict())
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].view(2, 8, 32)
            state[name] = heads.repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()), rtol=1e-5, atol=1e-5)


def gradients(model: Llama) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model(tokens()).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(dropout: float, dtype: torch.dtype) -> None:
    kept = gradients(build(dropout=dropout, dtype=dtype))
    recomputed = gradients(build(dropout=dropout, dtype=dtype, recompute=True))
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recompute_runs_a_layer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    model = build(recompute=True)
    layer = model.layers[0]
    original = layer.layer
    monkeypatch.setattr(layer, "layer", lambda *args: calls.append(1) or original(*args))
    model(tokens()).sum().backward()
    assert len(calls) == 2


def test_dropout_is_for_training_alone() -> None:
    model = build(dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
    assert torch.equal(model(tokens()), build(dropout=0.0)(tokens()))


def test_bfloat16_computes_with_float32_weights_and_gradients() -> None:
    full, half = build(init_std=0.05), build(init_std=0.05, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert all(gradient.dtype == torch.float32 for gradient in gradients(half).values())
    torch.testing.assert_close(half(tokens()).float(), full(tokens()), rtol=0.05, atol=0.02)
    assert not torch.equal(half(tokens()).float(), full(tokens()))


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    first, again, other = build(seed=0), build(seed=0), build(seed=1)
    for (name, weight), (_, same), (_, different) in zip(
        first.named_parameters(), again.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        assert torch.equal(weight, different) == (weight.ndim == 1), name


def test_first_weights_have_the_configured_spread() -> None:
    model = build(hidden_size=128, intermediate_size=512, num_layers=8, init_std=0.02)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / 4 if writes_to_residual else 0.02  # sqrt(2 * 8 layers)
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_units_name_every_parameter_once() -> None:
    model = build(tie_embeddings=False)
    named = [parameter for unit in model.units() for module in unit.modules for parameter in module.parameters()]
    assert len(named) == len(set(named)) == len(list(model.parameters()))
    assert [unit.is_last for unit in model.units()] == [False, False, False, True]


def test_a_tied_embedding_is_in_no_unit() -> None:
    model = build(tie_embeddings=True)
    named = {parameter for unit in model.units() for module in unit.modules for parameter in module.parameters()}
    assert model.embed_tokens.weight not in named


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_compute_the_same() -> None:
    plain, compiled = build(num_layers=1), build(num_layers=1, compile_blocks=True)
    with torch.no_grad():  # a compiled backward pass takes as long again to build; see the next test
        torch.testing.assert_close(compiled(tokens()), plain(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_can_be_traced_with_their_gradients(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `torch.compile` but the compiler."""
    plain = gradients(build(recompute=recompute))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    traced = gradients(build(recompute=recompute, compile_blocks=True))
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], rtol=1e-3, atol=1e-3)
