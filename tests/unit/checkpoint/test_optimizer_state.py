"""State of other shapes than its parameters', laid out by the optimizer, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import bits_of
from support.low_rank import CutMatrices, RowMoment, state_of, train
from torch import nn

from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.optimizer_state import LaysOutState
from windlass.errors import IncompatibleCheckpoint
from windlass.parallel.mesh import Mesh


class Run:
    """A model, its optimizer and the checkpoints in `directory`."""

    def __init__(
        self,
        directory: Path,
        mesh: Mesh,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        restore_hyperparameters: bool = True,
        **settings: Any,
    ) -> None:
        self.model = CutMatrices(mesh, seed, dtype)
        self.optimizer = RowMoment(self.model.parameters(), seed=seed, **settings)
        objects = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(objects, directory, mesh, restore_hyperparameters=restore_hyperparameters)

    def train(self, *steps: int) -> None:
        train(self.model, self.optimizer, range(*steps))

    def bits(self) -> dict[str, bytes]:
        tensors = {**dict(self.model.named_parameters()), **state_of(self.model, self.optimizer)}
        return {
            name: bits_of(value.detach() if isinstance(value, torch.Tensor) else value)
            for name, value in tensors.items()
        }


@pytest.fixture
def saved(tmp_path: Path, mesh: Mesh) -> Run:
    """A run of rank 2 after 4 steps, which are saved."""
    run = Run(tmp_path, mesh)
    run.train(4)
    run.checkpointer.save(4)
    return run


def refusal(run: Run) -> str:
    """The message with which the checkpoint is refused; nothing of `run` has changed."""
    run.train(2)
    before = run.bits()
    with pytest.raises(IncompatibleCheckpoint) as raised:
        run.checkpointer.restore_latest()
    assert run.bits() == before
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("restore_hyperparameters", [True, False])
def test_a_restored_run_goes_on_bit_for_bit(
    dtype: torch.dtype, restore_hyperparameters: bool, tmp_path: Path, mesh: Mesh
) -> None:
    run = Run(tmp_path, mesh, dtype=dtype)
    run.train(4)
    run.checkpointer.save(4)
    run.train(4, 9)

    other = Run(tmp_path, mesh, seed=99, dtype=dtype, restore_hyperparameters=restore_hyperparameters)
    other.train(2)
    other.checkpointer.restore_latest()
    other.train(4, 9)
    assert other.bits() == run.bits()
    assert all(value.dtype == torch.float32 for value in state_tensors(other).values())


def state_tensors(run: Run) -> dict[str, torch.Tensor]:
    state = state_of(run.model, run.optimizer)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def test_float_state_keeps_the_dtype_it_was_saved_in(tmp_path: Path, mesh: Mesh) -> None:
    run = Run(tmp_path, mesh, projector_dtype=torch.float64)
    run.train(4)
    run.checkpointer.save(4)
    other = Run(tmp_path, mesh, seed=99, projector_dtype=torch.bfloat16)
    other.checkpointer.restore_latest()
    assert state_tensors(other)["few.projector"].dtype == torch.float64
    assert other.bits() == run.bits()


def test_parameters_that_had_no_gradient_stay_without_state(saved: Run, tmp_path: Path, mesh: Mesh) -> None:
    other = Run(tmp_path, mesh, seed=99)
    other.checkpointer.restore_latest()
    assert other.optimizer.empty_state(other.model.unused).keys() == {"step", "prev_norm", "projector", "exp_avg"}
    assert other.model.unused not in other.optimizer.state
    assert other.model.few in other.optimizer.state


def test_the_groups_extra_keys_come_from_the_checkpoint_or_stay(saved: Run, tmp_path: Path, mesh: Mesh) -> None:
    for restore_hyperparameters, seed in ((True, 0), (False, 99)):
        other = Run(tmp_path, mesh, seed=99, restore_hyperparameters=restore_hyperparameters)
        other.checkpointer.restore_latest()
        assert other.optimizer.param_groups[0]["seed"] == seed


@pytest.mark.parametrize("restore_hyperparameters", [True, False])
def test_another_rank_is_refused_with_both_ranks_and_shapes(
    restore_hyperparameters: bool, saved: Run, tmp_path: Path, mesh: Mesh
) -> None:
    message = refusal(Run(tmp_path, mesh, seed=99, rank=3, restore_hyperparameters=restore_hyperparameters))
    assert "optimizer was saved with rank 2 and has rank 3 here" in message
    assert "the state projector of model.tall_by_rows is [3, 2] there and [3, 3] here" in message
    assert "the state exp_avg of model.tall_by_rows is [7, 2] there and [7, 3] here" in message
    assert "more differences" in message and "Fix: use the configuration it was saved with" in message


def test_another_rank_that_changes_no_shape_is_refused_only_where_it_would_be_restored(
    tmp_path: Path, mesh: Mesh
) -> None:
    """The smaller dim bounds both ranks."""
    run = Run(tmp_path, mesh, rank=64)
    run.train(4)
    run.checkpointer.save(4)
    message = refusal(Run(tmp_path, mesh, seed=99, rank=128))
    assert "model or optimizer: optimizer was saved with rank 64 and has rank 128 here. Fix" in message

    other = Run(tmp_path, mesh, seed=99, rank=128, restore_hyperparameters=False)
    other.checkpointer.restore_latest()
    assert other.optimizer.param_groups[0]["rank"] == 128
    assert other.bits() == run.bits()


def test_other_groups_of_another_rank_name_the_rank(tmp_path: Path, mesh: Mesh) -> None:
    """As when matrices that are smaller than the rank move into a group without one."""

    def checkpointer(*groups: dict[str, Any]) -> Checkpointer:
        optimizer = RowMoment(groups)
        return Checkpointer({"model": model, "optimizer": optimizer}, tmp_path, mesh)

    model = nn.Linear(4, 4)
    checkpointer({"params": [model.weight], "rank": 4}, {"params": [model.bias], "rank": None}).save(1)
    with pytest.raises(IncompatibleCheckpoint, match=r"was saved with rank 4 and has no rank here.*other param groups"):
        checkpointer({"params": [model.weight, model.bias], "rank": None}).restore_latest()


@pytest.mark.parametrize(
    ("there", "here", "difference"),
    [
        (False, True, "the state prev_norm of model.tall_by_rows is absent there and [] here"),
        (True, False, "the state prev_norm of model.tall_by_rows is [] there and absent here"),
    ],
    ids=["missing", "extra"],
)
def test_other_state_is_refused(there: bool, here: bool, difference: str, tmp_path: Path, mesh: Mesh) -> None:
    run = Run(tmp_path, mesh, limits_norm=there)
    run.train(4)
    run.checkpointer.save(4)
    message = refusal(Run(tmp_path, mesh, seed=99, limits_norm=here))
    assert difference in message and "saved with" not in message.partition("Fix")[0]


def test_integers_are_no_floats(saved: Run, tmp_path: Path, mesh: Mesh) -> None:
    message = refusal(Run(tmp_path, mesh, seed=99, projector_dtype=torch.int32))
    assert "the state projector of model.tall_by_rows is float32 there and int32 here" in message


def test_only_optimizers_with_empty_state_lay_out_their_state() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    assert isinstance(RowMoment(parameters), LaysOutState)
    assert not isinstance(torch.optim.SGD(parameters), LaysOutState)
