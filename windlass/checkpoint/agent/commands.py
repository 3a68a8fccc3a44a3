"""What trainers ask of their node's snapshot agent, over the unix socket."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from windlass.checkpoint.agent.encoding import Encoding
from windlass.checkpoint.agent.ledger import Busy, Phase, Slot, SnapshotId, Stale
from windlass.checkpoint.agent.peers import Group
from windlass.checkpoint.agent.repair import BlockSource, Rebuilder, TooFewShards
from windlass.checkpoint.agent.slots import Header, Region, SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.pacer import Pacer
from windlass.os_errors import said

if TYPE_CHECKING:
    from windlass.checkpoint.agent.process import Agent

Json = dict[str, Any]
logger = logging.getLogger(__name__)


def serve_trainer(agent: Agent, connection: Connection, pid: int | None) -> None:
    """Answers the process `pid` until it goes. What it had begun to copy is given up then."""
    session = TrainerSession(agent, connection)
    with agent.changed:
        agent.trainers[connection] = pid
    try:
        with connection:
            while True:
                request, num_bytes = connection.receive(math.inf)
                connection.send(session.answer(request, num_bytes))
                if session.ends_agent:  # after the answer, which the process's end would cut off
                    agent.close()
    except TransportError:
        pass  # it has ended, one way or another
    finally:
        session.end()


class TrainerSession:
    """The connection of one rank, of a launcher, or of somebody who looks."""

    def __init__(self, agent: Agent, connection: Connection) -> None:
        self.agent, self.connection = agent, connection
        self.ends_agent = False
        self._copying: tuple[SnapshotId, int] | None = None  # the snapshot and the rank whose copy is awaited
        self._commands: dict[str, Callable[[Json], Json]] = {
            "status": self._status,
            "configure": self._configure,
            "reserve": self._reserve,
            "begin": self._begin,
            "abort": self._abort,
            "verify": self._verify,
            "rebuild": self._rebuild,
            "resume": self._resume,
            "leave": self._leave,
            "end": self._end_job,
        }

    def answer(self, request: Json, num_bytes: int) -> Json:
        """The reply: `error` says what kind it is where there is one."""
        try:
            if request["do"] == "copied":
                return self._copied(request, num_bytes)
            return self._commands[request["do"]](request)
        except Busy as error:
            return {"error": "busy", "message": str(error)}
        except Stale as error:
            self.agent.count_stale(self.connection, str(error))
            return {"error": "stale", "message": str(error)}
        except TooFewShards as error:
            return {"error": "lost", "message": str(error)}
        except TransportError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM) and "node_bytes" in request and self.agent.group is not None:
                return {"error": "memory", "message": str(error), **self._memory(request)}
            return {"error": "system", "message": f"{said(error)}: {error.filename}"}

    def end(self) -> None:
        agent = self.agent
        with agent.changed:
            agent.trainers.pop(self.connection, None)
            agent.last_seen = time.monotonic()
            copying = self._copying
        if copying is not None:
            agent.give_up(copying[0], f"rank {copying[1]} ended while it copied")

    def _status(self, request: Json) -> Json:
        agent = self.agent
        with agent.changed:
            ledger, group = agent.ledger, agent.group
            in_flight = ledger.in_flight
            brief = {
                "generation": ledger.generation,
                "is_configured": group is not None,
                "is_free": ledger.free_slot() is not None,
                "in_flight": None if in_flight is None else ledger.slots[in_flight].snapshot,
                "is_persisting": agent.persister.is_busy,
                "events": [event for event in agent.events if event["number"] > request.get("since", 0)],
            }
            if request.get("brief"):
                return brief
            return brief | {
                "pid": os.getpid(),
                "num_slots": len(agent.slots),
                "job": agent.job,
                "incarnation": agent.incarnation,
                "address": agent.listener.address,
                "num_trainers": len(agent.trainers),
                "trainer_pids": sorted({pid for pid in agent.trainers.values() if pid is not None}),
                "num_refused": agent.listener.refused,
                "num_stale": agent.num_stale,
                "sent_bytes": dict(agent.sent_bytes),
                "slots": [
                    {"index": files.index, "is_sound": not agent.damaged.get(files.index), **asdict(files.header)}
                    for files in [*agent.slots, *agent.foreign]
                    if files.header is not None
                ],
                "bytes": sum(
                    file.size for files in [*agent.slots, *agent.foreign] for file in (files.data, files.parity) if file
                ),
            }

    def _configure(self, request: Json) -> Json:
        group = Group(
            generation=request["generation"],
            position=request["position"],
            addresses=tuple((host, port) for host, port in request["addresses"]),
            secret=bytes.fromhex(request["secret"]),
            num_parity_shards=request["num_parity_shards"],
            writer=request["writer"],
        )
        agent = self.agent
        with agent.changed:
            agent.configure(group, [SnapshotId(*snapshot) for snapshot in request["keep"]])
            agent.persister.target = (request["store"], request["keep_durable"])
            agent.pacer = Pacer(request["max_send_bytes_per_s"])
        return {}

    def _reserve(self, request: Json) -> Json:
        """Takes the memory of all empty slots now, so that no snapshot finds it gone."""
        agent = self.agent
        group = self._group()
        stripes = Stripes(len(group.addresses), group.num_parity_shards, request["node_bytes"])
        with agent.changed:
            for slot, files in zip(agent.ledger.slots, agent.slots, strict=True):
                if slot.phase == Phase.empty:
                    files.reserve(stripes)
        return {}

    def _begin(self, request: Json) -> Json:
        agent = self.agent
        snapshot, rank = SnapshotId(*request["snapshot"]), request["rank"]
        with agent.changed:
            index = agent.ledger.find(snapshot)
            if index is None:
                index = agent.ledger.begin(snapshot)
                try:
                    self._begin_files(agent.slots[index], snapshot, request)
                except OSError as error:
                    agent.ledger.abort(snapshot)
                    agent.apply()
                    agent.add_event("snapshot_given_up", step=request["step"], reason=said(error))
                    raise
                agent.changed.notify_all()
            if agent.encoding is None or agent.encoding.snapshot != snapshot:
                raise Stale(f"snapshot {snapshot} is over")
            data = agent.slots[index].data
            assert data is not None
            self._copying = (snapshot, rank)
            return {"path": str(data.path), "size": data.size, "inode": data.inode}

    def _begin_files(self, files: SlotFiles, snapshot: SnapshotId, request: Json) -> None:
        group = self._group()
        regions = tuple(Region(*region) for region in request["regions"])
        header = Header(
            snapshot=snapshot,
            step=request["step"],
            phase=Phase.writing,
            position=group.position,
            num_nodes=len(group.addresses),
            num_parity_shards=group.num_parity_shards,
            node_bytes=request["node_bytes"],
            world_size=request["world_size"],
            layout=request["layout"],
            regions=regions,
            persist=request["persist"],
        )
        files.begin(header)
        ranks = [region.rank for region in header.own_regions]
        self.agent.damaged.pop(files.index, None)
        self.agent.encoding = Encoding(snapshot, files, ranks, time.monotonic())

    def _copied(self, request: Json, num_bytes: int) -> Json:
        """A rank's region is whole; the payload is its blocks' checksums."""
        checksums = np.empty(num_bytes // 4, np.uint32)
        self.connection.receive_into(checksums.view(np.uint8).data)
        agent, snapshot, rank = self.agent, SnapshotId(*request["snapshot"]), request["rank"]
        with agent.changed:
            self._copying = None
            encoding = agent.encoding
            if encoding is None or encoding.snapshot != snapshot:
                raise Stale(f"snapshot {snapshot} is over")
            assert encoding.files.header is not None
            region = next(region for region in encoding.files.header.own_regions if region.rank == rank)
            first = region.offset // BLOCK_BYTES
            encoding.files.table[first : first + checksums.size] = checksums
            encoding.waiting.discard(rank)
            is_whole = not encoding.waiting
        if is_whole:
            agent.local_is_whole(encoding)
        return {}

    def _abort(self, request: Json) -> Json:
        self._copying = None
        self.agent.give_up(SnapshotId(*request["snapshot"]), request["why"])
        return {}

    def _verify(self, request: Json) -> Json:
        """Reads every block of a snapshot again."""
        agent, num_damaged = self.agent, 0
        for files in [*agent.slots, *agent.foreign]:
            if files.header is not None and files.header.snapshot == SnapshotId(*request["snapshot"]):
                agent.damaged[files.index] = set(files.damaged_blocks())
                num_damaged += len(agent.damaged[files.index])
        return {"num_damaged": num_damaged}

    def _resume(self, request: Json) -> Json:
        """Counts an attempt to go on from a snapshot, or says that one has succeeded."""
        agent = self.agent
        with agent.changed:
            for files in agent.slots:
                header = files.header
                if header is not None and header.snapshot == SnapshotId(*request["snapshot"]):
                    num_resumes = 0 if request["is_confirmed"] else header.num_resumes + 1
                    files.write_header(replace(header, num_resumes=num_resumes))
        return {}

    def _rebuild(self, request: Json) -> Json:
        """Restores the slot of one position from the others': this node's own, or one that nobody has taken."""
        agent, group = self.agent, self._group()
        header = replace(
            Header.from_json(request["header"]), position=request["position"], phase=Phase.writing, table_crc=0
        )
        begin = time.monotonic()
        files = agent.held(header.snapshot, header.position)
        wanted = agent.damaged.get(files.index) if files is not None else None
        sources: dict[int, BlockSource] = {}
        try:
            for position, (host, port) in request["sources"].items():
                try:
                    sources[int(position)] = BlockSource(
                        (host, port), group.secret, group.generation, header.snapshot, int(position)
                    )
                except TransportError as error:  # it was there when this was planned; the others may do
                    logger.warning("node %s cannot be read: %s", position, error)
            if files is None:
                files = self._room_for(header)
                agent.rebuilding.add(files.index)
                files.begin(header)
            num_blocks = Rebuilder(files, sources).rebuild(wanted)
            with agent.changed:
                files.set_phase(Phase.committed, with_table=True)
                agent.damaged.pop(files.index, None)
                if files.index < len(agent.slots):
                    agent.ledger.slots[files.index] = Slot(header.snapshot, Phase.committed)
        finally:
            for source in sources.values():
                source.close()
            with agent.changed:
                agent.rebuilding.clear()
                agent.apply()
        return {"num_blocks": num_blocks, "seconds": time.monotonic() - begin}

    def _room_for(self, header: Header) -> SlotFiles:
        """A slot of this node's own if it has taken the lost one's place, else one beside them."""
        agent, group = self.agent, self._group()
        with agent.changed:
            is_own = (header.position, header.num_nodes) == (group.position, len(group.addresses))
            if is_own and agent.ledger.find(header.snapshot) is None:
                return next(
                    files
                    for files, slot in zip(agent.slots, agent.ledger.slots, strict=True)
                    if slot.phase == Phase.empty
                )
            files = SlotFiles(agent.folder.path, len(agent.slots) + len(agent.foreign))
            agent.foreign.append(files)
            return files

    def _end_job(self, request: Json) -> Json:
        """The job is over, or this rank of it. The last one to say so ends the agent."""
        agent = self.agent
        if request["persist"]:
            agent.persister.persist_newest()
        with agent.changed:
            agent.ended.add(request["rank"])
            self.ends_agent = len(agent.ended) >= request["num_local_ranks"]
        return {}

    def _leave(self, _: Json) -> Json:
        """Another agent takes over, of another number of slots."""
        self.agent.keeps_folder = self.ends_agent = True
        return {}

    def _group(self) -> Group:
        group = self.agent.group
        if group is None:
            raise Stale("this agent was started anew, and does not know its group yet")
        return group

    def _memory(self, request: Json) -> Json:
        group = self._group()
        stripes = Stripes(len(group.addresses), group.num_parity_shards, request["node_bytes"])
        held = sum(file.size for files in self.agent.slots for file in (files.data, files.parity) if file)
        return {
            "needed_bytes": len(self.agent.slots) * (stripes.data_bytes + stripes.parity_bytes),
            "free_bytes": shutil.disk_usage(self.agent.folder.path).free + held,
        }
