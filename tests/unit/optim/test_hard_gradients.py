"""Gradients that are zero, tiny, huge, constant or missing: weights and state stay finite, and updates are right."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from support.optimizers import gradient, make, parameters_of
from torch import Tensor, nn

from windlass.conf.compose import compose
from windlass.conf.schema import GROUPS
from windlass.optim import Muon, SGDSaI
from windlass.optim.config import OptimConfig
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.mesh import Mesh

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1e-10": lambda usual: usual * 1e-10,
    "1e-15": lambda usual: usual * 1e-15,
    "1e-30": lambda usual: usual * 1e-30,
    "1e-38": lambda usual: usual * 1e-38,
    "denormal": lambda usual: torch.full_like(usual, 1e-42),
    "flat": torch.ones_like,
    "tiny and flat": lambda usual: torch.full_like(usual, 1e-30),
    "one row": lambda usual: usual * (torch.arange(len(usual)) == 0).view(-1, *[1] * (usual.ndim - 1)),
    "huge": lambda usual: usual * 1e16,
}
SMALL = ("zero", "1e-10", "1e-15", "1e-30", "1e-38", "denormal", "tiny and flat")
ORDER = "HHUHU"
"""Of a hard gradient, H, and the usual one, U."""


class Model(nn.Module):
    """Parameters of every kind of shape that real models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.tall, self.wide, self.square = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 24)
        self.gate, self.rank_one = nn.Linear(24, 1), nn.Linear(1, 24)
        self.convolution, self.norm = nn.Conv1d(4, 6, 3), nn.LayerNorm(24)
        self.scale = nn.Parameter(torch.ones(()))
        self.no_rows, self.no_columns = nn.Linear(8, 0, bias=False), nn.Linear(0, 8)
        self.empty = nn.Parameter(torch.zeros(0))
        self.unused = nn.Linear(24, 24)


@functools.cache
def config_of(preset: str) -> OptimConfig:
    return compose([f"optim={preset}"]).optim


def build(preset: str, dtype: torch.dtype) -> tuple[list, torch.optim.Optimizer]:
    """The parameters that get gradients, and the preset's optimizer over them and the unused ones."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer = config_of(preset).build(model)
    if "rank" in optimizer.param_groups[0] and preset == "cosmos":
        optimizer.param_groups[0]["rank"] = 8  # something is left outside of the basis
    return [p for name, p in model.named_parameters() if not name.startswith("unused")], optimizer


def lengths(preset: str, dtype: torch.dtype, kind: str, order: str) -> list[Tensor]:
    """How far each step moves each parameter. Whatever is not finite fails."""
    parameters, optimizer = build(preset, dtype)
    trained = set(parameters)
    found = []
    for step, letter in enumerate(order):
        before = [parameter.detach().clone() for parameter in parameters]
        for index, parameter in enumerate(parameters):
            usual = gradient(tuple(parameter.shape), step, index)
            value = KINDS[kind](usual) if letter == "H" and usual.ndim else usual
            parameter.grad = value.to(dtype)
        optimizer.step()
        found.append(
            torch.stack([(p.detach() - old).float().norm() for p, old in zip(parameters, before, strict=True)])
        )
        for index, parameter in enumerate(parameters):
            for key, value in {"weight": parameter, **optimizer.state[parameter]}.items():
                assert value.isfinite().all(), f"{key} of {index}, {list(parameter.shape)}, at step {step}: {kind}"
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter in trained or not optimizer.state.get(parameter) for parameter in members), "unused"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_adamw_is_the_formula(kind: str) -> None:
    """Of every optimizer whose groups may be AdamW's; the low-rank ones add eps before the correction."""
    for name in ("apollo", "muon"):
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        (parameter,) = parameters_of([(9, 5)])
        optimizer = make(name, parameters_of([(4, 4)]), [parameter])
        optimizer.param_groups[1].update(settings)
        weight, first, second = parameter.detach().double(), torch.zeros(()).double(), torch.zeros(()).double()
        for step, letter in enumerate("UHUHHU", start=1):
            usual = gradient((9, 5), step)
            parameter.grad = KINDS[kind](usual) if letter == "H" else usual
            optimizer.step()
            first = 0.9 * first + 0.1 * parameter.grad.double()
            second = 0.95 * second + 0.05 * parameter.grad.double() ** 2
            correction = math.sqrt(1 - 0.95**step)
            eps = 1e-8 if name == "muon" else 1e-8 / correction
            change = first / (1 - 0.9**step) / (second.sqrt() / correction + eps)
            weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * change
            torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["HHUU", "UHUH"])
