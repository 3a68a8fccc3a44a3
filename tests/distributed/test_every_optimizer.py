"""`windlass train optim=...` trains with every optimizer that there is, alone and cut over ranks."""

from __future__ import annotations

import pytest
from support import runs

from windlass.conf.schema import GROUPS


@pytest.mark.parametrize("optim", GROUPS["optim"])
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_the_loss_falls_with_every_step_taken(num_ranks: int, optim: str) -> None:
    assert len(runs.losses(runs.undisturbed(num_ranks, f"optim={optim}"))) == 12
