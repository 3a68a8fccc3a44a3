"""Weights come for their passes and go, updates are made just before the forward that needs them: the bits stay."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import flip
from support.out_of_core import assert_same
from support.tiered import STREAMED, Outcome, TieredRun, await_transfers, tiered_run

from windlass.errors import OffloadError
from windlass.offload.buckets import RESIDENT_NUMEL
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tier_file import HEADER_BYTES
from windlass.offload.unit_hooks import UnshardedUnitHooks
from windlass.parallel.autograd_shim import is_in_backward

SSD = ("offload=ssd", "offload.buffer_bytes=1048576")
MODELS = {
    "tied": ("model.tie_embeddings=true",),
    "bfloat16": ("model.tie_embeddings=false", "train.dtype=bfloat16"),
    "recompute": ("model.tie_embeddings=false", "train.activation_checkpoint=full"),
    "tied_bfloat16_recompute": (
        "model.tie_embeddings=true",
        "train.dtype=bfloat16",
        "train.activation_checkpoint=full",
    ),
}
OPTIMIZERS = {
    "adamw": ("optim=adamw",),
    "apollo": ("optim=apollo", "optim.rank=12", "optim.update_interval=2"),
    "muon": ("optim=muon",),
    "in_backward": ("optim=adamw", "optim.in_backward=previous_norm"),
}


PAIRS = [
    ("tied", "adamw"),
    ("bfloat16", "adamw"),
    ("bfloat16", "apollo"),
    ("recompute", "muon"),
    ("tied", "in_backward"),
    ("recompute", "in_backward"),
    ("tied_bfloat16_recompute", "in_backward"),
]


@cache
def calm_run(model: str, optimizer: str) -> Outcome:
    """The same training with everything in memory."""
    return tiered_run(Path("unused"), [*MODELS[model], *OPTIMIZERS[optimizer], "train.grad_accum_steps=3"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
@pytest.mark.parametrize(
    ("offload", "is_fused"),
    [
        pytest.param(SSD, False, id="state"),
        pytest.param(STREAMED, False, id="loop", marks=pytest.mark.full),
        pytest.param(STREAMED, True, id="layers"),
    ],
)
def test_the_bits_are_those_of_training_in_memory(
    model: str, optimizer: str, offload: tuple[str, ...], is_fused: bool, tmp_path: Path
) -> None:
    overrides = [*MODELS[model], *OPTIMIZERS[optimizer], *offload, "train.grad_accum_steps=3"]
    found, calm = tiered_run(tmp_path, overrides, is_fused=is_fused), calm_run(model, optimizer)
    assert found.losses == calm.losses
    assert all(torch.equal(*pair) for pair in zip(found.weights, calm.weights, strict=True))
    assert_same(found.state, calm.state)
    assert list((tmp_path / "offload").iterdir()) == []


def in_memory(run: TieredRun) -> set[int]:
    """The units of which large weights are in memory."""
    numbers = set()
    for number, unit in enumerate(run.model.units()):
        for parameter in (p for module in unit.modules for p in module.parameters()):
            if parameter.numel() > RESIDENT_NUMEL and parameter.untyped_storage().size():
                numbers.add(number)
    return numbers


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_units_weights_are_there_for_its_passes_alone(recompute: str, tmp_path: Path) -> None:
    """Five units: the embedding, three layers, the head."""
    overrides = [*STREAMED, "model.tie_embeddings=false", f"train.activation_checkpoint={recompute}"]
    run = TieredRun(tmp_path, overrides)
    assert in_memory(run) == set(), "nor are they when the model is made"
    seen: dict[str, list[set[int]]] = {"forward": [], "backward": []}

    def forward(*_: Any) -> None:
        if not is_in_backward():
            seen["forward"].append(in_memory(run))

    for unit in run.model.units():
        unit.modules[-1].register_forward_pre_hook(forward)
        weight = max(unit.modules[-1].parameters(), key=lambda parameter: parameter.numel())
        weight.register_hook(lambda _: seen["backward"].append(in_memory(run)))
    for _ in range(2):
        run.step()
        assert in_memory(run) == set()
        assert seen["forward"] == [{number} for number in range(5)]
        assert seen["backward"] == [{number} for number in reversed(range(5))]
        seen["forward"], seen["backward"] = [], []
    run.evaluate()
    assert seen["forward"] == [{number} for number in range(5)] and in_memory(run) == set()
    run.close()


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_pass_that_is_broken_off_leaves_nothing_behind(stage: str, tmp_path: Path) -> None:
    calm = TieredRun(tmp_path / "calm", ["train.grad_accum_steps=2"])
    run = TieredRun(tmp_path, [*STREAMED, "train.grad_accum_steps=2"])
    losses = []
    for each in (calm, run):
        each.step()

        def interrupt(*_: Any) -> None:
            raise Interrupted

        layer = each.model.layers[1]
        hook = layer.register_forward_pre_hook(interrupt)
        if stage == "backward":
            hook.remove()
            hook = layer.mlp.up_proj.weight.register_hook(interrupt)
        with pytest.raises(Interrupted):
            each.step()
        hook.remove()
        each.optimizer.zero_grad(set_to_none=True)
        losses.append([each.step(), each.step(), each.evaluate()])
    assert losses[0] == losses[1] and in_memory(run) == set()
    assert all(torch.equal(*pair) for pair in zip(run.weights(), calm.weights(), strict=True))
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [[0], [1, 2]])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_may_be_frozen(frozen: list[int], recompute: str, tmp_path: Path) -> None:
    """Of a frozen layer no gradient says that its backward pass is over."""
    model = ["model.tie_embeddings=false", f"train.activation_checkpoint={recompute}"]
    calm = TieredRun(tmp_path, model, frozen=frozen)
    run = TieredRun(tmp_path, [*model, *STREAMED], frozen=frozen)
    seen: list[set[int]] = []
    for layer in run.model.layers:
        layer.register_full_backward_pre_hook(lambda *_: seen.append(in_memory(run)))
    for _ in range(3):
        assert run.step() == calm.step()
        assert in_memory(run) == set()
    assert len(seen) == 9 and max(map(len, seen)) <= 2
    assert all(torch.equal(*pair) for pair in zip(run.weights(), calm.weights(), strict=True))
    run.close()


def test_damage_to_weights_is_met_by_the_pass_that_needs_them(tmp_path: Path) -> None:
    run = TieredRun(tmp_path, [*STREAMED, "model.tie_embeddings=false"])
    assert run.tiers is not None and run.tiers.folder is not None
    run.step()
    await_transfers(run.tiers)
    for path in run.tiers.folder.path.glob("*.tier"):
        flip(path, HEADER_BYTES + 7)
    with pytest.raises(OffloadError, match="are not those that were written"):
        for _ in range(3):
            run.step()
    run.close()
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.slow
def test_a_weight_of_no_unit_may_be_larger_than_the_buffers(tmp_path: Path) -> None:
    tied = ["model.tie_embeddings=true", "model.vocab_size=4001"]
    expected = tiered_run(tmp_path, tied, num_steps=2)
    found = tiered_run(tmp_path, [*tied, *STREAMED], num_steps=2)
    assert found.losses == expected.losses


def test_hooks_come_off(tmp_path: Path) -> None:
    run = TieredRun(tmp_path, ["offload=ssd"])
    optimizer = run.optimizer
    assert isinstance(optimizer, OffloadedOptimizer)
    run.step()
    assert optimizer.has_pending
    units = [list(unit.modules) for unit in run.model.units()]
    before = len(run.model.layers[0]._forward_pre_hooks)
    UnshardedUnitHooks(run.model, units, optimizer, None).remove()
    assert len(run.model.layers[0]._forward_pre_hooks) == before
    run.evaluate()
    assert not optimizer.has_pending, "an evaluation is of the weights after the step"
    run.close()
