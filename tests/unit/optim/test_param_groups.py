from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import windlass.optim
from windlass.conf.compose import compose
from windlass.errors import ConfigError
from windlass.models.config import LlamaConfig
from windlass.optim import low_rank_param_groups, matrix_param_groups
from windlass.optim.config import ApolloConfig, CosmosConfig, GaLoreConfig, MuonConfig
from windlass.optim.param_groups import default_rank, sort_parameters

OPTIMIZERS = ("apollo", "apollo_mini", "galore", "natural_galore", "muon", "cosmos", "sgd_sai")


def llama(tie_embeddings: bool = False) -> nn.Module:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        tie_embeddings=tie_embeddings,
    ).build()


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_sorted_by_what_holds_a_parameter(tied: bool) -> None:
    model = llama(tied)
    found = sort_parameters(model)
    assert len(found.inner) == 2 * 7
    assert all("proj" in name for name, _ in found.inner)
    assert [name for name, _ in found.outer] == ["embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert len(found.vectors) == 2 * 2 + 1
    assert len(found.inner) + len(found.outer) + len(found.vectors) == len(list(model.parameters()))


def test_a_head_that_shares_its_weight_with_an_embedding_is_not_inner() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "inner": nn.Linear(8, 8), "to_logits": nn.Linear(8, 12)})
    assert [name for name, _ in sort_parameters(model).inner] == ["inner.weight", "to_logits.weight"]
    model["to_logits"].weight = model["embed"].weight
    assert [name for name, _ in sort_parameters(model).inner] == ["inner.weight"]
    assert [name for name, _ in sort_parameters(model, heads=["inner"]).inner] == []


def test_low_rank_groups() -> None:
    model = llama()
    low_rank, matrices, vectors = low_rank_param_groups(model, rank=8, scale=2.0)
    assert (low_rank["rank"], low_rank["scale"]) == (8, 2.0)
    assert len(low_rank["params"]) == 2 * 5
    assert names(matrices)[:2] == ["embed_tokens.weight", "lm_head.weight"]
    assert [name.split(".")[-2] for name in names(matrices)[2:]] == ["k_proj", "v_proj"] * 2, "8 x 32: nothing to save"
    assert "weight_decay" not in matrices and vectors["weight_decay"] == 0.0
    assert all("norm" in name for name in names(vectors))


def test_parameters_that_are_not_trained_are_left_out() -> None:
    model = llama()
    for parameter in model.layers[0].parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    assert sum(len(group["params"]) for group in low_rank_param_groups(model, rank=4)) == 7 + 2 + 3


def test_a_rank_that_nothing_is_wider_than_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no linear layer inside the model is wider than rank 32: .*\[8, 32\]"):
        low_rank_param_groups(llama(), rank=32)
    with pytest.raises(ValueError, match="no linear layers to project"):
        low_rank_param_groups(nn.Embedding(4, 4))


def test_matrix_groups() -> None:
    matrices, rest, vectors = matrix_param_groups(llama(), lr=1e-3)
    assert len(matrices["params"]) == 14 and "algorithm" not in matrices and "lr" not in matrices
    assert names(rest) == ["embed_tokens.weight", "lm_head.weight"]
    for group in (rest, vectors):
        assert (group["algorithm"], group["lr"]) == ("adamw", 1e-3)
    assert vectors["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("size", "rank"),
    [("tiny", 48), ("llama_60m", 128), ("llama_130m", 192), ("llama_350m", 256), ("llama_1b", 256), ("llama_7b", 256)],
)
def test_the_default_rank_of_each_size(size: str, rank: int) -> None:
    config = compose([f"model={size}"]).model
    config.vocab_size = config.vocab_size or 256
    assert default_rank(config.build()) == rank


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_preset_builds_its_optimizer_and_trains(name: str) -> None:
    config = compose([f"optim={name}"]).optim
    assert config.name == name
    model = llama()
    model.materialize(torch.device("cpu"), seed=0)  # type: ignore[operator]
    optimizer = config.build(model)
    kind = {"apollo": "Apollo", "apollo_mini": "Apollo", "galore": "GaLore", "natural_galore": "NaturalGaLore"}
    kind |= {"muon": "Muon", "cosmos": "Cosmos", "sgd_sai": "SGDSaI"}
    assert type(optimizer) is getattr(windlass.optim, kind[name])
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_apollo_mini_is_rank_one_by_tensor() -> None:
    low_rank = compose(["optim=apollo_mini"]).optim.build(llama()).param_groups[0]
    assert (low_rank["rank"], low_rank["scale"], low_rank["granularity"]) == (1, 128.0, "tensor")


def test_the_rest_may_have_a_rate_of_its_own() -> None:
    for config in (ApolloConfig(lr=1e-2, adamw_lr=3e-3), MuonConfig(lr=1e-2, adamw_lr=3e-3)):
        rates = [group["lr"] for group in config.build(llama()).param_groups]
        assert rates == [1e-2, 3e-3, 3e-3]
    assert {group["lr"] for group in ApolloConfig(lr=1e-2).build(llama()).param_groups} == {1e-2}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ApolloConfig, {"rank": 0}, r"optim\.rank=0: must be at least 1"),
        (ApolloConfig, {"update_interval": 0}, r"optim\.update_interval=0"),
        (ApolloConfig, {"scale": 0.0}, r"optim\.scale=0\.0: must be above 0"),
        (ApolloConfig, {"adamw_lr": -1.0}, r"optim\.adamw_lr=-1\.0"),
        (GaLoreConfig, {"betas": (0.9, 1.5)}, r"optim\.betas"),
        (MuonConfig, {"momentum": 1.0}, r"optim\.momentum=1\.0"),
        (CosmosConfig, {"rank": 0}, r"optim\.rank=0"),
    ],
)
def test_settings_out_of_range_are_refused(config: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_rank_above_the_model_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"optim\.rank=64: .*no linear layer inside the model is wider") as error:
        ApolloConfig(rank=64).build(llama())
    assert "lower it" in str(error.value)
