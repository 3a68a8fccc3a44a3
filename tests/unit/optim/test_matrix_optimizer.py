"""What holds for every optimizer of matrices."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support.optimizers import CASES, gradient, make, parameters_of, take_steps
from torch import nn

from windlass.optim import base

SHAPES = [(10, 7), (7, 10), (8, 8), (10, 7)]
VECTORS = [(10,), (3,)]
every_optimizer = pytest.mark.parametrize("name", list(CASES))


def weights(parameters: list) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"parameter {index}"


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list, torch.optim.Optimizer]:
    parameters = parameters_of(SHAPES + VECTORS, dtype)
    return parameters, make(name, parameters[: len(SHAPES)], parameters[len(SHAPES) :], weight_decay=0.1, **options)


@every_optimizer
def test_it_minimises(name: str) -> None:
    parameters, optimizer = build(name, lr=3e-2)
    start = sum(float(parameter.detach().square().sum()) for parameter in parameters)
    for _ in range(60):
        for parameter in parameters:
            parameter.grad = 2 * parameter.detach()
        optimizer.step()
    assert sum(float(parameter.detach().square().sum()) for parameter in parameters) < 0.7 * start


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_and_ten_steps_through_a_file_are_twenty(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = build(name, dtype)
    take_steps(optimizer, parameters, range(10))
    file = io.BytesIO()
    torch.save({"weights": weights(parameters), "optimizer": optimizer.state_dict()}, file)
    take_steps(optimizer, parameters, range(10, 20))

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    others, other_optimizer = build(name, dtype)
    with torch.no_grad():
        for parameter, value in zip(others, stored["weights"], strict=True):
            parameter.copy_(value)
    other_optimizer.load_state_dict(stored["optimizer"])
    take_steps(other_optimizer, others, range(10, 20))
    assert_equal(weights(others), weights(parameters))
    for parameter in others:
        assert all(value.dtype == torch.float32 for value in other_optimizer.state[parameter].values())


@every_optimizer
def test_state_stays_float32_and_the_gradient_as_it_was(name: str) -> None:
    parameters, optimizer = build(name, torch.bfloat16)
    take_steps(optimizer, parameters, range(2))
    for index, parameter in enumerate(parameters):
        assert torch.equal(parameter.grad, gradient(tuple(parameter.shape), 1, index).bfloat16())
        assert parameter.isfinite().all()
        for key, value in optimizer.state[parameter].items():
            assert isinstance(value, torch.Tensor) and value.dtype == torch.float32, key


@every_optimizer
def test_bfloat16_follows_float32(name: str) -> None:
    """Both start from the same numbers and get the same gradients; they differ by the rounding of the weights."""
    low, low_optimizer = build(name, torch.bfloat16)
    high, high_optimizer = build(name)
    with torch.no_grad():
        for one, other in zip(low, high, strict=True):
            other.copy_(one)
    start = weights(high)
    for step in range(5):
        for index, (one, other) in enumerate(zip(low, high, strict=True)):
            one.grad = gradient(tuple(one.shape), step, index).bfloat16()
            other.grad = one.grad.float()
        low_optimizer.step()
        high_optimizer.step()
    for one, other, before in zip(low, high, start, strict=True):
        moved = float((other.detach() - before).norm())
        rounding = float(before.norm()) * 2**-8 * 5**0.5
        assert float((one.detach().float() - other.detach()).norm()) < 0.2 * moved + rounding


@every_optimizer
def test_stacked_matrices_are_updated_as_single_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for numel in (1, 1 << 20):
        monkeypatch.setattr(base, "BATCH_NUMEL", {"cpu": numel})
        parameters = parameters_of([(12, 9)] * 3 + [(9, 12)] * 2)
        optimizer = make(name, parameters)
        take_steps(optimizer, parameters, range(9))
        found.append(weights(parameters))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_optimizer
def test_zero_gradients_give_no_nan(name: str) -> None:
    parameters, optimizer = build(name)
    for scale in (0.0, 1.0, 0.0, 1.0):
        for index, parameter in enumerate(parameters):
            parameter.grad = scale * gradient(tuple(parameter.shape), 0, index)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)


@every_optimizer
def test_a_missing_gradient_is_passed_over_and_a_late_one_is_a_first_step(name: str) -> None:
    parameters, optimizer = build(name)
    late = parameters[0]
    start = late.detach().clone()
    for step in range(3):
        take_steps(optimizer, parameters[1:], range(step, step + 1))
    assert torch.equal(late.detach(), start) and late not in optimizer.state
    take_steps(optimizer, parameters, range(3, 6))
    fresh = parameters_of(SHAPES)[0]
    take_steps(make(name, [fresh], weight_decay=0.1), [fresh], range(3, 6))
    torch.testing.assert_close(late.detach(), fresh.detach(), rtol=1e-5, atol=1e-6)


@every_optimizer
def test_a_sparse_gradient_is_refused_before_anything_changes(name: str) -> None:
    parameters, optimizer = build(name)
    before = weights(parameters)
    for index, parameter in enumerate(parameters):
        parameter.grad = gradient(tuple(parameter.shape), 0, index)
    parameters[2].grad = parameters[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 2 has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert_equal(weights(parameters), before)
    assert not optimizer.state


@every_optimizer
def test_a_gradient_that_is_not_finite_reaches_only_its_own_matrix(name: str) -> None:
    """Documented: the optimizer does not look, as torch's do not; the training loop skips such steps."""
    parameters, optimizer = build(name)
    for index, parameter in enumerate(parameters):
        parameter.grad = gradient(tuple(parameter.shape), 0, index)
    parameters[1].grad[0, 0] = float("nan")
    optimizer.step()
    finite = [bool(parameter.isfinite().all()) for parameter in parameters]
    assert finite == [True, False, True, True, True, True]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"parameter 0 is {dtype}.*float32 and bfloat16"):
        make(name, [nn.Parameter(torch.zeros(10, 7, dtype=dtype))])


