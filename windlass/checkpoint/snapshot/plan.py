"""Plans a recovery after all trainers died, from what the agents of all nodes hold. Pure and torch-free.

Every new trainer decides for itself from the same answers, so all decide alike. What was committed had been prepared on
all nodes, and any n - m of them give back the others. So the newest snapshot of which so many are left is at least as
new as the newest that was committed. docs/design/commit_protocol.md says what is to be done with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windlass.checkpoint.agent.ledger import WHOLE, Phase, SnapshotId

MAX_RESUMES = 2
"""A snapshot from which so many resumes were begun, and nothing newer committed, may be what kills the job."""


@dataclass(frozen=True)
class Held:
    """One slot of one agent, as its header has it."""

    snapshot: SnapshotId
    step: int
    layout: str
    """A hash of how the job was sharded."""
    phase: Phase
    position: int
    """The position whose data it is: that of a node in the generation that took it, which the node may have no more."""
    num_nodes: int
    num_parity_shards: int
    num_resumes: int = 0
    """How often a resume from it was begun, since one has made a step."""
    is_sound: bool = True
    """True if its checksums hold."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> Held:
        return Held(**document | {"snapshot": SnapshotId(*document["snapshot"]), "phase": Phase(document["phase"])})

    @property
    def key(self) -> _SnapshotKey:
        return _SnapshotKey(self.snapshot, self.step, self.layout, self.num_nodes, self.num_parity_shards)


@dataclass(frozen=True, order=True)
class _SnapshotKey:
    """The facts that all parts of a snapshot have in common: parts that differ in any are never put together."""

    snapshot: SnapshotId
    step: int
    layout: str
    num_nodes: int
    num_parity_shards: int


@dataclass(frozen=True)
class RecoveryPlan:
    """The snapshot to go on from, and where it is."""

    snapshot: SnapshotId
    step: int
    layout: str
    num_nodes: int
    num_parity_shards: int
    holders: dict[int, int]
    """Position -> the index of a node that holds its part, sound."""
    lost: list[int]
    """The positions whose part has to be rebuilt from the others'."""

    def is_held_by(self, held_by_node: Sequence[Sequence[Held]]) -> bool:
        """True if every holder still has its part whole: a part in flight may be given up until agents are fenced."""
        key = _SnapshotKey(self.snapshot, self.step, self.layout, self.num_nodes, self.num_parity_shards)
        parts = [{held.position for held in slots if held.key == key and held.phase in WHOLE} for slots in held_by_node]
        return all(position in parts[node] for position, node in self.holders.items())


def plan_recovery(held_by_node: Sequence[Sequence[Held]], max_resumes: int = MAX_RESUMES) -> RecoveryPlan | None:
    """Chooses the newest snapshot of which n - m positions are left, sound, prepared or committed, of one key.

    Args:
        held_by_node: what the agent of each node answered, in an order that all trainers agree on; nothing for a
            node that is lost or new. If several hold a position, since it was rebuilt elsewhere, the first counts.
        max_resumes: a snapshot from which so many resumes were begun is passed over, unless a newer one was committed.

    Returns:
        None if nothing in memory can be used.
    """
    whole: dict[_SnapshotKey, dict[int, int]] = {}
    for node, slots in enumerate(held_by_node):
        for held in slots:
            if held.phase in WHOLE and held.is_sound:
                whole.setdefault(held.key, {}).setdefault(held.position, node)
    everything = [held for slots in held_by_node for held in slots]
    usable = {
        key: holders
        for key, holders in whole.items()
        if len(holders) >= key.num_nodes - key.num_parity_shards
        and not _is_quarantined(key.snapshot, everything, max_resumes)
    }
    if not usable:
        return None
    best = max(usable)
    return RecoveryPlan(
        best.snapshot,
        best.step,
        best.layout,
        best.num_nodes,
        best.num_parity_shards,
        holders=dict(sorted(usable[best].items())),
        lost=[position for position in range(best.num_nodes) if position not in usable[best]],
    )


def newest_generation(held_by_node: Iterable[Iterable[Held]], begun: Iterable[int] = ()) -> int:
    """The newest generation that slots are of, or that agents have `begun`; 0 if there is none."""
    return max([held.snapshot.generation for slots in held_by_node for held in slots] + [*begun], default=0)


def _is_quarantined(snapshot: SnapshotId, everything: Sequence[Held], max_resumes: int) -> bool:
    if any(held.snapshot > snapshot and held.phase == Phase.committed for held in everything):
        return False
    return max(held.num_resumes for held in everything if held.snapshot == snapshot) >= max_resumes
