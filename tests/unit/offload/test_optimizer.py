"""An optimizer whose state is elsewhere is used as any other, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.out_of_core import Training, assert_same, assert_same_bits, net
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from windlass.offload import offload_optimizer
from windlass.offload.buckets import is_elsewhere
from windlass.parallel.fragment import Tier

NUM_BUCKETS = 5


# --- In place of the optimizer. ---


def test_the_public_call_keeps_state_off_memory_and_leaves_nothing(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(3)
    run = Training(None)
    run.optimizer = optimizer = offload_optimizer(run.plain, "ssd", str(tmp_path / "tier"), buffer_bytes=1)
    run.run(3)
    assert all(is_elsewhere(state["exp_avg"]) for p, state in optimizer.state.items() if p.ndim == 2)
    (folder,) = (tmp_path / "tier").iterdir()
    assert folder.name.startswith("optimizer.") and folder.stat().st_mode & 0o777 == 0o700
    assert_same_bits(run, calm)
    optimizer.close()
    assert list((tmp_path / "tier").iterdir()) == []


def test_tier_cpu_is_host_memory() -> None:
    calm = Training(None)
    calm.run(3)
    run = Training(None)
    run.optimizer = optimizer = offload_optimizer(run.plain, tier="cpu")
    run.run(3)
    assert optimizer.folder is None and not optimizer.uses_disk
    assert optimizer.state_bytes() == {Tier.host: optimizer.reserve(), Tier.ssd: 0} and optimizer.reserve() > 0
    assert_same_bits(run, calm)
    optimizer.close()


@pytest.mark.parametrize(("tier", "dir"), [("ssd", None), ("cpu", "/nvme"), ("none", None), ("none", "/nvme")])
def test_a_tier_without_its_folder_is_refused(tier: str, dir: str | None) -> None:
    with pytest.raises(
        ValueError, match=f'tier="{tier}" with dir={dir}: give tier="ssd" and the folder, or tier="cpu"'
    ):
        offload_optimizer(torch.optim.AdamW(net().parameters()), tier, dir)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.99, 1.0, 7.0])
def test_state_is_divided_between_host_memory_and_the_disk(part: float, tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(3)
    total = sum(8 * p.numel() for p in calm.model.parameters() if p.ndim == 2)
    limit = round(part * total)
    run = Training(tmp_path, max_host_bytes=limit)
    run.run(3)
    found = run.offloaded.state_bytes()
    largest = 8 * max(p.numel() for p in calm.model.parameters())
    assert found[Tier.host] + found[Tier.ssd] == total
    assert min(limit, total) - largest < found[Tier.host] <= limit, "as much as there is room for"
    assert_same_bits(run, calm)
    assert run.figures.write_bytes >= 3 * found[Tier.ssd]
    run.close()


def test_some_of_the_state_may_stay_where_the_parameters_are(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(3)
    total = sum(8 * p.numel() for p in calm.model.parameters() if p.ndim == 2)
    run = Training(tmp_path, max_device_bytes=total // 3, max_host_bytes=total // 2)
    run.run(3)
    kept = sum(
        8 * p.numel() for p, state in run.plain.state.items() if p.ndim == 2 and not is_elsewhere(state["exp_avg"])
    )
    found = run.offloaded.state_bytes()
    assert 0 < kept <= total // 3 and 0 < found[Tier.host] <= total // 2 and found[Tier.ssd] > 0
    assert kept + found[Tier.host] + found[Tier.ssd] == total
    assert_same_bits(run, calm)
    run.close()


def test_an_optimizer_that_has_stepped_already_goes_on(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(6)
    run = Training(None)
    run.run(3)
    run.offload(tmp_path)
    run.run(3)
    assert_same_bits(run, calm)
    run.close()


@pytest.mark.parametrize("kind", ["adamw", "galore", "sgd_sai"])
@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_state_dicts_go_from_disk_to_memory_and_back(kind: str, saved: bool, loaded: bool, tmp_path: Path) -> None:
    calm = Training(None, kind)
    calm.run(6)
    run = Training(tmp_path if saved else None, kind)
    run.run(3)
    other = Training(tmp_path if loaded else None, kind)
    other.run(2)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.step = 3
    other.run(3)
    assert_same_bits(other, calm)


def test_a_state_dict_is_of_its_moment(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(2)
    run = Training(tmp_path)
    run.run(2)
    taken = run.optimizer.state_dict()
    run.run(3)
    assert_same(taken, calm.optimizer.state_dict())
    run.close()


def test_state_that_is_loaded_before_the_first_step_is_used(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(4)
    before = Training(None)
    before.run(2)
    run = Training(tmp_path)
    run.model.load_state_dict(before.model.state_dict())
    run.optimizer.load_state_dict(before.optimizer.state_dict())
    run.step = 2
    run.run(2)
    assert_same_bits(run, calm)
    run.close()


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    def amsgrad(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), amsgrad=True)

    other = Training(None, amsgrad)
    other.run(1)
    run = Training(tmp_path)
    run.run(1)
    with pytest.raises(
        ValueError, match=r"AdamW keeps .*max_exp_avg_sq \[104, 96\].* where its first step kept exp_avg"
    ):
        run.optimizer.load_state_dict(other.optimizer.state_dict())


def test_a_host_limit_without_a_disk_is_refused() -> None:
    with pytest.raises(ValueError, match="the rest would have no place"):
        offload_optimizer(torch.optim.AdamW(net().parameters()), tier="cpu", max_host_bytes=1)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS computes the loss itself"):
        offload_optimizer(torch.optim.LBFGS(net().parameters()), tier="cpu")


# --- Learning rates, closures. ---

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.01, total_steps=8),  # changes betas, too
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("is_deferring", [False, True])
def test_schedulers_set_the_learning_rate(schedule: str, is_tensor: bool, is_deferring: bool, tmp_path: Path) -> None:
    """A step that is put off is made with the rate that it had."""
    runs = []
    for tier in (None, tmp_path):
        lr = torch.tensor(0.01) if is_tensor else 0.01
        run = Training(tier, lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr))
        scheduler = SCHEDULES[schedule](run.optimizer)
        if tier is not None:
            run.offloaded.is_deferring = is_deferring
        rates = []
        for _ in range(5):
            run.run(1)
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
            if tier is not None:
                assert run.offloaded.has_pending == is_deferring
                run.offloaded.update(run.model.parameters())
        runs.append((run, [float(rate) for rate in rates]))
    (calm, rates), (run, found) = runs
    assert len(set(rates)) == 5 and rates == found
    assert_same_bits(run, calm)
    run.close()


def test_a_closure_is_called_once_with_gradients(tmp_path: Path) -> None:
    runs = [Training(None), Training(tmp_path)]
    for run in runs:
        calls = []
        for _ in range(3):
            run.optimizer.zero_grad()
            loss = run.optimizer.step(lambda run=run, calls=calls: calls.append(run.backward()) or calls[-1])
            assert loss == calls[-1]
            run.step += 1
        assert len(calls) == 3
    assert_same_bits(runs[1], runs[0])
    runs[1].close()


# --- Updates that are put off. ---


def test_updates_may_be_put_off_and_made_in_any_order(tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(5)
    run = Training(tmp_path)
    run.offloaded.is_deferring = True
    layers = [layer for layer in run.model if isinstance(layer, nn.Linear)]
    for step in range(5):
        run.run(1)
        assert all(parameter.grad is None for parameter in run.model.parameters()), "they are the optimizer's now"
        for number in range(NUM_BUCKETS):
            assert run.offloaded.has_pending
            before = layers[number * (step + 1) % NUM_BUCKETS].weight.detach().clone()
            layer = layers[number * (step + 1) % NUM_BUCKETS] if step < 4 else layers[number]
            run.offloaded.update(layer.parameters())
            run.offloaded.update(layer.parameters())  # nothing is left to do
            assert step == 4 or not torch.equal(layer.weight, before)
    assert not run.offloaded.has_pending
    assert_same_bits(run, calm)
    run.close()


@pytest.mark.parametrize("settles", [lambda run: run.offloaded.settle(), lambda run: run.optimizer.state_dict()])
def test_whoever_looks_at_the_state_has_the_updates_made(settles: Callable[[Training], Any], tmp_path: Path) -> None:
    calm = Training(None)
    calm.run(3)
    run = Training(tmp_path)
    run.offloaded.is_deferring = True
    for _ in range(3):
        run.run(1)
        settles(run)
    assert_same_bits(run, calm)
    run.close()


def test_the_next_step_makes_what_is_left(tmp_path: Path) -> None:
    """A step's gradients are of the weights before its predecessor's update then, as here on both sides."""
    ends = []
    for is_deferring in (False, True):
        run = Training(tmp_path)
        run.offloaded.is_deferring = is_deferring
        for number in range(3):
            for parameter in run.model.parameters():
                parameter.grad = torch.full_like(parameter, number - 1.5)
            run.optimizer.step()
        run.offloaded.settle()
        ends.append(run)
    assert_same_bits(ends[0], ends[1])


# --- What is refused. ---


class Counting(torch.optim.SGD):
    """Keeps a number for all parameters together, as Prodigy and schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_an_optimizer_that_cannot_step_in_parts_is_refused(num_steps_before: int, tmp_path: Path) -> None:
    run = Training(None, lambda model: Counting(model.parameters(), momentum=0.9))
    run.run(num_steps_before)
    weights = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.offload(tmp_path)
    with pytest.raises(ValueError, match="Counting changes 'count' of its param groups in a step: it keeps something"):
        run.run(1)
    assert all(torch.equal(*pair) for pair in zip(run.model.parameters(), weights, strict=True))
    assert run.plain.param_groups[0].get("count", 0) == num_steps_before
    run.close()


def test_param_groups_are_added_before(tmp_path: Path) -> None:
    run = Training(tmp_path)
    with pytest.raises(ValueError, match="add param groups before the optimizer is offloaded"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(run.optimizer.param_groups) == 1
    run.close()


def test_parameters_are_unfrozen_before(tmp_path: Path) -> None:
    model = net()
    model[2].requires_grad_(False)
    run = Training(tmp_path, model=model)
    run.run(1)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"shape \[96, 104\] was frozen when its optimizer was offloaded.*unfreeze"):
        run.run(1)
    run.close()
