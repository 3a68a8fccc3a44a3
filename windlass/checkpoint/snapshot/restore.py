"""Opens a snapshot that agents hold, as a checkpoint's reader."""

from __future__ import annotations

from windlass.checkpoint.agent.slots import SlotFiles, SlotMemory
from windlass.checkpoint.durable.reader import CheckpointReader
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.checkpoint.snapshot.plan import RecoveryPlan
from windlass.checkpoint.snapshot.reader import Part, SlotSource, manifest_of, read_parts
from windlass.errors import CorruptCheckpoint, RunFolderError
from windlass.os_errors import MISSING, remedy, said
from windlass.parallel.collectives import all_gather_object


def plan_restore(agents: AgentClients) -> RecoveryPlan | None:
    """Finds the snapshot that can be gone on from, and what of it is lost. Collective.

    Where something is lost the rest is read before it is relied on: parity makes up for so much and no more.
    """
    while True:
        plan = agents.plan()
        if plan is None or not plan.lost or plan.snapshot in agents.verified:
            return plan
        agents.verify(plan.snapshot)


def open_snapshot(agents: AgentClients, plan: RecoveryPlan) -> CheckpointReader:
    """A reader of a snapshot of which nothing is lost. Collective.

    Raises:
        CorruptCheckpoint: on all ranks, if the memory of one has changed.
    """
    local = agents.mesh.agree(lambda: _open_local(agents, plan))
    mine = [position for position, node in plan.holders.items() if node == agents.node and agents.is_leader]
    parts = agents.mesh.agree(lambda: [part.to_json() for position in mine for part in _parts(local[position], plan)])
    everything = [
        Part.from_json(part) for parts_of_rank in all_gather_object(parts, agents.mesh.world) for part in parts_of_rank
    ]
    manifest = manifest_of(plan.step, agents.generation, agents.world_size_of(plan), everything)
    for name, tensor in manifest.tensors.items():
        if problem := tensor.problem():
            raise _damaged(plan, f"{name} {problem}")
    source = SlotSource(
        plan.snapshot, plan.step, local, agents.sources(plan), bytes.fromhex(agents.secret), agents.generation
    )
    return CheckpointReader(manifest, source)


def _open_local(agents: AgentClients, plan: RecoveryPlan) -> dict[int, SlotMemory]:
    """The slots of this node that hold a part of the snapshot, by position."""
    found = {}
    for index in agents.slot_indexes(plan.snapshot):
        files = SlotFiles(agents.folder.path, index)
        try:
            files.open(with_parity=False)
        except (ValueError, *MISSING) as error:
            raise _damaged(plan, str(error)) from error
        except OSError as error:
            raise RunFolderError(
                "checkpoint.shm_dir",
                agents.folder.path,
                f"has a snapshot that cannot be read: {said(error)}; that is no damage",
                remedy(error, "mend that and start again"),
            ) from error
        found[files.memory.header.position] = files.memory
    return found


def _parts(memory: SlotMemory, plan: RecoveryPlan) -> list[Part]:
    try:
        return read_parts(memory)
    except ValueError as error:
        raise _damaged(plan, str(error)) from error


def _damaged(plan: RecoveryPlan, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "snapshot", f"step {plan.step} in memory", f"is damaged: {what}", "nothing: parity or an older one is used"
    )
