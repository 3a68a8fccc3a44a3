"""Models of transformers: the same numbers as there, first weights by range, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hf

from windlass.data.batch import IGNORE_INDEX, Batch
from windlass.errors import ConfigError, CorruptCheckpoint
from windlass.models.config import HFConfig
from windlass.models.hf import HFModel, positions_of
from windlass.models.spec import count_parameters
from windlass.parallel.fragment import Fragment
from windlass.train.objectives.config import NextTokenConfig
from windlass.train.step import forward

pytest.importorskip("transformers")
CPU = torch.device("cpu")
ENDS = (20, 41, 64)

ours = pytest.mark.parametrize(
    "family", [*hf.FAMILIES, *(pytest.param(family, marks=pytest.mark.full) for family in hf.MORE)]
)


def build(folder: Path, dtype: torch.dtype = torch.float32, recompute: bool = False) -> HFModel:
    model = HFConfig(path=str(folder)).build()
    assert isinstance(model, HFModel)
    model.prepare(dtype, recompute, compile_blocks=False)
    model.materialize(CPU, seed=0)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, hf.VOCAB, (2, ENDS[-1]), generator=torch.Generator().manual_seed(0))


def documents() -> torch.Tensor:
    ids = torch.zeros(2, ENDS[-1], dtype=torch.int32)
    for end in ENDS[:-1]:
        ids[:, end:] += 1
    return ids


def alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each document as a batch of its own."""
    return torch.cat([model(ids[:, begin:end]).logits for begin, end in zip((0, *ENDS), ENDS, strict=False)], 1)


@pytest.mark.slow
@ours
def test_logits_and_gradients_are_those_of_transformers(family: str) -> None:
    """Of whole rows, and of documents that are packed into one, which transformers gets one by one."""
    folder = hf.folder_of(family)
    model, other, ids = build(folder), hf.load(folder), tokens()
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() < 1e-6
        assert (model(ids, documents()) - alone(other, ids)).abs().max() < 1e-6
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)), 1)
    batch = Batch(ids, labels, torch.zeros_like(ids))
    (loss_sum,) = forward(model, NextTokenConfig().build(), [batch], mask_documents=False)
    loss_sum.backward()
    logits = other(ids).logits[:, :-1].flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    theirs.backward()
    assert loss_sum.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = dict(other.named_parameters())
    assert count_parameters(model) == count_parameters(other)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and gradients[name].grad is not None
        scale = float(gradients[name].grad.abs().max())
        assert (parameter.grad - gradients[name].grad).abs().max() <= 2e-5 * max(scale, 1.0), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", pytest.param("qwen3_moe", marks=pytest.mark.full)])
def test_recomputation_changes_no_bit_of_a_gradient(family: str) -> None:
    grads, runs = [], []
    for recompute in (False, True):
        model = build(hf.folder_of(family), recompute=recompute).train()
        model.layers[0].self_attn.register_forward_hook(lambda *_, recompute=recompute: runs.append(recompute))
        model(tokens(), documents()).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert runs == [False, True, True]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", pytest.param("mixtral", marks=pytest.mark.full)])
def test_a_pass_in_bfloat16_has_float32_weights_and_gradients(family: str) -> None:
    folder = hf.folder_of(family)
    model, whole = build(folder, torch.bfloat16), build(folder)
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits.float() - whole(tokens())).abs().max() < 0.05
    logits.float().square().mean().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("is_drawn", [False, True], ids=["read", "drawn"])
def test_a_part_begins_as_the_same_part_of_the_whole(is_drawn: bool, family: str) -> None:
    folder = str(hf.folder_of(family))
    model = (HFConfig(from_config=folder) if is_drawn else HFConfig(path=folder)).build()
    model.materialize(CPU, seed=3)
    assert isinstance(model, HFModel)
    for name, parameter in model.named_parameters():
        for dim in range(parameter.ndim):
            begin, size = parameter.shape[dim] // 3, parameter.shape[dim] // 2
            offset = tuple(begin if d == dim else 0 for d in range(parameter.ndim))
            shape = tuple(size if d == dim else full for d, full in enumerate(parameter.shape))
            fragment = Fragment(name, tuple(parameter.shape), offset, shape, parameter.dtype)
            local = torch.full(shape, torch.nan)
            model.fill(name, local, fragment, 3)
            assert torch.equal(local, parameter[fragment.slices])
    logits = model(tokens())
    assert torch.isfinite(logits).all() and logits.std() > 0.01


