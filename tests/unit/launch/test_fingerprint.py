"""What nodes of one job must have in common, and what a node that differs is told."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore

from windlass.conf.compose import compose
from windlass.launch.fingerprint import difference, fingerprint, job_name
from windlass.parallel.mesh import _store_of_this_attempt

FIRST = {"node": "a", "windlass": "1", "torch": "2.13.0", "python": "3.11.2", "train.steps": "5"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.12.0"}, "torch=2.12.0: on node b, and node a has 2.13.0. Fix: install the same torch"),
        ({"python": "3.12.1"}, "python=3.12.1: on node b, and node a has 3.11.2"),
        ({"train.steps": "6"}, "train.steps=6: on node b, and node a has 5. Fix: start all nodes with the same"),
        ({"train.step_s": "1", "windlass": "2"}, "windlass=2: on node b"),  # what explains the other comes first
        ({"train.step_s": "1"}, "train.step_s=1: on node b, and node a has missing"),
    ],
)
def test_nodes_that_differ_are_told_in_what(change: dict[str, str], says: str) -> None:
    error = difference({**FIRST, "node": "b", **change}, FIRST)
    assert error is not None and says in str(error)


@pytest.mark.slow
def test_what_is_a_nodes_own_may_differ() -> None:
    base = ["launch=torchrun", "checkpoint=erasure"]
    first = fingerprint(compose(base), 2)
    own = compose([*base, "checkpoint.shm_dir=/dev/shm/a", "checkpoint.agent_host=10.0.0.1", "data.cache_dir=/b"])
    assert difference(fingerprint(own, 2), first) is None
    ranks = difference(fingerprint(compose(base), 3), first)
    assert ranks is not None and "launch.nproc_per_node=3: on node" in str(ranks)
    numbered = compose([*base, "launch.node_rank=0"])
    assert "launch.node_rank=a number" in str(difference(fingerprint(numbered, 2), first))


@pytest.mark.slow
def test_a_jobs_name_is_its_folders() -> None:
    names = {job_name(compose(overrides)) for overrides in (["run_dir=a"], ["run_dir=b"], ["checkpoint.dir=c"])}
    assert len(names) == 3
    assert job_name(compose(["run_dir=a", "train.steps=9"])) in names


def test_the_jobs_at_one_address_share_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store = HashStore()
    for job in ("one", "other"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        own = _store_of_this_attempt(0, 2, timedelta(seconds=1), store)["store"]
        assert own.compare_set("rank 0", "", job) == job.encode()
