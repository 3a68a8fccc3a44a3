from __future__ import annotations

from typing import Any

import pytest
import torch
from support.optimizers import check_golden, golden_settings, gradient, parameters_of, take_steps
from torch import nn

from windlass.optim import Cosmos
from windlass.optim.config import CosmosConfig

SETTINGS = golden_settings()


def golden_cosmos(parameter: nn.Parameter, weight_decay: float, **options: Any) -> Cosmos:
    defaults = SETTINGS["cosmos_defaults"]
    return Cosmos(
        [parameter],
        lr=SETTINGS["learning_rates"]["cosmos"],
        betas=tuple(defaults["betas"]),
        eps=defaults["eps"],
        rank=SETTINGS["rank"],
        gamma=defaults["gamma"],
        ratio=defaults["lr_ratio"],
        weight_decay=weight_decay,
        **options,
    )


@pytest.mark.parametrize("shape", [tuple(shape) for shape in SETTINGS["shapes"]])
@pytest.mark.parametrize("weight_decay", SETTINGS["weight_decays"])
def test_compat_gives_the_authors_weights(shape: tuple[int, int], weight_decay: float) -> None:
    check_golden("cosmos", lambda *args: golden_cosmos(*args, compat=True), shape, weight_decay)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_default_differs_from_compat_by_what_bfloat16_does(shape: tuple[int, int]) -> None:
    """Some 4% of Muon's part, which is a fifth of the update; 1.3% to 3% if the residual kept its empty directions."""
    found = []
    for compat in (False, True):
        parameter = parameters_of([shape])[0]
        start = parameter.detach().clone()
        take_steps(golden_cosmos(parameter, 0.0, compat=compat), [parameter], range(8))
        found.append(parameter.detach() - start)
    assert float((found[0] - found[1]).norm()) < 0.013 * float(found[1].norm())


def test_an_update_has_the_size_that_ratio_says() -> None:
    parameters = parameters_of([(30, 20), (20, 30)])
    optimizer = Cosmos(parameters, lr=0.5, rank=4, ratio=0.3)
    for step in range(3):
        before = [parameter.detach().clone() for parameter in parameters]
        take_steps(optimizer, parameters, range(step, step + 1))
        for parameter, old in zip(parameters, before, strict=True):
            size = (parameter.detach() - old).square().mean().sqrt()
            torch.testing.assert_close(size, torch.tensor(0.15), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 4), ((20, 30), 4), ((30, 20), 64), ((20, 30), 64), ((1, 9), 4)])
def test_the_state_is_as_large_as_documented(shape: tuple[int, int], rank: int) -> None:
    parameter = parameters_of([shape])[0]
    optimizer = Cosmos([parameter], rank=rank)
    take_steps(optimizer, [parameter], range(3))
    (a, b), r = shape, min(rank, *shape)
    assert {key: tuple(value.shape) for key, value in optimizer.state[parameter].items()} == {
        "step": (),
        "momentum_buffer": (a, b),
        "exp_avg_sq": (a, r),
        "basis": (b, r),
        "covariance": (r, r),
    }
    basis = optimizer.state[parameter]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r), rtol=0, atol=1e-5)
    assert parameter.isfinite().all()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_basis_finds_the_leading_directions(shape: tuple[int, int]) -> None:
    """Of gradients that have mostly three, which the first gradient did not show."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(shape[1], 3, generator=generator)).Q
    parameter = parameters_of([shape])[0]
    optimizer = Cosmos([parameter], rank=3, betas=(0.9, 0.9))
    for step in range(30):
        parameter.grad = 0.01 * gradient(shape, step)
        if step > 0:
            parameter.grad += torch.randn(shape[0], 3, generator=generator) @ directions.T
        optimizer.step()
    basis = optimizer.state[parameter]["basis"]
    assert float(torch.linalg.svdvals(directions.T @ basis).min()) > 0.999


@pytest.mark.parametrize(("shape", "num_steps"), [((12, 8), 4), ((8, 12), 1)], ids=["no column is left", "4 are left"])
def test_with_a_basis_of_all_directions_rounding_is_no_update(shape: tuple[int, int], num_steps: int) -> None:
    """Nothing is left for Muon's part, and what float32 leaves must not be blown up to its size.

    Eight rows have eight directions in their first gradient, and in any other gradient others.
    """
    updates = []
    for gamma in (0.0, 0.2):
        parameter = parameters_of([shape])[0]
        start = parameter.detach().clone()
        take_steps(Cosmos([parameter], rank=8, gamma=gamma), [parameter], range(num_steps))
        updates.append(parameter.detach() - start)
    assert torch.equal(*updates)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"rank": 0}, "rank=0: must be a whole number from 1"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"gamma": -0.1}, r"gamma=-0\.1: must be finite and not negative"),
        ({"ratio": 0.0}, r"ratio=0\.0: must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cosmos(parameters_of([(4, 4)]), **settings)


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 is \[5\]: Cosmos treats matrices.*matrix_param_groups"):
        Cosmos(parameters_of([(5,)]))


def test_the_configuration_builds_it() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 9))
    optimizer = CosmosConfig(lr=0.02, rank=3, gamma=0.3).build(model)
    assert isinstance(optimizer, Cosmos)
    matrices, tables, vectors = optimizer.param_groups
    assert {key: matrices[key] for key in ("lr", "betas", "rank", "gamma", "ratio", "weight_decay")} == {
        "lr": 0.02,
        "betas": (0.95, 0.95),
        "rank": 3,
        "gamma": 0.3,
        "ratio": 0.2,
        "weight_decay": 0.1,
    }
    for group, decay in ((tables, 0.1), (vectors, 0.0)):
        assert (group["algorithm"], group["lr"], group["weight_decay"], group["eps"]) == ("adamw", 0.02, decay, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-20])
def test_an_update_from_next_to_nothing_is_finite_and_no_longer_than_others(size: float, dtype: torch.dtype) -> None:
    """A direction of zeros stays where it is; the squares of small ones are below what float32 holds."""
    (parameter,) = parameters_of([(32, 48)], dtype)
    before = parameter.detach().float().clone()
    optimizer = Cosmos([parameter], lr=0.1, rank=8, ratio=0.3)
    parameter.grad = (size * gradient((32, 48), 0)).to(dtype)
    optimizer.step()
    moved = (parameter.detach().float() - before).square().mean().sqrt()
    assert moved == 0.0 if size == 0.0 else 0.0 < moved < 0.04
