"""Coordinates snapshots in memory: what all ranks do together to take one."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from windlass.checkpoint.agent.client import AgentError, NoMemory, TransportError
from windlass.checkpoint.agent.header import Region
from windlass.checkpoint.agent.ledger import Busy, SnapshotId, Stale
from windlass.checkpoint.agent.slots import SharedFile
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.image import round_up
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.errors import ConfigError, DoesNotFit, RunFolderError

logger = logging.getLogger(__name__)

_FREE, _BUSY, _GONE, _FULL = 0, -1, -2, -3
"""The states of a node's agent when a snapshot is due."""
MAX_FAILURES = 5
"""Snapshots in a row that did not come to be in memory: then it is given up."""


@dataclass(frozen=True)
class Target:
    """The place of a rank's snapshot."""

    snapshot: SnapshotId
    persist: bool
    """True if the ranks have agreed to make it durable."""
    region: memoryview | None
    """Whole blocks: what the rank asked for, and padding. None if this node's agent was lost meanwhile: then no node
    will commit the snapshot."""


class SnapshotCoordinator:
    """Collective unless said otherwise."""

    def __init__(self, agents: AgentClients) -> None:
        self.agents = agents
        self._newest: SnapshotId | None = None
        self._given_up: SnapshotId | None = None
        """The newest that this rank could not take part in."""
        self._maps: dict[tuple[str, int, int], SharedFile] = {}
        self._failures = 0
        self.why_given_up: str | None = None
        """The reason why there are no snapshots in memory any more, on all ranks alike; None while there are."""

    def reserve(self, region_bytes: int) -> None:
        """Takes the memory that snapshots of `region_bytes` a rank need.

        Raises:
            DoesNotFit: a node has too little of it.
        """
        _, node_bytes = self._regions([int(size) for size in self._gather(region_bytes).flatten()])

        def reserve_mine() -> None:
            try:
                self.agents.ask("reserve", node_bytes=node_bytes)
            except NoMemory as error:
                raise DoesNotFit(
                    "checkpoint.shm_dir",
                    self.agents.folder.path,
                    f"{self.agents.settings.num_slots} snapshots need {error.needed_bytes / 2**20:,.0f} MiB of shared "
                    f"memory on this node, and {error.free_bytes / 2**20:,.0f} MiB are free",
                    "make it larger (`mount -o remount,size=... /dev/shm`, `docker run --shm-size=...`), "
                    "set checkpoint.shm_dir to another folder, or checkpoint=durable",
                ) from error

        self.agents.mesh.agree(lambda: reserve_mine() if self.agents.is_leader else None)

    def begin(self, step: int, region_bytes: int, persist: bool) -> Target | None:
        """Takes a slot on all nodes, or on none: None if the snapshot before is not done, or an agent was lost.

        Args:
            persist: whether it is to be made durable; it is if any rank says so.
        """
        state = self._state()
        answers, wants = self._gather(region_bytes if state == _FREE else state, int(persist)).unbind(1)
        if (answers < 0).any():
            if (answers == _FULL).any():
                self.why_given_up = f"{MAX_FAILURES} snapshots in a row could not be taken"
            elif (answers == _GONE).any():
                self._reopen()
            return None
        regions, node_bytes = self._regions([int(size) for size in answers])
        snapshot = self._next_id()
        mine = next(region for region in regions if region.rank == self.agents.mesh.rank)
        try:
            answer = self.agents.ask(
                "begin",
                snapshot=snapshot,
                step=step,
                rank=self.agents.mesh.rank,
                regions=[[region.position, region.rank, region.offset, region.nbytes] for region in regions],
                node_bytes=node_bytes,
                world_size=self.agents.mesh.world_size,
                layout=_layout_hash(regions, node_bytes),
                persist=bool(wants.any()),
            )
            data = self._map(answer["path"], answer["inode"], answer["size"])
        except (Stale, Busy, NoMemory, AgentError, OSError, ValueError) as error:
            if not isinstance(error, Stale | Busy | TransportError):
                self.count(is_failure=True)
            logger.warning("no snapshot of step %d: %s", step, error)
            self.give_up(snapshot, str(error))
            return Target(snapshot, bool(wants.any()), None)
        return Target(
            snapshot, bool(wants.any()), data.view[mine.offset : mine.offset + round_up(mine.nbytes, BLOCK_BYTES)]
        )

    def count(self, is_failure: bool) -> None:
        """A snapshot was given up, or committed. Not collective."""
        self._failures = self._failures + 1 if is_failure else 0

    def copied(self, snapshot: SnapshotId, checksums: np.ndarray) -> None:
        """This rank's region is whole. Not collective; from any thread."""
        try:
            self.agents.ask("copied", checksums.view(np.uint8), snapshot=snapshot, rank=self.agents.mesh.rank)
        except (Stale, TransportError) as error:
            logger.warning("snapshot %s is lost: %s", tuple(snapshot), error)

    def give_up(self, snapshot: SnapshotId, why: str) -> None:
        """Not collective."""
        self._given_up = snapshot
        try:
            self.agents.ask("abort", snapshot=snapshot, why=why)
        except (AgentError, TransportError) as error:
            logger.warning("%s", error)

    def events(self, since: int) -> list[dict[str, Any]]:
        """Returns what this node's agent did after event number `since`. Not collective."""
        try:
            status = self.agents.look(since)
        except TransportError:
            return []
        return [] if status is None else status["events"]

    def is_idle(self) -> bool:
        """True if this node's agent has nothing to do any more. Not collective."""
        try:
            status = self.agents.look()
        except TransportError:
            return True
        return status is not None and status["in_flight"] is None and not status["is_persisting"]

    def reopen_if_lost(self) -> bool:
        """Brings a node's agent back that is gone, or was started anew, with what it left; True if there was one."""
        is_lost = bool((self._gather(self._state()) == _GONE).any())
        if is_lost:
            self._reopen()
        return is_lost

    def end(self) -> None:
        """The job is over: the agents leave, and leave nothing behind. Not collective."""
        if self.agents.client is not None:
            try:
                self.agents.ask(
                    "end", rank=self.agents.mesh.rank, num_local_ranks=self.agents.ranks_per_node, persist=False
                )
            except (AgentError, TransportError) as error:
                logger.warning("%s", error)
                if self.agents.is_leader:
                    self.agents.folder.remove_if_left()
            self.agents.client.close()
            self.agents.client = None

    def _state(self) -> int:
        if self._failures >= MAX_FAILURES:
            return _FULL
        try:
            status = self.agents.look()
        except TransportError:
            return _GONE
        if status is None:
            return _BUSY
        if not status["is_configured"]:
            return _GONE
        return _FREE if status["is_free"] and status["generation"] == self.agents.generation else _BUSY

    def _regions(self, region_bytes: list[int]) -> tuple[list[Region], int]:
        """Lays out each rank's region; returns them, and the bytes of the node that has the most."""
        regions, largest = [], 0
        for node in range(self.agents.num_nodes):
            offset = 0
            for rank in range(node * self.agents.ranks_per_node, (node + 1) * self.agents.ranks_per_node):
                regions.append(Region(self.agents.positions[node], rank, offset, region_bytes[rank]))
                offset += round_up(region_bytes[rank], BLOCK_BYTES)
            largest = max(largest, offset)
        return regions, largest

    def _map(self, path: str, inode: int, size: int) -> SharedFile:
        """The slot's data, mapped once: to map it again for every snapshot costs as much as to copy it."""
        key = (path, inode, size)
        if key not in self._maps:
            for other in [other for other in self._maps if other[0] == path]:
                del self._maps[other]
            self._maps[key] = SharedFile(Path(path), size, may_make=False)
        return self._maps[key]

    def _reopen(self) -> None:
        try:
            self.agents.reopen()
        except (RunFolderError, ConfigError) as error:  # on all ranks
            self.why_given_up = str(error)
            return
        if self._given_up is not None and self._given_up.generation == self.agents.generation:
            # The agent that was told may have been the one that was lost, and the other nodes wait to hear of it.
            self.give_up(self._given_up, "a rank could not begin it, or copy into it")

    def _next_id(self) -> SnapshotId:
        """Numbers begin again in each generation."""
        is_first = self._newest is None or self._newest.generation != self.agents.generation
        self._newest = SnapshotId(
            self.agents.generation, 1 if is_first or self._newest is None else self._newest.number + 1
        )
        return self._newest

    def _gather(self, *values: int) -> torch.Tensor:
        """`values` of every rank: int64, a row a rank."""
        group = self.agents.mesh.world
        mine = torch.tensor([values], dtype=torch.int64)
        if group is None:
            return mine
        gathered = torch.empty(self.agents.mesh.world_size, len(values), dtype=torch.int64)
        dist.all_gather(list(gathered.split(1)), mine, group=group)
        return gathered


def _layout_hash(regions: list[Region], node_bytes: int) -> str:
    return hashlib.sha256(repr((regions, node_bytes)).encode()).hexdigest()[:16]
