"""The snapshot agents of a job, as all its ranks see them together.

Trainers bring the agents together: they gather their addresses over the process group, agree on a generation and a
secret, and tell each agent its place. So any launcher will do, and an agent trusts only who can open its folder.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from windlass.checkpoint.agent.client import AgentClient, AgentError, NoMemory, TransportError
from windlass.checkpoint.agent.folder import START_S, AgentFolder
from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.config import CheckpointConfig, FailureDomain
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.snapshot.plan import Held, RecoveryPlan, plan_recovery
from windlass.errors import ConfigError, CorruptCheckpoint, RunFolderError
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh

LOOK_S = 1.0
"""An agent that does not answer within so long is at work, or has stopped: it takes no snapshot now."""
NEVER = 1 << 62
"""No event has so high a number."""

logger = logging.getLogger(__name__)

_POLL_S = 0.01


class AgentClients:
    """The clients of the agents of all nodes. Collective unless said otherwise.

    Args:
        job: the name of the job, alike on all nodes and in every attempt of it.
        store: where agents write what is to be durable.
    """

    def __init__(self, mesh: Mesh, job: str, settings: CheckpointConfig, store: Location) -> None:
        self.mesh, self.job, self.settings, self.store = mesh, job, settings, store
        by_rank = settings.failure_domain == FailureDomain.rank
        self.ranks_per_node = 1 if by_rank else mesh.local_world_size
        if mesh.world_size % self.ranks_per_node:
            raise ConfigError(
                "launch.nproc_per_node",
                self.ranks_per_node,
                f"{mesh.world_size} ranks are not the same number on every node, which snapshots in memory need",
                "start as many ranks on each node, or set checkpoint=durable",
            )
        self.num_nodes = mesh.world_size // self.ranks_per_node
        if settings.num_parity_shards >= self.num_nodes:
            raise ConfigError(
                "checkpoint.num_parity_shards",
                settings.num_parity_shards,
                f"parity of {self.num_nodes} {'rank' if by_rank else 'node'}{'s' * (self.num_nodes > 1)} can make up "
                f"for at most {self.num_nodes - 1} lost",
                f"set checkpoint.num_parity_shards={self.num_nodes - 1}"
                if by_rank or self.num_nodes > 1
                else "set checkpoint.failure_domain=rank to protect the ranks of a machine from each other, "
                "or checkpoint.num_parity_shards=0",
            )
        self.node = mesh.rank // self.ranks_per_node
        self.is_leader = mesh.rank % self.ranks_per_node == 0
        """True if this rank speaks for its node."""
        member = f"r{mesh.local_rank}" if by_rank else ""
        self.folder = AgentFolder.of(job, None if settings.shm_dir is None else Path(settings.shm_dir), member)
        self.client: AgentClient | None = None
        self.generation = 0
        self.statuses: list[dict[str, Any]] = []
        """The status of every node's agent, when all were asked last."""
        self.verified: set[SnapshotId] = set()
        """Snapshots that all agents have read again."""
        self.distrusted: set[SnapshotId] = set()
        """Snapshots that could not be restored, although their checksums hold."""
        self.secret = ""
        self.positions: list[int] = list(range(self.num_nodes))
        """Node -> its position among the agents."""

    # --- Agents. ---

    def open(self) -> None:
        """Finds the agent of each node, or starts it, and asks what it holds.

        Raises:
            RunFolderError: an agent does not start.
            ConfigError: two nodes share an agent.
        """
        host = self.settings.agent_host or _own_address()
        for is_turn in (self.is_leader, not self.is_leader):
            self.mesh.agree(lambda is_turn=is_turn: self._connect(host) if is_turn else None)
        self.refresh()
        incarnations = [status["incarnation"] for status in self.statuses]
        if len(set(incarnations)) < len(incarnations):
            raise ConfigError(
                "checkpoint.shm_dir",
                self.settings.shm_dir,
                "is the same for several nodes",
                "give each node its own, or set checkpoint.failure_domain=rank if they are one machine",
            )

    def _connect(self, host: str) -> None:
        if self.client is not None:
            self.client.close()
        settings, deadline = self.settings, time.monotonic() + START_S
        while True:
            connection = self.folder.start_agent(self.job, settings.num_slots, host, settings.lease_s)
            self.client = AgentClient(connection)
            try:
                if self.ask("status", since=NEVER)["num_slots"] == settings.num_slots:
                    return
                self.ask("leave")  # it was started for checkpoint=lazy, and this is erasure, or the other way round
            except TransportError:  # it was killed just now: the system still takes connections for it
                if time.monotonic() > deadline:
                    raise
            self.client.close()
            time.sleep(_POLL_S)

    def refresh(self) -> None:
        """Asks all agents for their status."""
        mine = self.mesh.agree(lambda: self.ask("status") if self.is_leader else None)
        answers = all_gather_object(mine, self.mesh.world)
        self.statuses = [answer for answer in answers if answer is not None]

    def plan(self) -> RecoveryPlan | None:
        """The plan of a recovery from what agents hold by `statuses`; None if there is nothing. Not collective."""
        held = self._held()
        return plan_recovery([[slot for slot in slots if slot.snapshot not in self.distrusted] for slots in held])

    def _held(self) -> list[list[Held]]:
        return [[Held.from_json(_held(slot)) for slot in status["slots"]] for status in self.statuses]

    def hold(self, plan: RecoveryPlan) -> bool:
        """True if agents hold what the plan counts on, by `statuses`. Not collective."""
        return plan.is_held_by(self._held())

    def begin_generation(self, generation: int, plan: RecoveryPlan | None) -> None:
        """Fences off whoever was before, and keeps of what agents hold only the plan's snapshot."""
        self.generation = generation
        self.positions = list(range(self.num_nodes))
        if plan is not None and not self.needs_protection(plan):
            taken = {node: position for position, node in reversed(plan.holders.items())}
            free = iter(position for position in range(self.num_nodes) if position not in taken.values())
            self.positions = [taken[node] if node in taken else next(free) for node in range(self.num_nodes)]
        self._configure([] if plan is None else self._not_newer(plan.snapshot))

    def needs_protection(self, plan: RecoveryPlan) -> bool:
        """True if a snapshot is cut otherwise than this job: what is lost of it stays so until the next."""
        return (plan.num_nodes, plan.num_parity_shards) != (self.num_nodes, self.settings.num_parity_shards)

    def _not_newer(self, snapshot: SnapshotId) -> list[SnapshotId]:
        """The snapshots that are gone back to if this one proves to be damaged."""
        held = {SnapshotId(*slot["snapshot"]) for status in self.statuses for slot in status["slots"]}
        return sorted(other for other in held if other <= snapshot)

    def _configure(self, keep: list[SnapshotId]) -> None:
        # Another secret each time: an agent that has not heard of its new peers yet refuses them, and they try again.
        # It would take what they send for its old peers' else, and drop it when it hears.
        self.secret = self.mesh.decide(lambda: secrets.token_hex(32))
        addresses = [
            tuple(self.statuses[self.positions.index(position)]["address"]) for position in range(self.num_nodes)
        ]
        self.mesh.agree(
            lambda: (
                self._ask_or_refuse(
                    "configure",
                    generation=self.generation,
                    position=self.positions[self.node],
                    addresses=addresses,
                    secret=self.secret,
                    num_parity_shards=self.settings.num_parity_shards,
                    writer=self.positions[0],
                    keep=keep,
                    store=str(self.store),
                    keep_durable=self.settings.keep,
                    max_send_bytes_per_s=self.settings.max_send_bytes_per_s,
                )
                if self.is_leader
                else None
            )
        )

    def address_of(self, node: int) -> tuple[str, int]:
        host, port = self.statuses[node]["address"]
        return host, port

    def newest_generation(self) -> int:
        """The newest generation that agents know. Not collective."""
        return max((status["generation"] for status in self.statuses), default=0)

    def sources(self, plan: RecoveryPlan) -> dict[int, tuple[str, int]]:
        """The addresses of the agents that hold each position of a snapshot."""
        return {position: self.address_of(node) for position, node in plan.holders.items()}

    # --- Recovery. ---

    def verify(self, snapshot: SnapshotId) -> None:
        """Has all agents read every block of a snapshot again; `statuses` then says what is sound."""
        self.mesh.agree(lambda: self.ask("verify", snapshot=snapshot) if self.is_leader else None)
        self.verified.add(snapshot)
        self.refresh()

    def distrust(self, snapshot: SnapshotId) -> None:
        """Looks at a snapshot that could not be restored: what is damaged may be made up for. Once only."""
        if snapshot in self.verified:
            self.distrusted.add(snapshot)
        else:
            self.verify(snapshot)

    def rebuild(self, plan: RecoveryPlan) -> RecoveryPlan:
        """Restores what is lost of a snapshot: each position on the node that has taken it, or else on any.

        Returns:
            The plan, with nothing lost.

        Raises:
            CorruptCheckpoint: more is lost than was thought; nothing that is left is touched.
        """
        sources = self.sources(plan)
        header = next(
            slot
            for slot in self.statuses[min(plan.holders.values())]["slots"]
            if SnapshotId(*slot["snapshot"]) == plan.snapshot
        )
        is_same_sharding = not self.needs_protection(plan)
        takers = {
            position: self.positions.index(position) if is_same_sharding else number % self.num_nodes
            for number, position in enumerate(plan.lost)
        }

        def rebuild_mine() -> None:
            for position in [position for position, node in takers.items() if self.is_leader and node == self.node]:
                try:
                    self.ask("rebuild", header=header, position=position, sources=sources)
                except (AgentError, NoMemory) as error:
                    raise CorruptCheckpoint(
                        "snapshot",
                        f"step {plan.step}",
                        f"cannot be put together again: {error}",
                        "nothing; an older one is used",
                    ) from error

        self.mesh.agree(rebuild_mine)
        self.refresh()
        return dataclasses.replace(plan, holders=dict(sorted((plan.holders | takers).items())), lost=[])

    def slot_indexes(self, snapshot: SnapshotId) -> list[int]:
        """The slots of this node that hold a part of `snapshot`. Not collective."""
        return [
            slot["index"] for slot in self.statuses[self.node]["slots"] if SnapshotId(*slot["snapshot"]) == snapshot
        ]

    def world_size_of(self, plan: RecoveryPlan) -> int:
        """The ranks that took a snapshot. Not collective."""
        slots = (slot for status in self.statuses for slot in status["slots"])
        return next(slot["world_size"] for slot in slots if SnapshotId(*slot["snapshot"]) == plan.snapshot)

    def count_resume(self, snapshot: SnapshotId) -> None:
        def count_mine() -> None:
            try:
                self.ask("resume", snapshot=snapshot, is_confirmed=False)
            except AgentError as error:  # its memory is full: what is counted is no more than a precaution
                logger.warning("%s", error)

        self.mesh.agree(lambda: count_mine() if self.is_leader else None)

    def confirm_resume(self, snapshot: SnapshotId) -> None:
        """A step was made from a snapshot: whatever ends the job later, it is not that. Not collective."""
        if self.is_leader:
            try:
                self.ask("resume", snapshot=snapshot, is_confirmed=True)
            except (AgentError, TransportError) as error:
                logger.warning("%s", error)

    def reopen(self) -> None:
        """Agents were lost: others take over what they left, in the same generation."""
        logger.warning("a snapshot agent was lost: it is started again")
        self.open()
        self._configure([])

    def look(self, since: int = NEVER) -> dict[str, Any] | None:
        """Asks for the agent's status from the training loop, which does not wait for an agent that has stopped."""
        if self.client is None:
            raise TransportError("there is no snapshot agent")
        return self.client.look(LOOK_S, brief=True, since=since)

    def _ask_or_refuse(self, do: str, **fields: Any) -> None:
        """As `ask`. Raises RunFolderError where the agent's folder is of no use any more."""
        try:
            self.ask(do, **fields)
        except (AgentError, NoMemory) as error:
            raise RunFolderError(
                "checkpoint.shm_dir",
                self.folder.path,
                f"cannot be used for snapshots: {error}",
                "make room there, set checkpoint.shm_dir to another folder, or checkpoint=durable",
            ) from error

    def ask(self, do: str, payload: np.ndarray | None = None, **fields: Any) -> dict[str, Any]:
        if self.client is None:
            raise TransportError("there is no snapshot agent")
        return self.client.ask(do, payload, **fields)


def _held(slot: dict[str, Any]) -> dict[str, Any]:
    keys = ("snapshot", "step", "layout", "phase", "position", "num_nodes", "num_parity_shards")
    return {key: slot[key] for key in (*keys, "num_resumes", "is_sound")}


def _own_address() -> str:
    """The address from which this node reaches the one that the job meets on; loopback for a job of one node."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only chooses a route
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"