@pytest.mark.slow
@ours
def test_drawn_weights_are_spread_as_the_family_spreads_them(family: str) -> None:
    model = HFConfig(from_config=str(hf.folder_of(family))).build()
    assert isinstance(model, HFModel)
    model.materialize(CPU, seed=0)
    torch.manual_seed(1)
    import transformers

    other = transformers.AutoModelForCausalLM.from_config(hf.config_of(family), dtype=torch.float32)
    for name, parameter in other.state_dict(keep_vars=False).items():
        if name == "lm_head.weight" and model.is_tied:
            continue
        own = model.get_parameter(name).detach()
        if parameter.numel() > 1000:
            assert float(own.std()) == pytest.approx(float(parameter.std()), rel=0.1, abs=1e-9), name
        elif parameter.std() == 0:
            assert torch.equal(own, parameter), name


@pytest.mark.slow
def test_a_bfloat16_folder_is_read_to_the_bit(tmp_path: Path) -> None:
    hf.build("qwen2", torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = build(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.bfloat16(), stored[name]), name


def test_positions_begin_anew_in_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 3, 3]])
    assert positions_of(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 2]]


# --- Refusals. ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama's folder that a test may spoil."""
    return Path(shutil.copytree(hf.folder_of("llama"), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as raised:
        HFConfig(path=str(folder)).build()
    text = str(raised.value)
    assert text.startswith("model.path=") and "Fix: " in text
    return text


@pytest.mark.slow
def test_another_configuration_is_refused_by_name(folder: Path) -> None:
    change_config(folder, model_type="unheard_of")
    assert "unheard_of" in refused(folder)
    change_config(folder, model_type="bert", architectures=["BertForMaskedLM"])
    refused(folder)
    (folder / "config.json").write_text('{"model_type": "falcon"}')
    assert "FalconForCausalLM, whose attention cannot be replaced" in refused(folder)
    change_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "is not a JSON object" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "cannot be used" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


@pytest.mark.slow
def test_other_weights_are_refused_by_name(folder: Path) -> None:
    norm = "model.norm.weight"
    change_weights(folder, **{norm: torch.ones(65)})
    assert f"{norm} is [65] and should be [64]" in refused(folder)
    change_weights(folder, **{norm: None})
    assert f"it has no {norm}" in refused(folder)
    change_weights(folder, **{norm: torch.ones(64), "model.extra.weight": torch.ones(3)})
    assert "it has model.extra.weight, which this model has not" in refused(folder)
    change_weights(
        folder, **{"model.extra.weight": None, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    HFConfig(path=str(folder)).build()  # of old folders
    header = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(header[:8] + b"\xff" * 8 + header[16:])
    assert "model.safetensors cannot be used" in refused(folder, CorruptCheckpoint)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "other formats hold pickles" in refused(folder)


@pytest.mark.slow
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf.folder_of("qwen2"), tmp_path / "model"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, **{"lm_head.weight": embedding.clone()})
    build(folder)
    embedding[7, 7] += 1
    change_weights(folder, **{"lm_head.weight": embedding})
    with pytest.raises(ConfigError, match=r"has lm_head\.weight that differs from model\.embed_tokens\.weight"):
        build(folder)


def test_a_gguf_file_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "convert it: python -c" in refused(tmp_path / "model.gguf")


@pytest.mark.slow
def test_another_way_to_make_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def with_a_twist(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", with_a_twist)
    with pytest.raises(ConfigError, match="makes its logits in a way that is not known here"):
        HFConfig(path=str(hf.folder_of("llama"))).build()


@pytest.mark.slow
def test_a_layer_that_does_not_attend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else tokens would be mixed over the borders of documents."""
    model = build(hf.folder_of("llama"))
    monkeypatch.setattr(model.layers[1], "forward", lambda hidden_states, *args, **kwargs: hidden_states.cumsum(1))
    with pytest.raises(ConfigError, match="has 3 layers, of which 2 use an attention that can be replaced"):
        model(tokens())
