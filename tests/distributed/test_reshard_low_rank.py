"""State of other shapes than its parameters' is read back into another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.low_rank import CutMatrices, RowMoment, cut_over, digests, layouts, state_of, train, zeros_over
from support.ranks import run_ranks
from support.toy import Layout
from torch import nn
from torch.distributed.tensor import DTensor

from windlass.checkpoint.manager import Checkpointer
from windlass.errors import IncompatibleCheckpoint
from windlass.parallel.fragment import local_tensor

STEPS_PER_ATTEMPT = 3


def undisturbed(num_attempts: int, dtype: torch.dtype, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """One attempt on one rank. Digests of the weights and of the state where the attempts of `live` end."""
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = CutMatrices(mesh, dtype=dtype)
    optimizer = RowMoment(model.parameters(), **settings)
    results = []
    for attempt in range(num_attempts):
        train(model, optimizer, range(STEPS_PER_ATTEMPT * attempt, STEPS_PER_ATTEMPT * (attempt + 1)))
        results.append(digests(model, optimizer))
    mesh.stop()
    return results


def live(directory: Path, num_replicas: int | None, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """Restores what is there, trains on and saves."""
    sharding = "zero3" if num_replicas is None else "hsdp"
    mesh = Layout(sharding, num_replicas=num_replicas).parallel_config().build(torch.device("cpu"))
    is_first = not directory.exists()
    if mesh.world is not None:
        torch.distributed.barrier()
    model = CutMatrices(mesh, seed=0 if is_first else 99, dtype=dtype)
    optimizer = RowMoment(model.parameters(), **settings, seed=0 if is_first else 99)
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh)
    restored = checkpointer.restore_latest()
    step = 0 if restored is None else restored.step
    tensors = {key: value for key, value in state_of(model, optimizer).items() if isinstance(value, torch.Tensor)}
    expected = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.empty_state(parameter).items()
    }
    result: dict[str, Any] = {
        "restored": digests(model, optimizer),
        "layouts": layouts(tensors),
        "expected_layouts": layouts(expected),
        "empty": [
            name for name, value in tensors.items() if isinstance(value, DTensor) and not local_tensor(value).numel()
        ],
    }
    train(model, optimizer, range(step, step + STEPS_PER_ATTEMPT))
    checkpointer.save(step + STEPS_PER_ATTEMPT)
    result["trained"] = digests(model, optimizer)
    mesh.stop()
    return result


@pytest.mark.parametrize(
    ("attempts", "dtype", "settings"),
    [
        ([(4, None), (2, None), (1, None), (3, None)], torch.float32, {"rank": 2}),
        ([(4, None), (2, None), (1, None), (3, None)], torch.bfloat16, {"rank": 2, "cuts_projector": True}),
        ([(1, None), (4, 2), (3, None)], torch.float32, {"rank": 4}),
    ],
    ids=["whole projector", "cut projector, bfloat16 weights", "full rank, replicas"],
)
def test_another_number_of_ranks_trains_the_same_bits(
    tmp_path: Path, attempts: list[tuple[int, int | None]], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    expected = run_ranks(undisturbed, 1, len(attempts), dtype, settings)[0]
    assert len({digest for pair in expected for digest in pair}) == 2 * len(attempts), "each attempt changes something"
    for attempt, (num_ranks, num_replicas) in enumerate(attempts):
        results = run_ranks(live, num_ranks, tmp_path / "checkpoints", num_replicas, dtype, settings)
        for result in results:
            if attempt > 0:
                assert result["restored"] == expected[attempt - 1], (attempt, num_ranks)
                assert result["layouts"] == result["expected_layouts"]
                assert "few.step" in result["layouts"] and "unused.step" not in result["layouts"]
            assert result["trained"] == expected[attempt], (attempt, num_ranks)
        if attempt > 0 and num_ranks == 3:
            assert "few.exp_avg" in results[2]["empty"]


def save_low_rank(directory: Path) -> None:
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = CutMatrices(mesh)
    optimizer = RowMoment(model.parameters())
    train(model, optimizer, range(1))
    Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh).save(1)
    mesh.stop()


def load_another_rank(directory: Path) -> tuple[str, bool]:
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = CutMatrices(mesh, seed=99)
    optimizer = RowMoment(model.parameters(), rank=3)
    train(model, optimizer, range(2))
    before = digests(model, optimizer)
    try:
        Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh).restore_latest()
    except IncompatibleCheckpoint as error:
        same = digests(model, optimizer) == before
        mesh.stop()
        return str(error), same
    raise AssertionError("the checkpoint was taken")


def test_another_rank_of_the_optimizer_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    run_ranks(save_low_rank, 2, tmp_path)
    for message, unchanged in run_ranks(load_another_rank, 2, tmp_path):
        assert "optimizer was saved with rank 2 and has rank 3 here" in message
        assert "the state exp_avg of model.tall_by_rows is [7, 2] there and [7, 3] here" in message
        assert unchanged


class Foreign(torch.optim.Optimizer):
    """Keeps one row sum of the gradient a row, and does not lay out its state."""

    def __init__(self, params: Any, is_cut: bool) -> None:
        self.is_cut = is_cut
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            rows = zeros_over(parameter, (parameter.shape[0], 1), self.is_cut)
            local_tensor(rows).fill_(7)
            self.state[parameter] = {"rows": rows, "count": torch.ones(1)}


class Misplaced(RowMoment):
    """Says that its moments are cut, and keeps all of them on every rank."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                key: zeros_over(parameter, tuple(value.shape), is_cut=False)
                for key, value in self.empty_state(parameter).items()
            }


