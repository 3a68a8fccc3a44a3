from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support.optimizers import check_golden, golden_settings, gradient, parameters_of, state_numel, take_steps
from torch import nn

from windlass.errors import ConfigError
from windlass.optim import GaLore, base, galore
from windlass.optim.config import GaLoreConfig
from windlass.optim.galore import aligned, main_directions

SETTINGS = golden_settings()
SHAPES = [(34, 49), (49, 34), (40, 40)]


def build(parameters: list, rank: int = 4, update_interval: int = 7, **settings: Any) -> GaLore:
    keys = {key: settings.pop(key) for key in ("shard_projector", "scale") if key in settings}
    return GaLore([{"params": parameters, "rank": rank, "update_interval": update_interval, **keys}], **settings)


@pytest.mark.parametrize("weight_decay", SETTINGS["weight_decays"])
@pytest.mark.parametrize("shape", [tuple(shape) for shape in SETTINGS["shapes"]])
def test_compat_follows_the_authors_trajectory(shape: tuple[int, int], weight_decay: float) -> None:
    def of_one(parameter: nn.Parameter, weight_decay: float) -> GaLore:
        lr, rank, interval = SETTINGS["learning_rates"]["galore"], SETTINGS["rank"], SETTINGS["update_interval"]
        return build([parameter], rank, interval, lr=lr, weight_decay=weight_decay, compat=True)

    check_golden("galore", of_one, shape, weight_decay)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projector_spans_what_the_svd_finds(shape: tuple[int, int]) -> None:
    (parameter,) = parameters_of([shape])
    optimizer = build([parameter])
    take_steps(optimizer, [parameter], range(1))
    found = optimizer.state[parameter]["projector"].double()
    tall = gradient(shape, 0).double()
    tall = tall.mT if shape[0] < shape[1] else tall
    expected = torch.linalg.svd(tall, full_matrices=False)[2][:4].mT
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    # In the same order too, so only signs are free.
    torch.testing.assert_close((found.mT @ expected).abs(), torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_directions_do_not_depend_on_strides_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = gradient((49, 34), 0)
    whole = main_directions(tall, 5)
    assert torch.equal(main_directions(tall.mT.contiguous().mT, 5), whole)
    monkeypatch.setattr(galore, "GRAM_NUMEL", 100)
    torch.testing.assert_close(main_directions(tall, 5), whole, atol=1e-6, rtol=0)


def test_signs_follow_the_vector_before() -> None:
    before = torch.linalg.qr(gradient((12, 3), 0))[0]
    flipped = before * torch.tensor([1.0, -1.0, -1.0])
    assert torch.equal(aligned(flipped, before), before)
    first = aligned(flipped, torch.zeros(12, 3))
    assert (first.gather(0, first.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(first.abs(), before.abs())


def test_directions_change_at_refreshes_alone_and_keep_their_signs() -> None:
    (parameter,) = parameters_of([(30, 20)])
    optimizer = build([parameter], update_interval=3)
    base_gradient, projectors = gradient((30, 20), 99), []
    for step in range(7):
        # The same subspace but for a little noise, and the other way round every step.
        parameter.grad = (-1) ** step * base_gradient + 0.02 * gradient((30, 20), step)
        optimizer.step()
        projector = optimizer.state[parameter]["projector"]
        if step == 2:
            projector.neg_()  # signs that would not come about by themselves
        projectors.append(projector.clone())
    for step in (1, 4, 5):
        assert torch.equal(projectors[step], projectors[step - 1])
    for step in (3, 6):
        assert not torch.equal(projectors[step], projectors[step - 1])
        assert ((projectors[step] * projectors[step - 1]).sum(0) > 0.9).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_refresh_without_directions_keeps_the_old_ones(value: float) -> None:
    parameters = parameters_of([(30, 20), (20, 30)])
    optimizer = build(parameters, update_interval=2)
    take_steps(optimizer, parameters, range(2))
    before = [optimizer.state[parameter]["projector"].clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    optimizer.step()
    for parameter, projector in zip(parameters, before, strict=True):
        assert torch.equal(optimizer.state[parameter]["projector"], projector)
        assert bool(parameter.isfinite().all()) == (value == 0.0)


def test_a_matrix_that_begins_with_a_zero_gradient_trains_later() -> None:
    (parameter,) = parameters_of([(30, 20)])
    optimizer = build([parameter])
    start = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, start)
    take_steps(optimizer, [parameter], range(1))
    assert not torch.equal(parameter, start) and parameter.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_as_large_as_it_says_and_float32(dtype: torch.dtype) -> None:
    parameters = parameters_of(SHAPES, dtype)
    optimizer = build(parameters)
    take_steps(optimizer, parameters, range(3))
    for parameter, (rows, columns) in zip(parameters, SHAPES, strict=True):
        long, short = max(rows, columns), min(rows, columns)
        state = optimizer.state[parameter]
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "step": (),
            "exp_avg": (long, 4),
            "exp_avg_sq": (long, 4),
            "projector": (short, 4),
        }
        assert all(value.dtype == torch.float32 for value in state.values())
        assert sum(value.nbytes for value in state.values()) == 4 * (2 * long * 4 + short * 4 + 1)
    assert state_numel(optimizer) == sum(8 * max(shape) + 4 * min(shape) for shape in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(34, 49), (49, 34)])
def test_a_step_is_what_the_paper_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Several steps against the rule in float64; bfloat16 weights are rounded once a step."""
    (parameter,) = parameters_of([shape], dtype)
    optimizer = build([parameter], lr=0.1, weight_decay=0.2, scale=0.5)
    weight = parameter.detach().double()
    is_wide = shape[0] < shape[1]
    exp_avg = exp_avg_sq = 0.0
    for step in range(1, 7):
        take_steps(optimizer, [parameter], range(step, step + 1))
        projector = optimizer.state[parameter]["projector"].double()
        tall = parameter.grad.double().mT if is_wide else parameter.grad.double()
        projected = tall @ projector
        exp_avg = 0.9 * exp_avg + 0.1 * projected
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * projected**2
        update = 0.5 * exp_avg / (exp_avg_sq**0.5 + 1e-6) @ projector.mT
        weight = weight - 0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) * (update.mT if is_wide else update)
        weight = (weight.to(dtype).double() * (1 - 0.1 * 0.2)).to(dtype).double()
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(parameter.detach().double(), weight, atol=tolerance, rtol=tolerance)


def test_stacked_matrices_are_updated_as_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for numel in (1, 1 << 20):
        monkeypatch.setattr(base, "BATCH_NUMEL", {"cpu": numel})
        parameters = parameters_of([(12, 9)] * 3 + [(9, 12)] * 2)
        optimizer = build(parameters)
        take_steps(optimizer, parameters, range(15))
        projectors = [optimizer.state[parameter]["projector"] for parameter in parameters]
        found.append((projectors, [parameter.detach() for parameter in parameters]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other), "directions are found one by one"
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compat", [False, True])
def test_ten_and_ten_steps_through_a_file_are_twenty(compat: bool) -> None:
    parameters = parameters_of(SHAPES)
    optimizer = build(parameters, compat=compat)
    take_steps(optimizer, parameters, range(10))
    file = io.BytesIO()
    torch.save(([parameter.detach() for parameter in parameters], optimizer.state_dict()), file)
    take_steps(optimizer, parameters, range(10, 20))
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others = [nn.Parameter(value) for value in values]
    resumed = build(others, compat=compat)
    resumed.load_state_dict(state)
    take_steps(resumed, others, range(10, 20))
    assert all(torch.equal(one, other) for one, other in zip(others, parameters, strict=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, r"rank=0: must be a whole number from 1"),
        ({"rank": 35}, r"rank=35 is above the smaller dim of parameter 0, \[34, 49\]"),
        ({"update_interval": 0}, r"update_interval=0: must be at least 1"),
        ({"scale": 0.0}, r"scale=0.0: must be above 0"),
        ({"shard_projector": None}, r"shard_projector=None: must be True or False"),
    ],
)
def test_a_key_out_of_range_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(parameters_of([(34, 49)]), **keys)


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 32), nn.Linear(32, 3))


def test_the_configuration_builds_it() -> None:
    config = GaLoreConfig(lr=0.02, rank=4, update_interval=5, shard_projector=True, adamw_lr=1e-3, weight_decay=0.3)
    optimizer = config.build(model())
    assert type(optimizer) is GaLore and not optimizer.defaults["compat"]
    projected, *rest = optimizer.param_groups
    assert projected["param_names"] == ["1.weight"]
    keys = ("rank", "update_interval", "scale", "shard_projector", "lr", "weight_decay", "betas", "eps")
    assert [projected[key] for key in keys] == [4, 5, 0.25, True, 0.02, 0.3, (0.9, 0.999), 1e-6]
    assert all("rank" not in group and group["lr"] == 1e-3 for group in rest)


def test_a_configuration_without_a_matrix_for_the_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.rank=24: .*no linear layer inside the model is wider"):
        GaLoreConfig(rank=24).build(model())