@every_optimizer
def test_parameters_may_be_added_later(name: str) -> None:
    parameters, optimizer = build(name)
    take_steps(optimizer, parameters, range(2))
    added = parameters_of([(6, 9)], seed=1)[0]
    optimizer.add_param_group({"params": [added], **CASES[name][1]})
    take_steps(optimizer, [*parameters, added], range(2, 4))
    assert int(optimizer.state[added]["step"]) == 2 and int(optimizer.state[parameters[0]]["step"]) == 4
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    take_steps(optimizer, [*parameters, added], range(4, 5))
    assert int(optimizer.state[added]["step"]) == 3


@every_optimizer
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(name: str) -> None:
    parameters, optimizer = build(name)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4).half())]})
    assert len(optimizer.param_groups) == 2
    take_steps(optimizer, parameters, range(1))


@every_optimizer
def test_the_state_of_another_optimizer_is_refused(name: str) -> None:
    parameters, optimizer = build(name)
    take_steps(optimizer, parameters, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    adamw = torch.optim.AdamW([{"params": parameters[: len(SHAPES)]}, {"params": parameters[len(SHAPES) :]}])
    take_steps(adamw, parameters, range(1))
    with pytest.raises(ValueError, match=r"it is of another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert_equal(list(after["state"][index].values()), list(state.values()))


@pytest.mark.parametrize("name", [name for name in CASES if "rank" in CASES[name][1] and name != "apollo_mini"])
def test_the_state_of_another_rank_is_refused(name: str) -> None:
    parameters, optimizer = build(name)
    take_steps(optimizer, parameters, range(2))
    kind = type(optimizer)
    keys = CASES[name][1] | {"rank": 3}
    other = kind([{"params": parameters[: len(SHAPES)], **keys}, optimizer.param_groups[1] | {}])
    with pytest.raises(ValueError, match=r"parameter 0 .*of another rank"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.slow
@every_optimizer
def test_a_closure_is_called_with_gradients_enabled(name: str) -> None:
    parameters, optimizer = build(name)

    def closure() -> torch.Tensor:
        loss = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    optimizer.zero_grad()
    assert float(optimizer.step(closure)) < first


@every_optimizer
def test_empty_state_is_what_the_first_step_makes(name: str) -> None:
    parameters, optimizer = build(name)
    take_steps(optimizer, parameters, range(1))
    for parameter in parameters:
        empty = optimizer.empty_state(parameter)
        made = optimizer.state[parameter]
        assert {key: (value.shape, value.dtype) for key, value in empty.items()} == {
            key: (value.shape, value.dtype) for key, value in made.items()
        }


@every_optimizer
def test_a_copy_goes_on_by_itself(name: str) -> None:
    parameters, optimizer = build(name)
    take_steps(optimizer, parameters, range(3))
    copies, copied = copy.deepcopy((parameters, optimizer))
    take_steps(copied, copies, range(3, 6))
    assert not torch.equal(copies[0], parameters[0])
    take_steps(optimizer, parameters, range(3, 6))
    assert_equal(weights(copies), weights(parameters))


@every_optimizer
@pytest.mark.parametrize("keys", [{"lr": -1.0}, {"weight_decay": float("nan")}])
def test_keys_of_a_group_are_checked(name: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        make(name, parameters_of([(10, 7)])).add_param_group(
            {"params": parameters_of([(4, 4)]), **CASES[name][1], **keys}
        )