def foreign_checkpointer(directory: Path, kind: str) -> tuple[torch.optim.Optimizer, Checkpointer]:
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = nn.Module()
    model.weight = nn.Parameter(cut_over(mesh, torch.ones(6, 4), 0))
    parameters = model.parameters()
    optimizer = Misplaced(parameters) if kind == "misplaced" else Foreign(parameters, is_cut=kind == "cut")
    return optimizer, Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh)


def save_foreign(directory: Path, kind: str) -> str | None:
    """The message with which saving is refused."""
    optimizer, checkpointer = foreign_checkpointer(directory, kind)
    optimizer.step()
    message = None
    try:
        checkpointer.save(1)
    except ValueError as error:
        message = str(error)
    checkpointer.mesh.stop()
    return message


def load_foreign(directory: Path, kind: str) -> list | str:
    """The restored rows, or the message with which the checkpoint is refused."""
    optimizer, checkpointer = foreign_checkpointer(directory, kind)
    try:
        checkpointer.restore_latest()
        (state,) = optimizer.state.values()
        return state["rows"].tolist()
    except IncompatibleCheckpoint as error:
        return str(error)
    finally:
        checkpointer.mesh.stop()


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("whole", "the state rows of model.weight is [6, 1]"),
        ("misplaced", "the state exp_avg of model.weight is [6, 2]"),
    ],
)
def test_plain_state_that_nobody_calls_whole_is_not_saved(tmp_path: Path, kind: str, state: str) -> None:
    for message in run_ranks(save_foreign, 2, tmp_path, kind):
        assert message is not None and state in message and "which rank holds which part" in message
    assert list(tmp_path.glob("step-*")) == []


def test_cut_state_that_nobody_lays_out_is_restored_on_one_rank_and_refused_on_more(tmp_path: Path) -> None:
    assert run_ranks(save_foreign, 2, tmp_path, "cut") == [None, None]
    assert run_ranks(load_foreign, 1, tmp_path, "cut") == [[[7.0]] * 6]
    for message in run_ranks(load_foreign, 2, tmp_path, "cut"):
        assert "the state rows of model.weight is [6, 1], and how optimizer cuts it" in message
        assert "Foreign has no empty_state" in message
