from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support.optimizers import gradient, parameters_of, state_numel, take_steps
from torch import nn

from windlass.errors import ConfigError
from windlass.optim import NaturalGaLore, base, natural_galore
from windlass.optim.config import NaturalGaLoreConfig
from windlass.optim.natural_galore import combination, natural_weights, products_with

SHAPES = [(34, 49), (49, 34), (40, 40)]


def build(parameters: list, **settings: Any) -> NaturalGaLore:
    group = {"params": parameters, "rank": 2, "update_interval": 7, "history": 5}
    keys = {key: settings.pop(key) for key in list(settings) if key in group or key in NaturalGaLore.matrix_keys}
    return NaturalGaLore([group | keys], **settings)


def natural(columns: torch.Tensor, slot: int, damping: float) -> torch.Tensor:
    gram = torch.stack([products_with(columns, other) for other in range(len(columns))])
    return combination(columns, natural_weights(gram[None], slot, damping)[0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_it_is_the_dense_inverse_and_the_papers_identity(scale: float, noise: float, monkeypatch: Any) -> None:
    """Also for a history of nearly equal gradients, where the identity as the paper has it loses digits."""
    monkeypatch.setattr(natural_galore, "BLOCK_NUMEL", {"cpu": 17})
    damping, count = 1e-3, 6
    history = scale * (gradient((1, 20, 3), 0) + noise * gradient((count, 20, 3), 1))
    columns, slot = history.flatten(1).double().mT, 4
    newest = columns[:, slot]
    dense = torch.linalg.solve(damping * torch.eye(60, dtype=torch.float64) + columns @ columns.mT, newest)
    inner = torch.linalg.solve(
        torch.eye(count, dtype=torch.float64) + columns.mT @ columns / damping, columns.mT @ newest
    )
    woodbury = newest / damping - columns @ inner / damping**2
    found = natural(history, slot, damping).flatten().double()
    size = float(dense.norm())
    assert float((found - dense).norm()) < 1e-6 * size
    assert float((woodbury - dense).norm()) < 1e-4 * size


def test_the_first_natural_gradient_is_the_damped_gradient() -> None:
    history = torch.zeros(5, 20, 3)
    history[0] = gradient((20, 3), 0)
    expected = history[0] / (1e-2 + history[0].square().sum())
    torch.testing.assert_close(natural(history, 0, 1e-2), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_follow_a_dense_float64_oracle(shape: tuple[int, int]) -> None:
    """The whole rule with dense matrices: over refreshes, with histories that are full and half full."""
    (parameter,) = parameters_of([shape])
    optimizer = build([parameter], lr=1e-2, weight_decay=0.1, history=3, damping=0.5)
    weight = parameter.detach().double()
    is_wide, rank = shape[0] < shape[1], 2
    exp_avg = exp_avg_sq = before = torch.zeros(())
    history: list[torch.Tensor] = []
    for step in range(1, 16):
        take_steps(optimizer, [parameter], range(step, step + 1))
        tall = parameter.grad.double().mT if is_wide else parameter.grad.double()
        if step % 7 == 1:
            projector = torch.linalg.svd(tall, full_matrices=False)[2][:rank].mT
            largest = projector.gather(0, projector.abs().argmax(0, keepdim=True))[0]
            projector = projector * (largest if step == 1 else (projector * before).sum(0)).sign()
            before, history = projector, []
        history = [*history, (tall @ projector).flatten()][-3:]
        columns = torch.stack(history, dim=1)
        fisher = 0.5 * torch.eye(len(columns), dtype=torch.float64) + columns @ columns.mT
        projected = (torch.linalg.inv(fisher) @ history[-1]).view(-1, rank)
        exp_avg = 0.9 * exp_avg + 0.1 * projected
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * projected**2
        update = 0.25 * exp_avg / (exp_avg_sq**0.5 + 1e-6) @ projector.mT
        weight = weight - 1e-2 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) * (update.mT if is_wide else update)
        weight = weight * (1 - 1e-2 * 0.1)
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_as_large_as_it_says_and_float32(dtype: torch.dtype) -> None:
    parameters = parameters_of(SHAPES, dtype)
    optimizer = build(parameters)
    take_steps(optimizer, parameters, range(3))
    for parameter, shape in zip(parameters, SHAPES, strict=True):
        state = optimizer.state[parameter]
        assert tuple(state["history"].shape) == (5, max(shape), 2) and tuple(state["gram"].shape) == (2, 5, 5)
        assert all(value.dtype == torch.float32 for value in state.values())
    expected = sum(2 * (2 * max(shape) + min(shape)) + 5 * max(shape) * 2 + 2 * 5 * 5 for shape in SHAPES)
    assert state_numel(optimizer) == expected


def test_the_gram_matrix_is_that_of_the_history() -> None:
    """Kept up a row at a time, it stays what it would be if it were computed anew, to more digits than float32 has."""
    (parameter,) = parameters_of([(49, 34)])
    optimizer = build([parameter])
    for step in range(13):
        take_steps(optimizer, [parameter], range(step, step + 1))
        history = optimizer.state[parameter]["history"].flatten(1).double()
        assert int(history.any(1).sum()) == min(step % 7 + 1, 5), "it begins anew at a refresh"
        found = optimizer.state[parameter]["gram"].double().sum(0)
        torch.testing.assert_close(found, history @ history.mT, rtol=1e-12, atol=1e-12)


def test_stacked_matrices_are_updated_as_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for numel in (1, 1 << 20):
        monkeypatch.setattr(base, "BATCH_NUMEL", {"cpu": numel})
        parameters = parameters_of([(12, 9)] * 3 + [(9, 12)] * 2)
        take_steps(build(parameters), parameters, range(15))
        found.append([parameter.detach() for parameter in parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_ten_and_ten_steps_through_a_file_are_twenty() -> None:
    parameters = parameters_of(SHAPES)
    optimizer = build(parameters)
    take_steps(optimizer, parameters, range(10))
    file = io.BytesIO()
    torch.save(([parameter.detach() for parameter in parameters], optimizer.state_dict()), file)
    take_steps(optimizer, parameters, range(10, 20))
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others = [nn.Parameter(value) for value in values]
    resumed = build(others)
    resumed.load_state_dict(state)
    take_steps(resumed, others, range(10, 20))
    assert all(torch.equal(one, other) for one, other in zip(others, parameters, strict=True))


def test_zero_gradients_leave_the_weights_and_later_ones_do_not() -> None:
    (parameter,) = parameters_of([(30, 20)])
    optimizer = build([parameter])
    start = parameter.detach().clone()
    for _ in range(2):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(parameter, start)
    take_steps(optimizer, [parameter], range(10))
    assert parameter.isfinite().all() and not torch.equal(parameter, start)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"history": 0}, r"history=0: must be at least 1"),
        ({"damping": 0.0}, r"damping=0.0: must be above 0"),
        ({"damping": float("inf")}, r"damping=inf: must be above 0 and finite"),
    ],
)
def test_a_key_out_of_range_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(parameters_of([(34, 49)]), **keys)


def test_state_of_another_history_is_refused() -> None:
    parameters = parameters_of([(34, 49)])
    optimizer = build(parameters)
    take_steps(optimizer, parameters, range(1))
    with pytest.raises(ValueError, match="the state of parameter 0 is"):
        build(parameters, history=6).load_state_dict(optimizer.state_dict())


def test_the_configuration_builds_it() -> None:
    config = NaturalGaLoreConfig(rank=4, history=3, damping=0.1)
    optimizer = config.build(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 3)))
    assert type(optimizer) is NaturalGaLore
    keys = ("rank", "history", "damping", "scale", "shard_projector")
    assert [optimizer.param_groups[0][key] for key in keys] == [4, 3, 0.1, 0.25, False]


@pytest.mark.parametrize(("key", "value"), [("history", 0), ("damping", 0.0)])
def test_a_setting_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{key}={value}: must be"):
        NaturalGaLoreConfig(**{key: value})
