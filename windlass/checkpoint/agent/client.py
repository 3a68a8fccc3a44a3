"""A trainer's line to its node's snapshot agent."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agent.ledger import Busy, Stale
from windlass.checkpoint.net.handshake import TransportError

if TYPE_CHECKING:
    from windlass.checkpoint.net.connection import Connection
    from windlass.isal import Memory

ANSWER_S = 600.0
"""The longest that an agent works before it answers: to take or to read all the memory of a slot."""


class NoMemory(Exception):
    """The agent's folder cannot hold a snapshot.

    Args:
        needed_bytes: of the folder's memory, for all slots.
        free_bytes: what there is for them.
    """

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(needed_bytes, free_bytes)
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes


class AgentError(Exception):
    """The agent could not do what it was asked."""


class AgentClient:
    """One connection; any thread may ask, one at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._num_late = 0  # answers that nobody waited for any more
        connection.settimeout(ANSWER_S)

    def ask(self, do: str, payload: Memory | None = None, **fields: Any) -> dict[str, Any]:
        """The agent's answer.

        Raises:
            Busy, Stale, NoMemory, AgentError: it refused.
            TransportError: there is no agent any more.
        """
        with self._lock:
            while self._num_late:
                self._take_late()
            self._connection.send({"do": do, **fields}, payload)
            reply, _ = self._connection.receive()
        kind = reply.get("error")
        if kind is None:
            return reply
        if kind == "busy":
            raise Busy(reply["message"])
        if kind == "stale":
            raise Stale(reply["message"])
        if kind == "memory":
            raise NoMemory(reply["needed_bytes"], reply["free_bytes"])
        raise AgentError(reply["message"])

    def look(self, wait_s: float, **fields: Any) -> dict[str, Any] | None:
        """The agent's status, or None if it does not give it within about `wait_s`: it is at work, or has stopped.

        Raises:
            TransportError: there is no agent any more.
        """
        if not self._lock.acquire(timeout=wait_s):
            return None
        try:
            while self._num_late:
                if not self._connection.has_begun_to_send(wait_s):
                    return None
                self._take_late()
            self._connection.send({"do": "status", **fields})
            if not self._connection.has_begun_to_send(wait_s):
                self._num_late += 1
                return None
            return self._connection.receive()[0]
        finally:
            self._lock.release()

    def _take_late(self) -> None:
        self._connection.receive()
        self._num_late -= 1

    def close(self) -> None:
        self._connection.close()


__all__ = ["AgentClient", "AgentError", "NoMemory", "TransportError"]
