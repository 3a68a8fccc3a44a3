from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.optimizers import check_golden, golden_settings, gradient, make, parameters_of, state_numel, take_steps
from torch import nn

from windlass.optim import Apollo
from windlass.optim.apollo import random_projection

SETTINGS = golden_settings()
MINI = {"rank": 1, "scale": 128.0, "granularity": "tensor"}


@pytest.mark.parametrize("weight_decay", SETTINGS["weight_decays"])
@pytest.mark.parametrize("shape", [tuple(shape) for shape in SETTINGS["shapes"]])
@pytest.mark.parametrize(("name", "keys"), [("apollo", {"rank": SETTINGS["rank"]}), ("apollo_mini", MINI)])
def test_compat_follows_the_authors_trajectory(
    name: str, keys: dict[str, Any], shape: tuple[int, int], weight_decay: float
) -> None:
    def build(parameter: nn.Parameter, weight_decay: float) -> Apollo:
        group = {"params": [parameter], "update_interval": SETTINGS["update_interval"], **keys}
        return Apollo([group], lr=SETTINGS["learning_rates"][name], weight_decay=weight_decay, compat=True)

    check_golden(name, build, shape, weight_decay)


def test_compat_seeds_count_all_parameters() -> None:
    first, second = parameters_of([(6, 4), (6, 4)])
    optimizer = Apollo([{"params": [first]}, {"params": [second], "rank": 2, "update_interval": 1}], compat=True)
    seed = 2  # of the second parameter
    for epoch in range(3):
        values = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) / math.sqrt(2)
        assert torch.equal(optimizer._authors_projection(second, 2, epoch), values.mT)
        seed = int(torch.randint(0, 2**63 - 1, (15,), generator=torch.Generator().manual_seed(seed))[-1])


def update_norm(parameter: nn.Parameter, optimizer: Apollo, grad: torch.Tensor) -> float:
    before = parameter.detach().clone()
    parameter.grad = grad
    optimizer.step()
    return float((parameter.detach() - before).norm())


@pytest.mark.parametrize("keys", [{"rank": 4}, MINI])
def test_a_zero_gradient_does_not_freeze_the_matrix(keys: dict[str, Any]) -> None:
    """Update norms within 3 steps of one zero gradient are at least half of those without it."""
    norms: dict[bool, list[float]] = {}
    for has_zero in (False, True):
        (parameter,) = parameters_of([(24, 16)])
        optimizer = Apollo([{"params": [parameter], **keys}], lr=1e-2)
        grads = [gradient((24, 16), step) for step in range(20)]
        if has_zero:
            grads[10] = torch.zeros(24, 16)
        norms[has_zero] = [update_norm(parameter, optimizer, grad) for grad in grads]
    assert norms[True][10] == 0.0
    assert norms[True][13] >= 0.5 * norms[False][13] > 0


def test_compat_freezes_as_the_authors_code_does() -> None:
    (parameter,) = parameters_of([(24, 16)])
    optimizer = Apollo([{"params": [parameter], "rank": 4}], lr=1e-2, compat=True)
    norms = [update_norm(parameter, optimizer, gradient((24, 16), step) * (step != 10)) for step in range(14)]
    assert norms[13] < 1e-6 * norms[9]


def test_a_first_gradient_of_zero_does_not_freeze_the_matrix() -> None:
    (parameter,) = parameters_of([(24, 16)])
    optimizer = Apollo([{"params": [parameter], "rank": 4}], lr=1e-2)
    norms = [update_norm(parameter, optimizer, gradient((24, 16), step) * (step > 0)) for step in range(3)]
    assert norms[0] == 0.0
    assert norms[1] > 1e-3


def test_an_update_grows_by_at_most_one_percent() -> None:
    (parameter,) = parameters_of([(24, 16)])
    optimizer = Apollo([{"params": [parameter], "rank": 4}], lr=1e-2)
    lengths = []
    for step in range(6):
        parameter.grad = gradient((24, 16), step) * 3.0**step
        optimizer.step()
        lengths.append(float(optimizer.state[parameter]["prev_norm"]))
    ratios = [after / before for before, after in itertools.pairwise(lengths)]
    assert max(ratios) == pytest.approx(1.01, rel=1e-5)


@pytest.mark.parametrize("keys", [{"rank": 3}, MINI])
@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (8, 8)])
def test_state_is_as_large_as_the_formula(shape: tuple[int, int], keys: dict[str, Any]) -> None:
    """2 L r + 2: the moments, the step and the length of the last update."""
    (parameter,) = parameters_of([shape])
    optimizer = Apollo([{"params": [parameter], **keys}])
    take_steps(optimizer, [parameter], range(2))
    state = optimizer.state[parameter]
    assert set(state) == {"exp_avg", "exp_avg_sq", "prev_norm", "step"}
    assert state_numel(optimizer) + 1 == 2 * max(shape) * keys["rank"] + 2
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in state.values())


def test_the_projection_is_a_function_of_seed_shape_and_step() -> None:
    first = random_projection(12, 4, seed=0, epoch=0)
    assert torch.equal(first, random_projection(12, 4, seed=0, epoch=0))
    for other in (random_projection(12, 4, seed=1, epoch=0), random_projection(12, 4, seed=0, epoch=1)):
        assert (first - other).abs().max() > 0.1
    many = random_projection(2000, 64, seed=0, epoch=0)
    assert float(many.std()) == pytest.approx(1 / 8, rel=0.01)


def test_the_projection_changes_with_the_interval_and_is_kept_between() -> None:
    (parameter,) = parameters_of([(10, 7)])
    optimizer = make("apollo", [parameter])
    seen = []
    for step in range(9):
        parameter.grad = gradient((10, 7), step)
        optimizer.step()
        kept = next(iter(optimizer._projections.values()))
        seen.append(kept[max(kept)])
    assert [step for step in range(1, 9) if seen[step] is not seen[step - 1]] == [4, 8]
    assert len(kept) == 2, "older projections are dropped"


def test_the_seed_of_a_group_changes_what_is_drawn() -> None:
    weights = []
    for seed in (0, 0, 1):
        (parameter,) = parameters_of([(10, 7)])
        take_steps(Apollo([{"params": [parameter], "rank": 2, "seed": seed}]), [parameter], range(3))
        weights.append(parameter.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 8}, r"rank=8 is above the smaller dim of parameter 0, \[10, 7\]"),
        ({"rank": 0}, "rank=0: must be a whole number from 1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": 2, "update_interval": 0}, "update_interval=0: must be at least 1"),
        ({"rank": 2, "scale": 0.0}, "scale=0.0: must be above 0"),
        ({"rank": 2, "granularity": "row"}, "granularity='row': must be one of channel, tensor"),
    ],
)
def test_keys_out_of_range_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Apollo([{"params": parameters_of([(10, 7)]), **keys}])


@pytest.mark.parametrize("shape", [(10,), (2, 3, 4)])
def test_a_target_that_is_no_matrix_is_refused_by_name(shape: tuple[int, ...]) -> None:
    (parameter,) = parameters_of([shape])
    with pytest.raises(ValueError, match=r"norm.weight is \[.*Apollo treats matrices"):
        Apollo([{"params": [("norm.weight", parameter)], "rank": 2}])


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"lr": math.nan}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": math.inf}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Apollo([{"params": parameters_of([(10, 7)]), "rank": 2}], **options)
