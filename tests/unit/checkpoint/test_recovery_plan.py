"""What new trainers decide to go on from: always the newest that is whole, and never a mixture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.checkpoint.agent.ledger import Phase, SnapshotId
from windlass.checkpoint.snapshot.plan import Held, RecoveryPlan, newest_generation, plan_recovery

OLD, NEW = SnapshotId(1, 7), SnapshotId(1, 8)


def held(position: int, snapshot: SnapshotId = OLD, **changes: object) -> Held:
    """A committed part of a snapshot of 4 nodes with 2 parity shards."""
    whole = Held(snapshot, 10 * snapshot.number, "cut", Phase.committed, position, 4, 2)
    return dataclasses.replace(whole, **changes)


def nodes(*positions: int, snapshot: SnapshotId = OLD, **changes: object) -> list[list[Held]]:
    return [[held(position, snapshot, **changes)] for position in positions]


HELD = st.builds(
    Held,
    snapshot=st.builds(SnapshotId, st.integers(1, 2), st.integers(1, 3)),
    step=st.integers(1, 2),
    layout=st.sampled_from(["a", "b"]),
    phase=st.sampled_from(Phase),
    position=st.integers(0, 2),
    num_nodes=st.just(3),
    num_parity_shards=st.integers(0, 2),
    num_resumes=st.integers(0, 3),
    is_sound=st.booleans(),
)
CLUSTER = st.lists(st.lists(HELD, max_size=4), max_size=5)


def counts(part: Held) -> bool:
    return part.is_sound and part.phase in (Phase.prepared, Phase.committed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(cluster=CLUSTER)
def test_a_plan_is_of_one_snapshot_and_enough_of_it_is_there(cluster: list[list[Held]]) -> None:
    plan = plan_recovery(cluster, 1 << 30)
    if plan is None:
        return
    assert len(plan.holders) >= plan.num_nodes - plan.num_parity_shards
    assert sorted([*plan.holders, *plan.lost]) == list(range(plan.num_nodes))
    for position, node in plan.holders.items():
        assert position in {part.position for part in cluster[node] if counts(part) and is_of(part, plan)}
        for lower in cluster[:node]:
            assert position not in {part.position for part in lower if counts(part) and is_of(part, plan)}


def test_a_plan_is_not_held_any_more_when_a_part_it_counts_on_is_given_up() -> None:
    cluster = nodes(0, 1, 2, snapshot=NEW, phase=Phase.prepared)
    plan = plan_recovery(cluster)
    assert plan is not None and plan.lost == [3] and plan.is_held_by(cluster)
    assert plan.is_held_by(nodes(0, 1, 2, snapshot=NEW)), "the fence commits it"
    assert not plan.is_held_by([cluster[0], [], cluster[2]])
    assert not plan.is_held_by([cluster[0], [held(1, OLD)], cluster[2]])
    assert not plan.is_held_by([cluster[0], cluster[2], cluster[1]])


def is_of(part: Held, plan: RecoveryPlan) -> bool:
    fields = ("snapshot", "step", "layout", "num_nodes", "num_parity_shards")
    return all(getattr(part, name) == getattr(plan, name) for name in fields)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(cluster=CLUSTER)
def test_nothing_newer_would_do(cluster: list[list[Held]]) -> None:
    """Counted once more: of all pairs of what parts have in common and positions."""
    plan = plan_recovery(cluster, 1 << 30)
    parts = [part for slots in cluster for part in slots if counts(part)]
    enough = [
        part.snapshot
        for part in parts
        if len({other.position for other in parts if dataclasses.replace(other, **ignored(part)) == part})
        >= part.num_nodes - part.num_parity_shards
    ]
    assert (None if plan is None else plan.snapshot) == max(enough, default=None)


def ignored(part: Held) -> dict[str, object]:
    """What may differ among the parts of a snapshot."""
    return {"position": part.position, "phase": part.phase, "num_resumes": part.num_resumes}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cluster=CLUSTER, max_resumes=st.integers(1, 3))
def test_whoever_asks_decides_alike(cluster: list[list[Held]], max_resumes: int) -> None:
    plan = plan_recovery(cluster, max_resumes)
    shuffled = [random.Random(1).sample(slots, len(slots)) for slots in cluster]
    sent = [[Held.from_json(json.loads(json.dumps(part.to_json()))) for part in slots] for slots in shuffled]
    assert plan_recovery(sent, max_resumes) == plan


@pytest.mark.parametrize("lost", [c for size in range(3) for c in itertools.combinations(range(4), size)])
def test_any_lost_nodes_up_to_the_number_of_parity_shards(lost: tuple[int, ...]) -> None:
    cluster = [[] if node in lost else slots for node, slots in enumerate(nodes(0, 1, 2, 3))]
    plan = plan_recovery(cluster)
    assert plan is not None and plan.lost == list(lost)
    assert plan.holders == {node: node for node in range(4) if node not in lost}


def test_one_more_is_too_many() -> None:
    assert plan_recovery([*nodes(2), [], [], []]) is None
    assert plan_recovery([]) is None


def test_the_newest_that_is_prepared_is_taken_although_only_some_have_heard_of_it() -> None:
    cluster = [[held(0), held(0, NEW, phase=Phase.prepared)], [held(1), held(1, NEW)], *nodes(2, 3)]
    plan = plan_recovery(cluster)
    assert plan is not None and (plan.snapshot, plan.step, plan.lost) == (NEW, 80, [2, 3])


@pytest.mark.parametrize("change", [{"phase": Phase.local}, {"phase": Phase.writing}, {"is_sound": False}])
def test_what_is_not_whole_does_not_count(change: dict[str, object]) -> None:
    cluster = [[held(0), held(0, NEW)], [held(1), held(1, NEW, **change)], *nodes(2, 3)]
    plan = plan_recovery(cluster)
    assert plan is not None and plan.snapshot == OLD


@pytest.mark.parametrize("change", [{"step": 81}, {"layout": "another"}, {"num_nodes": 5}, {"num_parity_shards": 1}])
def test_parts_that_differ_are_not_put_together(change: dict[str, object]) -> None:
    cluster = [[held(0), held(0, NEW)], [held(1), held(1, NEW, **change)], *nodes(2, 3)]
    plan = plan_recovery(cluster)
    assert plan is not None and plan.snapshot == OLD


def test_a_later_generation_is_newer_whatever_the_number() -> None:
    cluster = [[held(p, SnapshotId(1, 9)), held(p, SnapshotId(2, 1))] for p in range(4)]
    plan = plan_recovery(cluster)
    assert plan is not None and plan.snapshot == SnapshotId(2, 1)


def test_of_two_nodes_that_hold_a_position_the_first_is_read() -> None:
    plan = plan_recovery([*nodes(0), [held(2), held(1)], *nodes(2, 1)])
    assert plan is not None and plan.holders == {0: 0, 1: 1, 2: 1} and plan.lost == [3]


def test_a_snapshot_that_was_resumed_from_twice_in_vain_is_passed_over() -> None:
    cluster = [[held(p), held(p, NEW, num_resumes=2 if p == 1 else 1)] for p in range(4)]
    first, second = plan_recovery(cluster, max_resumes=3), plan_recovery(cluster, max_resumes=2)
    assert first is not None and first.snapshot == NEW
    assert second is not None and second.snapshot == OLD


def test_if_a_newer_one_was_committed_the_resumes_were_not_in_vain() -> None:
    """The newer one is lost to too many damaged slots."""
    cluster = [[held(p, num_resumes=2), held(p, NEW, is_sound=p == 0)] for p in range(4)]
    plan = plan_recovery(cluster)
    assert plan is not None and plan.snapshot == OLD


def test_nothing_is_left_if_all_that_there_is_was_resumed_from_in_vain() -> None:
    assert plan_recovery(nodes(0, 1, 2, 3, num_resumes=2)) is None


def test_the_next_generation_is_newer_than_all_that_have_begun() -> None:
    assert newest_generation([]) == 0
    assert newest_generation([[held(0, SnapshotId(3, 1))], []], begun=[0, 2]) == 3
    assert newest_generation([[held(0, SnapshotId(3, 1))], []], begun=[0, 5]) == 5
