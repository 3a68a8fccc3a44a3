from __future__ import annotations

import itertools

import pytest
import torch
from support.optimizers import CASES, make
from torch import nn

from windlass.errors import ConfigError
from windlass.optim.config import AdamWConfig, InBackward
from windlass.optim.in_backward import StepInBackward, build_in_backward


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5))


def build(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=1e-2)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    return make(name, matrices, [parameter for parameter in module.parameters() if parameter.ndim == 1])


def batch(step: int, micro_step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + micro_step))


def backward(module: nn.Module, step: int, micro_step: int, scale: float = 1.0) -> None:
    (scale * module(batch(step, micro_step)).square().sum()).backward()


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("bucket_numel", [1, 70, 1 << 20])
@pytest.mark.parametrize("name", ["adamw", *CASES])
def test_it_trains_as_steps_after_backward_do(name: str, bucket_numel: int) -> None:
    plain, fused = model(), model()
    optimizer, fused_optimizer = build(name, plain), build(name, fused)
    in_backward = StepInBackward(fused_optimizer, bucket_numel=bucket_numel)
    for step in range(6):
        for micro_step in range(2):
            in_backward.begin_micro_step(is_last=micro_step == 1)
            backward(plain, step, micro_step)
            backward(fused, step, micro_step)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
        torch.testing.assert_close(in_backward.finish().float(), norm)
        assert all(parameter.grad is None for parameter in fused.parameters())
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(weights(plain), weights(fused), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_freed_while_the_backward_pass_runs() -> None:
    module = model()
    in_backward = StepInBackward(build("adamw", module), bucket_numel=1)
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in module.parameters()))

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # after in_backward's own hook
    in_backward.begin_micro_step(is_last=True)
    backward(module, 0, 0)
    assert most == 0, "each gradient is gone before the next hook"


def test_nothing_is_updated_before_the_last_micro_step() -> None:
    module = model()
    in_backward = StepInBackward(build("adamw", module), bucket_numel=1)
    before = weights(module)
    in_backward.begin_micro_step(is_last=False)
    backward(module, 0, 0)
    assert all(torch.equal(one, other) for one, other in zip(weights(module), before, strict=True))
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_previous_norm_clips_by_the_step_before() -> None:
    """SGD, whose update is the gradient: its length says what the clipping did."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    in_backward = StepInBackward(optimizer, InBackward.previous_norm, max_norm=0.5, bucket_numel=50)
    norms, lengths = [], []
    for step, scale in enumerate((1.0, 1.0, 30.0, 1.0)):
        before = weights(module)
        in_backward.begin_micro_step(is_last=True)
        backward(module, step, 0, scale)
        norms.append(float(in_backward.finish()))
        moved = [one - other for one, other in zip(before, weights(module), strict=True)]
        lengths.append(float(torch.nn.utils.get_total_norm(moved)) / 1e-4)
    assert lengths[0] == pytest.approx(norms[0], rel=1e-2), "there is no step before the first"
    for (previous, norm), length in zip(itertools.pairwise(norms), lengths[1:], strict=True):
        assert length == pytest.approx(norm * min(1.0, 0.5 / previous), rel=1e-2)


def test_the_norm_of_the_last_step_survives_a_resume() -> None:
    module = model()
    # Several buckets: the norm of one alone is a float32 number.
    options = {"mode": InBackward.previous_norm, "max_norm": 0.5, "bucket_numel": 50}
    in_backward = StepInBackward(build("adamw", module), **options)
    assert in_backward.state_dict() == {"previous_norm": None}
    in_backward.begin_micro_step(is_last=True)
    backward(module, 0, 0)
    norm = float(in_backward.finish())
    other = StepInBackward(build("adamw", module), **options)
    other.load_state_dict(in_backward.state_dict())
    assert other.state_dict() == {"previous_norm": norm}
    other.load_state_dict({"previous_norm": None})
    assert other.state_dict() == {"previous_norm": None}


def test_a_gradient_that_is_not_finite_changes_no_weight_of_its_bucket() -> None:
    module = model()
    in_backward = StepInBackward(
        torch.optim.SGD(module.parameters(), lr=1e-2), InBackward.previous_norm, max_norm=1.0, bucket_numel=1
    )
    in_backward.begin_micro_step(is_last=True)
    backward(module, 0, 0)
    good = float(in_backward.finish())
    before = weights(module)
    broken = next(module.parameters())
    hook = broken.register_hook(lambda grad: grad * float("nan"))
    in_backward.begin_micro_step(is_last=True)
    backward(module, 1, 0)
    assert not in_backward.finish().isfinite()
    hook.remove()
    after = weights(module)
    assert torch.equal(after[0], before[0])
    assert not any(torch.equal(one, other) for one, other in zip(after[1:], before[1:], strict=True))
    assert in_backward.state_dict() == {"previous_norm": good}, "what is not finite clips nothing later"


def test_removed_hooks_leave_gradients_alone() -> None:
    module = model()
    in_backward = StepInBackward(build("adamw", module), bucket_numel=1)
    in_backward.begin_micro_step(is_last=True)
    in_backward.remove()
    backward(module, 0, 0)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert float(in_backward.finish()) == 0.0


@pytest.mark.parametrize(("mode", "max_norm"), [(InBackward.unclipped, 1.0), (InBackward.previous_norm, None)])
def test_clipping_must_be_declared(mode: InBackward, max_norm: float | None) -> None:
    module = model()
    with pytest.raises(ValueError, match="norm of this step is not known before it is used"):
        StepInBackward(build("adamw", module), mode, max_norm)
    config = AdamWConfig(in_backward=mode)
    with pytest.raises(ConfigError, match=r"optim\.in_backward") as error:
        build_in_backward(config, config.build(module), max_norm)
    assert "set train.max_norm=" in str(error.value)


def test_no_hooks_unless_asked_for() -> None:
    module = model()
    assert build_in_backward(AdamWConfig(), AdamWConfig().build(module), 1.0) is None
    config = AdamWConfig(in_backward=InBackward.previous_norm)
    built = build_in_backward(config, config.build(module), 0.5)
    assert built is not None and built.max_norm == 0.5
