"""Answers what trainers ask of their node's snapshot agent, over the unix socket."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from windlass.checkpoint.agent.effects import Effect, End, Group
from windlass.checkpoint.agent.header import Header, Region
from windlass.checkpoint.agent.ledger import WHOLE, Busy, Phase, SnapshotId, Stale
from windlass.checkpoint.agent.repair import BlockSource, Rebuilder, TooFewShards
from windlass.checkpoint.agent.stripes import Stripes
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
        agent.tell(agent.core.trainer_came)
    try:
        with connection:
            while True:
                request, num_bytes = connection.receive(math.inf)
                if agent.is_leaving:
                    return  # whoever comes now needs the next agent, and finds it when this one is gone
                try:
                    reply = session.answer(request, num_bytes)
                    agent.is_leaving |= session.is_last
                    connection.send(reply)
                finally:
                    agent.do(session.take_last())
    except TransportError:
        pass  # it has ended, one way or another
    finally:
        with agent.changed:
            del agent.trainers[connection]
            agent.tell(agent.core.trainer_left, session.copying)


class TrainerSession:
    """The connection of one rank, of a launcher, or of somebody who looks."""

    def __init__(self, agent: Agent, connection: Connection) -> None:
        self.agent, self.core, self.connection = agent, agent.core, connection
        self.copying: tuple[SnapshotId, int] | None = None
        """The snapshot and the rank whose copy is awaited."""
        self._last: list[Effect] = []  # what is done when the answer is sent: the process's end would cut it off
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
            if error.errno in (errno.ENOSPC, errno.ENOMEM) and "node_bytes" in request and self.core.group is not None:
                return {"error": "memory", "message": str(error), **self._memory(request)}
            return {"error": "system", "message": f"{said(error)}: {error.filename}"}

    @property
    def is_last(self) -> bool:
        """True if the agent ends when the answer is sent."""
        return any(isinstance(effect, End) for effect in self._last)

    def take_last(self) -> list[Effect]:
        last, self._last = self._last, []
        return last

    def _status(self, request: Json) -> Json:
        agent, core = self.agent, self.core
        with agent.changed:
            in_flight = core.ledger.in_flight
            brief = {
                "generation": core.ledger.generation,
                "is_configured": core.group is not None,
                "is_free": core.ledger.free_slot() is not None,
                "in_flight": None if in_flight is None else core.ledger.slots[in_flight].snapshot,
                "is_persisting": core.persists.is_busy,
                "events": [event for event in agent.events if event["number"] > request.get("since", 0)],
            }
            if request.get("brief"):
                return brief
            return brief | {
                "pid": os.getpid(),
                "num_slots": len(core.headers),
                "job": agent.job,
                "incarnation": agent.incarnation,
                "address": agent.listener.address,
                "num_trainers": len(agent.trainers),
                "trainer_pids": sorted({pid for pid in agent.trainers.values() if pid is not None}),
                "num_refused": agent.listener.refused,
                "num_stale": agent.num_stale,
                "sent_bytes": dict(agent.sent_bytes),
                "slots": [
                    {"index": index, "is_sound": not core.damaged.get(index), **asdict(header)}
                    for index, header in core.held().items()
                ],
                "bytes": sum(files.num_bytes for files in agent.slots.values()),
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
            pacer, target = Pacer(request["max_send_bytes_per_s"]), (request["store"], request["keep_durable"])
            keep = [SnapshotId(*snapshot) for snapshot in request["keep"]]
            try:
                agent.tell(self.core.configure, group, keep)
            except OSError:
                agent.tell(self.core.configure_failed)
                raise
            agent.pacer, agent.persister.target = pacer, target
        return {}

    def _reserve(self, request: Json) -> Json:
        self.agent.tell(self.core.reserve, request["node_bytes"])
        return {}

    def _begin(self, request: Json) -> Json:
        agent, snapshot = self.agent, SnapshotId(*request["snapshot"])
        with agent.changed:
            header = self._header(snapshot, request, self.core.require_group())
            try:
                agent.tell(self.core.begin, header)
            except OSError as error:
                agent.tell(self.core.give_up, snapshot, said(error))
                raise
            data = agent.files(self.core.slot_of(header)).data
            assert data is not None
            self.copying = (snapshot, request["rank"])
            return {"path": str(data.path), "size": data.size, "inode": data.inode}

    def _header(self, snapshot: SnapshotId, request: Json, group: Group) -> Header:
        return Header(
            snapshot=snapshot,
            step=request["step"],
            phase=Phase.writing,
            position=group.position,
            num_nodes=len(group.addresses),
            num_parity_shards=group.num_parity_shards,
            node_bytes=request["node_bytes"],
            world_size=request["world_size"],
            layout=request["layout"],
            regions=tuple(Region(*region) for region in request["regions"]),
            persist=request["persist"],
        )

    def _copied(self, request: Json, num_bytes: int) -> Json:
        """A rank's region is whole; the payload is its blocks' checksums."""
        checksums = np.empty(num_bytes // 4, np.uint32)
        self.connection.receive_into(checksums.view(np.uint8).data)
        agent, snapshot, rank = self.agent, SnapshotId(*request["snapshot"]), request["rank"]
        with agent.changed:
            self.copying = None
            encoding = agent.encoding_of(snapshot)
        encoding.add_checksums(rank, checksums)
        encoding.sum_padding()
        agent.tell(self.core.copied, snapshot, rank)
        return {}

    def _abort(self, request: Json) -> Json:
        self.copying = None
        self.agent.tell(self.core.give_up, SnapshotId(*request["snapshot"]), request["why"])
        return {}

    def _verify(self, request: Json) -> Json:
        """Reads every block of what is whole of a snapshot again."""
        agent, snapshot, num_damaged = self.agent, SnapshotId(*request["snapshot"]), 0
        with agent.changed:
            held = [index for index, header in self.core.held().items() if header.snapshot == snapshot]
            parts = {index: agent.files(index).memory for index in held if self.core.held()[index].phase in WHOLE}
        for index, memory in parts.items():
            damaged = set(memory.damaged_blocks())
            agent.tell(self.core.verified, index, memory.header, damaged)
            num_damaged += len(damaged)
        return {"num_damaged": num_damaged}

    def _resume(self, request: Json) -> Json:
        self.agent.tell(self.core.count_resume, SnapshotId(*request["snapshot"]), request["is_confirmed"])
        return {}

    def _rebuild(self, request: Json) -> Json:
        """Restores the slot of one position from the others': this node's own, or one that nobody has taken."""
        agent, core = self.agent, self.core
        header = replace(Header.from_json(request["header"]), position=request["position"])
        begin = time.monotonic()
        with agent.rebuilding, ExitStack() as stack:  # one at a time: a new rank may ask for what is under way
            sources, troubles = _open_sources(request, header.snapshot, core.require_group(), stack)
            try:
                with agent.changed:
                    agent.tell(core.begin_rebuild, header)
                    memory, blocks = agent.files(core.slot_of(header)).memory, core.blocks_to_rebuild(header)
                num_blocks = Rebuilder(memory, sources, troubles).rebuild(blocks)
                agent.tell(core.rebuilt, header)
            except BaseException:
                agent.tell(core.rebuild_failed, header)
                raise
        return {"num_blocks": num_blocks, "seconds": time.monotonic() - begin}

    def _leave(self, _: Json) -> Json:
        self._last = self.agent.step(self.core.leave)
        return {}

    def _end_job(self, request: Json) -> Json:
        self._last = self.agent.step(self.core.end, request["rank"], request["num_local_ranks"], request["persist"])
        return {}

    def _memory(self, request: Json) -> Json:
        agent, group = self.agent, self.core.require_group()
        stripes = Stripes(len(group.addresses), group.num_parity_shards, request["node_bytes"])
        slots = range(len(self.core.headers))
        return {
            "needed_bytes": len(slots) * (stripes.data_bytes + stripes.parity_bytes),
            "free_bytes": shutil.disk_usage(agent.folder.path).free + sum(agent.files(i).num_bytes for i in slots),
        }


def _open_sources(
    request: Json, snapshot: SnapshotId, group: Group, stack: ExitStack
) -> tuple[dict[int, BlockSource], dict[int, str]]:
    """The slots of other nodes, by position, and why those that are missing are."""
    sources, troubles = {}, {}
    for position, (host, port) in request["sources"].items():
        try:
            source = BlockSource((host, port), group.secret, group.generation, snapshot, int(position))
        except TransportError as error:  # it was there when this was planned; the others may do
            logger.warning("node %s cannot be read: %s", position, error)
            troubles[int(position)] = str(error)
        else:
            stack.callback(source.close)
            sources[int(position)] = source
    return sources, troubles
