"""From what agents hold to a reader of it."""

from __future__ import annotations

from windlass.checkpoint.memory_tier import MemoryTier
from windlass.checkpoint.reader import CheckpointReader
from windlass.checkpoint.recovery_plan import RecoveryPlan
from windlass.checkpoint.slot_reader import Part, SlotSource, manifest_of, read_parts
from windlass.checkpoint.slots import SlotFiles
from windlass.errors import CorruptCheckpoint
from windlass.parallel.collectives import all_gather_object


def plan_restore(memory: MemoryTier) -> RecoveryPlan | None:
    """What can be gone on from, and what of it is lost. Collective.

    Where something is lost the rest is read before it is relied on: parity makes up for so much and no more.
    """
    while True:
        plan = memory.plan()
        if plan is None or not plan.lost or plan.snapshot in memory.verified:
            return plan
        memory.verify(plan.snapshot)


def open_snapshot(memory: MemoryTier, plan: RecoveryPlan) -> CheckpointReader:
    """A reader of a snapshot of which nothing is lost. Collective.

    Raises:
        CorruptCheckpoint: on all ranks, if the memory of one has changed.
    """
    local = memory.mesh.agree(lambda: _open_local(memory, plan))
    mine = [position for position, node in plan.holders.items() if node == memory.node and memory.is_leader]
    parts = memory.mesh.agree(lambda: [part.to_json() for position in mine for part in _parts(local[position], plan)])
    everything = [
        Part.from_json(part) for parts_of_rank in all_gather_object(parts, memory.mesh.group) for part in parts_of_rank
    ]
    manifest = manifest_of(plan.step, memory.generation, memory.world_size_of(plan), everything)
    source = SlotSource(
        plan.snapshot, plan.step, local, memory.sources(plan), bytes.fromhex(memory.secret), memory.generation
    )
    return CheckpointReader(manifest, source)


def _open_local(memory: MemoryTier, plan: RecoveryPlan) -> dict[int, SlotFiles]:
    """The slots of this node that hold a part of the snapshot, by position."""
    found = {}
    for index in memory.slot_indexes(plan.snapshot):
        files = SlotFiles(memory.folder.path, index)
        try:
            files.open(with_parity=False)
        except (OSError, ValueError) as error:
            raise _damaged(plan, str(error)) from error
        assert files.header is not None
        found[files.header.position] = files
    return found


def _parts(files: SlotFiles, plan: RecoveryPlan) -> list[Part]:
    try:
        return read_parts(files)
    except ValueError as error:
        raise _damaged(plan, str(error)) from error


def _damaged(plan: RecoveryPlan, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "snapshot", f"step {plan.step} in memory", f"is damaged: {what}", "nothing: parity or an older one is used"
    )
