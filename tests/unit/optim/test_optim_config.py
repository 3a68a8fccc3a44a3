from __future__ import annotations

import pytest
import torch
from torch import nn

from windlass.errors import ConfigError
from windlass.optim.config import AdamWConfig, OptimConfig, Schedule
from windlass.optim.param_groups import decay_param_groups
from windlass.optim.scheduler import build_scheduler


def model() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].bias.requires_grad_(False)
    return module


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = decay_param_groups(model().named_parameters(), 0.3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [["0.weight", "2.weight"], ["0.bias", "1.weight", "1.bias"]]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_an_empty_group_is_left_out() -> None:
    assert len(decay_param_groups([("w", torch.zeros(2, 2, requires_grad=True))], 0.1)) == 1
    assert decay_param_groups([("w", torch.zeros(2, 2))], 0.1) == [], "it is not trained"


def test_the_optimizer_is_built_as_configured() -> None:
    config = AdamWConfig(lr=0.5, weight_decay=0.2, betas=(0.7, 0.8), eps=1e-5)
    optimizer = config.build(model())
    assert type(optimizer) is torch.optim.AdamW
    matrices, vectors = optimizer.param_groups
    for group in (matrices, vectors):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.7, 0.8), 1e-5, True)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert matrices["param_names"] == ["0.weight", "2.weight"]


def test_the_scheduler_is_built_as_configured() -> None:
    config = AdamWConfig(schedule=Schedule.wsd, warmup_steps=4, decay_fraction=0.5, min_lr_ratio=0.25, lr=1.0)
    optimizer = config.build(model())
    scheduler = build_scheduler(config, optimizer, num_steps=20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 5)
    assert [scheduler.factor(step) for step in (4, 9, 19)] == [1.0, 1.0, pytest.approx(0.25)]


def test_a_warmup_longer_than_the_run_ends_with_it() -> None:
    config = AdamWConfig(warmup_steps=1000)
    scheduler = build_scheduler(config, config.build(model()), num_steps=4)
    assert [scheduler.factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_lists_become_tuples() -> None:
    assert AdamWConfig(betas=[0, 0.5]).betas == (0.0, 0.5)  # type: ignore[arg-type]  # as OmegaConf gives them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr=0\.0: must be above 0.*Fix: set optim\.lr=0\.002"),
        ({"lr": -1.0}, r"optim\.lr=-1\.0"),
        ({"lr": float("nan")}, r"optim\.lr=nan"),
        ({"lr": float("inf")}, r"optim\.lr=inf"),
        ({"weight_decay": -0.1}, r"optim\.weight_decay=-0\.1: must not be negative"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps=-1: must not be negative"),
        ({"decay_fraction": 1.5}, r"optim\.decay_fraction=1\.5: must be in \[0, 1\]"),
        ({"min_lr_ratio": -0.5}, r"optim\.min_lr_ratio=-0\.5: must be in \[0, 1\]"),
        ({"betas": (0.9, 1.0)}, r"optim\.betas=\(0\.9, 1\.0\): both must be in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"optim\.betas"),
        ({"betas": (0.9,)}, r"optim\.betas=\(0\.9,\): must be two numbers"),
        ({"betas": (0.9, 0.95, 0.99)}, r"optim\.betas=.*must be two numbers"),
        ({"eps": 0.0}, r"optim\.eps=0\.0: must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamWConfig(**settings)


def test_the_base_configuration_builds_nothing() -> None:
    with pytest.raises(TypeError, match="takes a AdamWConfig, not a OptimConfig"):
        OptimConfig().build(model())
