"""Messages on a connection that are what its peer has sent, in the order in which it has: each is signed.

The key is the connection's own (see `handshake`), and what is signed has the direction and the number of the message.
So one that somebody on the way has changed, repeated, dropped or sent back is found, and ends the connection.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import TransportError
from windlass.untrusted import Malformed, parse_json


class SignedChannel:
    """One message at a time, each way.

    Args:
        connection: after its handshake.
        is_connector: which of the two ends this is.
    """

    def __init__(self, connection: Connection, is_connector: bool) -> None:
        if not connection.session_key:
            raise ValueError("a connection without a handshake has no key")
        self._connection = connection
        self._own, self._theirs = (b"connector", b"listener") if is_connector else (b"listener", b"connector")
        self._num_sent = self._num_received = 0

    def send(self, message: Any) -> None:
        """Sends what JSON can say. Raises TransportError."""
        body = json.dumps(message, separators=(",", ":"))
        self._connection.send({"body": body, "mac": self._mac(self._own, self._num_sent, body)})
        self._num_sent += 1

    def receive(self, wait_s: float | None = None) -> Any:
        """The next message; `wait_s` as for `Connection.receive`.

        Raises:
            PeerClosed: the peer has closed the connection.
            TransportError: it is gone, or this is not what it has sent. The connection is closed.
        """
        header, num_bytes = self._connection.receive(wait_s)
        body, mac = header.get("body"), header.get("mac")
        if num_bytes or not isinstance(body, str) or not isinstance(mac, str):
            raise self._broken("a message that is not signed")
        expected = self._mac(self._theirs, self._num_received, body)
        if not hmac.compare_digest(mac.encode(), expected.encode()):
            raise self._broken("a message with a signature that is not its own: somebody changes what is sent")
        self._num_received += 1
        try:
            return parse_json(body)
        except Malformed as error:
            raise self._broken(f"a message that cannot be read: {error}") from error

    def _mac(self, role: bytes, number: int, body: str) -> str:
        text = b"%b %d " % (role, number) + body.encode("utf-8", "surrogatepass")
        return hmac.new(self._connection.session_key, text, "sha256").hexdigest()

    def _broken(self, what: str) -> TransportError:
        self._connection.close()
        return TransportError(f"{self._connection.peer} sent {what}")
