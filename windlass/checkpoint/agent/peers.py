"""Talks to the other nodes' agents, and hears from them."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from typing import TYPE_CHECKING

from windlass.checkpoint.agent.effects import Group, Json, SendData
from windlass.checkpoint.agent.ledger import Report, SnapshotId
from windlass.checkpoint.agent.repair import TRAINER
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.transport import connect
from windlass.checksum import crc32c

if TYPE_CHECKING:
    from windlass.checkpoint.agent.process import Agent

BLOCKS_PER_FRAME = 4
REPEAT_S = 1.0
"""A report is repeated while a snapshot is in flight: the last one may have been lost with its connection."""
CONFIGURE_S = 20.0
"""How long a peer of a generation that has not begun here is kept waiting for it to begin."""
logger = logging.getLogger(__name__)


class PeerSender(threading.Thread):
    """Tells one peer everything that it is to know, in order, over a connection that is made again when it breaks."""

    def __init__(self, agent: Agent, group: Group, position: int) -> None:
        super().__init__(name=f"to {position}", daemon=True)
        self.agent, self.group, self.position = agent, group, position
        self.messages: deque[Json] = deque()
        self.pushes: deque[SendData] = deque()
        self._connection: Connection | None = None
        self._told = -1  # the version of the report that the peer has

    def run(self) -> None:
        agent, pause_s = self.agent, 0.0
        while True:
            with agent.changed:
                agent.changed.wait_for(self._has_work, REPEAT_S)
                if self._is_over():
                    break
                is_quiet = not self._has_work() and agent.core.ledger.in_flight is None
            if is_quiet:
                continue
            try:
                self._talk()
                pause_s = 0.0
            except TransportError as error:
                self._drop_connection()
                if pause_s == 0.0 and not self._is_over():
                    logger.warning("cannot reach node %d: %s", self.position, error)
                pause_s = min(2.0, 2 * pause_s or 0.1)
                with agent.changed:
                    agent.changed.wait_for(self._is_over, pause_s)
        self._drop_connection()

    def _is_over(self) -> bool:
        return self.agent.core.group is not self.group or self.agent.is_closing

    def _has_work(self) -> bool:
        return self._is_over() or bool(self.messages or self.pushes) or self._told != self.agent.version

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._told = -1

    def _talk(self) -> None:
        if self._connection is None:
            address = self.group.addresses[self.position]
            self._connection = connect(address, self.group.secret, pacer=self.agent.pacer)
            self._connection.send({"position": self.group.position, "generation": self.group.generation})
        self._send_report(self._connection)
        while self.messages:
            self._connection.send(self.messages[0])
            with self.agent.changed:
                self.messages.popleft()
                self.agent.changed.notify_all()
        while self.pushes:
            self._push(self._connection, self.pushes.popleft())

    def _send_report(self, connection: Connection) -> None:
        with self.agent.changed:
            version, report = self.agent.version, self.agent.report
        connection.send(
            {
                "type": "report",
                "prepared": report.prepared,
                "committed": report.committed,
                "aborted": report.aborted,
            }
        )
        self._told = version

    def _push(self, connection: Connection, push: SendData) -> None:
        """Sends the data of a snapshot, unless it is given up meanwhile."""
        agent = self.agent
        with agent.changed:
            encoding = agent.encoding
            if encoding is None or encoding.snapshot != push.snapshot:
                return
        memory, stripes = encoding.memory, encoding.stripes
        try:
            for chunk, row in push.targets:
                for block in range(0, stripes.blocks_per_chunk, BLOCKS_PER_FRAME):
                    count = min(BLOCKS_PER_FRAME, stripes.blocks_per_chunk - block)
                    first = chunk * stripes.blocks_per_chunk + block
                    if encoding.is_over:
                        return
                    if self._told != agent.version:
                        self._send_report(connection)
                    connection.send(
                        {
                            "type": "parity",
                            "snapshot": push.snapshot,
                            "chunk": chunk,
                            "row": row,
                            "block": block,
                            "crcs": memory.table[first : first + count].tolist(),
                        },
                        memory.blocks(first, count),
                    )
                    agent.count_sent("parity", count * BLOCK_BYTES)
        except TransportError:
            self.pushes.appendleft(push)  # the peer passes over what it has, unless it gives the snapshot up
            raise


def serve_peer(agent: Agent, connection: Connection) -> None:
    """Hears one peer until it goes. Whatever is of another generation is refused."""
    hello, _ = connection.receive()
    group = agent.group_of_generation(int(hello["generation"]), CONFIGURE_S)
    position = int(hello["position"])
    if group is None or not (position == TRAINER or position in group.others):
        agent.count_stale(connection, f"node {position} of generation {hello['generation']}")
        return
    scratch = memoryview(bytearray(BLOCK_BYTES))
    try:
        while True:
            header, num_bytes = connection.receive(math.inf)
            if agent.core.group is not group:
                agent.count_stale(connection, f"node {position} of generation {group.generation}")
                return
            kind = header["type"]
            if kind == "report":
                _hear_report(agent, group, position, header)
            elif kind == "parity":
                _hear_parity(agent, position, connection, header, num_bytes, scratch)
            elif kind == "read":
                _answer_read(agent, connection, header)
            elif kind in ("written", "persisted"):
                agent.tell(agent.core.hear_of_write, header)
            else:
                raise TransportError(f"{connection.peer} sent a frame of unknown type {kind!r}")
    finally:
        agent.tell(agent.core.peer_gone, group, position)


def _hear_report(agent: Agent, group: Group, position: int, header: Json) -> None:
    report = Report(
        position,
        group.generation,
        *(None if header[key] is None else SnapshotId(*header[key]) for key in ("prepared", "committed", "aborted")),
    )
    with agent.changed:
        if agent.core.group is group:
            agent.tell(agent.core.hear, report)


def _hear_parity(
    agent: Agent, position: int, connection: Connection, header: Json, num_bytes: int, scratch: memoryview
) -> None:
    snapshot = SnapshotId(*header["snapshot"])
    encoding = agent.wait_for_encoding(snapshot)
    row, chunk, first, checksums = header["row"], header["chunk"], header["block"], header["crcs"]
    if encoding is None or num_bytes != len(checksums) * BLOCK_BYTES:
        connection.skip(num_bytes)
        return
    num_added = num_whole = 0
    try:
        for number, checksum in enumerate(checksums):
            block = first + number
            if not encoding.expects(row, chunk, block):
                connection.skip(BLOCK_BYTES)
                continue
            mirror = encoding.mirror_block(row, block)
            data = scratch if mirror is None else mirror
            connection.receive_into(data)
            if crc32c(data) != checksum:
                agent.tell(agent.core.give_up, snapshot, f"data of node {position} was damaged on its way")
            is_whole = encoding.add_block(row, chunk, block, data, checksum)
            num_added += is_whole is not None
            num_whole += is_whole is True
    finally:
        agent.tell(agent.core.parity_arrived, snapshot, position, num_added, num_whole)


def _answer_read(agent: Agent, connection: Connection, header: Json) -> None:
    """Sends some blocks of a slot, with the checksums that they should have."""
    memory = agent.whole_part(SnapshotId(*header["snapshot"]), int(header["position"]))
    if memory is None:
        connection.send({"error": "this node does not hold that"})
        return
    first, count = int(header["first"]), int(header["count"])
    connection.send({"crcs": memory.table[first : first + count].tolist()}, memory.blocks(first, count))
    agent.count_sent("read", count * BLOCK_BYTES)
