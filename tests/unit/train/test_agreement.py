from __future__ import annotations

import itertools

import pytest
import torch
from support.ranks import run_ranks

from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED
from windlass.parallel.config import ParallelConfig
from windlass.train.agreement import Ending, StepAgreement
from windlass.train.session import exit_code_of
from windlass.train.signals import Request, StopRequest


class Asked(StopRequest):
    """A rank that was asked something, by whatever signal."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._asked = request


def agreed(cases: list[tuple[list[Request], int]]) -> list[tuple[int, Request, list[int], Ending | None]]:
    """On each rank, for each case of what ranks were asked and of how many nodes must stay."""
    mesh = ParallelConfig().build(torch.device("cpu"))
    found = []
    for requests, fewest_nodes in cases:
        agreement = StepAgreement(2 * (mesh.rank + 1), Asked(requests[mesh.rank]), mesh, fewest_nodes, None)
        found.append((agreement.num_targets(), agreement.request, agreement.leaving_nodes, agreement.ending))
    mesh.stop()
    return found


@pytest.mark.slow
def test_all_ranks_decide_the_same_for_all_that_may_be_asked() -> None:
    """Every combination of requests to 2 nodes of 2 ranks, with a job that needs both, either, or both and more."""
    cases = [(list(asked), fewest) for asked in itertools.product(Request, repeat=4) for fewest in (1, 2)]
    of_ranks = run_ranks(agreed, 4, cases, local_world_size=2)
    for number, (asked, fewest) in enumerate(cases):
        leaving = sorted({rank // 2 for rank in range(4) if asked[rank] == Request.leave})
        expected = max(asked)
        if expected == Request.leave and 2 - len(leaving) < fewest:
            expected = Request.stop
        for rank, found in enumerate(of_ranks):
            if expected == Request.nothing:
                ending = None
            elif expected == Request.stop:
                ending = Ending.stopped
            else:
                ending = Ending.left if expected == Request.leave and rank // 2 in leaving else Ending.restarting
            assert found[number] == (2 * (1 + 2 + 3 + 4), expected, leaving, ending), (asked, fewest, rank)


def test_one_rank_agrees_with_itself() -> None:
    mesh = ParallelConfig().build(torch.device("cpu"))
    assert StepAgreement(0, Asked(Request.nothing), mesh, 1, None).num_targets() == 1, "it divides"
    assert StepAgreement(3, Asked(Request.leave), mesh, 1, None).ending == Ending.stopped
    assert StepAgreement(3, Asked(Request.restart), mesh, 1, None).ending == Ending.restarting


def work_of_all() -> list[list[float] | None]:
    mesh = ParallelConfig().build(torch.device("cpu"))
    mine = (None, 0.1 + mesh.rank)
    found = [StepAgreement(1, Asked(Request.nothing), mesh, 1, work_s).work_s for work_s in mine]
    mesh.stop()
    return found


def test_every_rank_hears_of_the_work_of_all() -> None:
    assert run_ranks(work_of_all, 3, local_world_size=1) == [[None, [0.1, 1.1, 2.1]]] * 3


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [
        (Ending.done, EXIT_DONE),
        (Ending.stopped, EXIT_STOPPED),
        (Ending.left, EXIT_STOPPED),
        (Ending.restarting, EXIT_RESTART),
    ],
)
def test_what_the_launcher_is_told(ending: Ending, exit_code: int) -> None:
    assert ending.exit_code == exit_code
    assert exit_code_of(ending, is_saved=True) == exit_code
    assert exit_code_of(ending, is_saved=False) == (EXIT_FAILURE if ending == Ending.stopped else exit_code)
