"""Where the elements of weights, gradients and state lie in memory changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.optimizers import CASES, gradient, make
from support.trained import assert_moved
from torch import Tensor, nn

from windlass.checkpoint.manager import Checkpointer
from windlass.offload.optimizer import offload_optimizer
from windlass.optim import Apollo, Muon
from windlass.optim.strides import is_dense, shares_no_memory

NUM_STEPS = 5  # beyond an update interval
MATRICES = [(12, 20), (20, 12), (12, 20)]
OTHERS = [(6, 5, 3, 3), (7, 9), (11,), ()]


def transposed(tensor: Tensor) -> Tensor:
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def sliced(tensor: Tensor) -> Tensor:
    """Every other place along the last dim of a larger tensor."""
    if tensor.ndim == 0:
        return tensor.repeat(3)[1]
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else transposed(tensor)


def expanded(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 else tensor[:1].expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda tensor: tensor,
    "transposed": transposed,
    "sliced": sliced,
    "channels_last": channels_last,
}
GRADIENTS = LAYOUTS | {"expanded": expanded}
PAIRS = [
    *[("transposed", kind) for kind in ("plain", "transposed", "expanded")],
    *[("plain", kind) for kind in ("transposed", "expanded")],
    *[("sliced", kind) for kind in ("plain", "sliced")],
    *[("channels_last", kind) for kind in ("channels_last", "sliced")],
]
"""Layouts of weights and of their gradients."""
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def train(name: str, weights: str, gradients: str, dtype: torch.dtype, *, is_alike: bool = False) -> list[Tensor]:
    """The weights after some steps, contiguous.

    Args:
        is_alike: the same numbers, all of them contiguous.
    """
    shapes = MATRICES + OTHERS
    starts = [gradient(shape, 99, index).to(dtype) for index, shape in enumerate(shapes)]
    parameters = [nn.Parameter(start.clone() if is_alike else LAYOUTS[weights](start.clone())) for start in starts]
    assert is_alike or [p.stride() for p in parameters] == [LAYOUTS[weights](start).stride() for start in starts]
    optimizer = make(name, parameters[: len(MATRICES)], parameters[len(MATRICES) :], weight_decay=0.1)
    for step in range(NUM_STEPS):
        for index, parameter in enumerate(parameters):
            value = gradient(tuple(parameter.shape), step, index).to(dtype)
            if gradients == "expanded":
                value = expanded(value).contiguous()
            parameter.grad = value if is_alike else GRADIENTS[gradients](value)
        optimizer.step()
    assert_moved(starts, parameters)
    return [parameter.detach().contiguous() for parameter in parameters]


@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_adamw_is_the_formula(weights: str, gradients: str) -> None:
    for shape in OTHERS:
        start = gradient(shape, 99)
        parameter, reference = nn.Parameter(LAYOUTS[weights](start)), nn.Parameter(start.double())
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
        ours = Muon([{"params": [parameter], "algorithm": "adamw", **settings}])
        theirs = torch.optim.AdamW([reference], foreach=False, fused=False, **settings)
        for step in range(NUM_STEPS):
            parameter.grad = GRADIENTS[gradients](gradient(shape, step))
            reference.grad = parameter.grad.double().contiguous()
            ours.step()
            theirs.step()
        assert (parameter.detach() - reference.detach()).abs().max() < 1e-6, shape
        for key in ("exp_avg", "exp_avg_sq"):
            assert (ours.state[parameter][key] - theirs.state[reference][key]).abs().max() < 1e-6, shape
            if is_dense(parameter.detach()):
                assert ours.state[parameter][key].stride() == parameter.stride(), "no copies are needed"


@pytest.mark.parametrize("name", list(CASES))
@every_dtype
def test_the_same_numbers_in_other_places_give_the_same_weights(name: str, dtype: torch.dtype) -> None:
    expected: dict[str, list[Tensor]] = {}
    # Products may be rounded in another order; after a few steps Muon's bfloat16 has made of that what it makes of it.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3 if name in ("muon", "cosmos") else 4e-5
    for weights, gradients in PAIRS:
        kind = "expanded" if gradients == "expanded" else "plain"
        if kind not in expected:
            expected[kind] = train(name, "plain", kind, dtype, is_alike=True)
        found = train(name, weights, gradients, dtype)
        for shape, one, other in zip(MATRICES + OTHERS, found, expected[kind], strict=True):
            limit = tolerance if shape in MATRICES else 4e-5 if dtype == torch.float32 else 1e-2
            assert (one - other).abs().max() <= limit, f"{shape}, weight {weights}, gradient {gradients}"


@pytest.mark.parametrize("name", list(CASES))
def test_state_of_another_layout_is_taken_over(name: str) -> None:
    """As a checkpoint made of views has it."""
    starts = [gradient(shape, 99, index) for index, shape in enumerate(MATRICES + OTHERS)]

    def build(layout: str) -> tuple[list, torch.optim.Optimizer]:
        parameters = [nn.Parameter(LAYOUTS[layout](start.clone())) for start in starts]
        return parameters, make(name, parameters[: len(MATRICES)], parameters[len(MATRICES) :])

    def step(parameters: list, optimizer: torch.optim.Optimizer, number: int) -> None:
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(tuple(parameter.shape), number, index)
        optimizer.step()

    parameters, optimizer = build("plain")
    step(parameters, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [parameter.detach().clone() for parameter in parameters]
    step(parameters, optimizer, 1)
    assert_moved(weights, parameters)
    for layout in ("transposed", "sliced"):
        for state in saved["state"].values():
            state.update({key: LAYOUTS[layout](value) for key, value in state.items()})
        for own in LAYOUTS:
            others, other_optimizer = build(own)
            with torch.no_grad():
                for parameter, weight in zip(others, weights, strict=True):
                    parameter.copy_(weight)
            other_optimizer.load_state_dict(saved)
            step(others, other_optimizer, 1)
            for one, other in zip(others, parameters, strict=True):
                difference = (one.detach() - other.detach()).abs().max()
                is_rounded_again = one.ndim == 2 and name in ("muon", "cosmos")
                assert difference < (2e-3 if is_rounded_again else 1e-5), (layout, own, tuple(one.shape))


def test_state_that_lies_together_in_another_order_is_not_taken_for_a_stack() -> None:
    parameters = [nn.Parameter(gradient((6, 6), 99, index)) for index in range(2)]
    optimizer = Apollo([{"params": parameters, "rank": 3}])
    twin = copy.deepcopy(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    twins = twin.param_groups[0]["params"]
    for number in range(2):
        for index, (one, other) in enumerate(zip(parameters, twins, strict=True)):
            one.grad = gradient((6, 6), number, index)
            other.grad = one.grad.clone()
        optimizer.step()
        if number == 0:
            memory = torch.empty(36)
            for index, parameter in enumerate(twins):
                value = memory[18 * index : 18 * index + 18]
                twin.state[parameter].update({k: v.clone() for k, v in optimizer.state[parameters[index]].items()})
                place = value.view(6, 3) if index == 0 else value.view(3, 6).T
                twin.state[parameter]["exp_avg"] = place.copy_(twin.state[parameter]["exp_avg"])
            with torch.no_grad():
                for one, other in zip(parameters, twins, strict=True):
                    other.copy_(one)
        else:
            twin.step()
    assert_moved(before, parameters)
    for one, other in zip(parameters, twins, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(CASES))
def test_a_parameter_whose_elements_share_memory_is_refused(name: str) -> None:
    for value in (torch.zeros(1, 8).expand(6, 8), torch.zeros(20).as_strided((6, 6), (2, 1))):
        with pytest.raises(ValueError, match=r"parameter 0 is \[6, \d\] with strides .* share memory"):
            make(name, [nn.Parameter(value)])


def test_what_is_dense_and_what_shares_memory() -> None:
    tensor = torch.zeros(4, 3, 5)
    for layout in (transposed, channels_last, lambda value: value, lambda value: value.transpose(0, 2)):
        assert is_dense(layout(tensor)) and shares_no_memory(layout(tensor))
    for gap in (sliced(tensor), tensor[:, 1:], tensor[..., ::2]):
        assert not is_dense(gap) and shares_no_memory(gap)
    for shared in (tensor[:1].expand(4, 3, 5), torch.zeros(9).as_strided((2, 3), (2, 1))):
        assert not is_dense(shared) and not shares_no_memory(shared)
    for small in (torch.zeros(()), torch.zeros(0, 3), torch.zeros(1, 1).expand(1, 1), torch.zeros(3, 0).T):
        assert is_dense(small) and shares_no_memory(small)


@pytest.mark.parametrize("tier", ["ssd", "cpu"])
def test_offloaded_state_comes_back_as_the_kernel_wants_it(tier: str, tmp_path: Path) -> None:
    """torch's fused AdamW goes by memory as well; a checkpoint is written row by row."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(32, 48, 3), nn.Conv2d(48, 32, 3)).to(memory_format=torch.channels_last)
        model.matrix = nn.Parameter(transposed(gradient((96, 112), 0)))
        return model

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.empty_like(parameter).copy_(gradient(tuple(parameter.shape), step, index))
            optimizer.step()

    def offloaded(model: nn.Module, name: str) -> torch.optim.Optimizer:
        inner = torch.optim.AdamW(model.parameters(), fused=True)
        return offload_optimizer(inner, tier, tmp_path / name if tier == "ssd" else None)

    plain, one, other = model(), model(), model()
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    train(plain, torch.optim.AdamW(plain.parameters(), fused=True), range(5))
    assert_moved(before, plain.parameters())
    optimizer = offloaded(one, "one")
    train(one, optimizer, range(3))
    checkpointer = Checkpointer({"model": one, "optimizer": optimizer}, tmp_path / "checkpoints")
    checkpointer.save(3)
    checkpointer.close()
    resumed = offloaded(other, "other")
    restoring = Checkpointer({"model": other, "optimizer": resumed}, tmp_path / "checkpoints")
    assert restoring.restore_latest() is not None
    restoring.close()
    for model_, its in ((one, optimizer), (other, resumed)):
        train(model_, its, range(3, 5))
        assert all(torch.equal(*pair) for pair in zip(model_.parameters(), plain.parameters(), strict=True))
        its.close()