def test_sgd_sai_is_the_formula(kind: str, order: str) -> None:
    """With the scale of the first gradient that is not small; before that with each step's own."""
    (parameter,) = parameters_of([(9, 5)])
    optimizer = SGDSaI([parameter], lr=1e-2, momentum=0.9, weight_decay=0.1)
    weight, momentum, scale = parameter.detach().double(), None, None
    for step, letter in enumerate(order):
        usual = gradient((9, 5), step)
        parameter.grad = KINDS[kind](usual) if letter == "H" else usual
        optimizer.step()
        value = parameter.grad.double()
        momentum = value if momentum is None else 0.9 * momentum + 0.1 * value
        spread = float(value.std())
        own = float(value.norm()) / (spread + 1e-8) if spread > 1e-5 * float(value.norm()) else math.sqrt(45)
        if scale is None and float(value.norm()) > math.sqrt(45) * 1e-8:
            scale = own
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * (scale or own) * momentum
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", GROUPS["optim"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_everything_stays_finite_and_training_goes_on(preset: str, dtype: torch.dtype) -> None:
    usual = lengths(preset, dtype, "zero", "U" * len(ORDER))
    most = torch.stack(usual).max(0).values
    for kind in KINDS:
        found = lengths(preset, dtype, kind, ORDER)
        if kind != "huge" or preset != "sgd_sai":  # the one whose updates are as long as its gradients
            longest = torch.stack(found).max(0).values
            assert (longest <= 4 * most + 1e-6).all(), f"{kind}: {longest / most}"
        if kind in SMALL:
            last = found[-1] / usual[-1]
            assert (last[usual[-1] > 0] > 0.05).all(), f"{kind}: {last}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", GROUPS["optim"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_gradients_let_weights_decay_and_do_nothing_else(preset: str, dtype: torch.dtype) -> None:
    parameters, optimizer = build(preset, dtype)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5 if group["params"][0].ndim > 1 else 0.0
    expected = {p: p.detach().double() for p in parameters}
    for _ in range(4):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in expected:
                    parameter.grad = torch.zeros_like(parameter)
                    decayed = expected[parameter] * (1 - group["lr"] * group["weight_decay"])
                    expected[parameter] = decayed.to(dtype).double()
        optimizer.step()
    for parameter, value in expected.items():
        torch.testing.assert_close(
            parameter.detach().double(), value, rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=0
        )


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
@pytest.mark.parametrize("num_hard", [8, 60])
@pytest.mark.parametrize("start", ["", "U"], ids=["first", "later"])
@pytest.mark.parametrize("size", [0.0, 1e-15, 1e-30])
def test_apollo_goes_on_after_gradients_next_to_zero(name: str, start: str, num_hard: int, size: float) -> None:
    """Its limiter of growth would keep all later updates next to zero for 1,800 steps."""
    lengths = {}
    for hard in (1.0, size):
        (parameter,) = parameters_of([(24, 16)])
        optimizer = make(name, [parameter])
        for step, letter in enumerate(start + num_hard * "H" + "U"):
            before = parameter.detach().clone()
            parameter.grad = gradient((24, 16), step) * (hard if letter == "H" else 1.0)
            optimizer.step()
        lengths[hard] = float((parameter.detach() - before).norm())
    assert lengths[size] > 0.1 * lengths[1.0]


def test_an_empty_matrix_is_no_work() -> None:
    parameters = parameters_of([(0, 5), (5, 0), (4, 4)])
    optimizer = Muon(parameters)  # its rate is scaled by rows over columns
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameters[2].isfinite().all() and int(optimizer.state[parameters[1]]["step"]) == 1


def test_what_has_no_finite_square_is_no_finite_gradient(mesh: Mesh) -> None:
    """`windlass train` skips such a step: AdamW's second moment would be infinite, and its weights would never move."""
    parameters = parameters_of([(24, 16), (5,)])
    parameters[0].grad, parameters[1].grad = gradient((24, 16), 0) * 1e30, gradient((5,), 0)
    assert not clip_grad_norm_(parameters, 1.0, mesh).isfinite()
