"""Serves the key-value store on which a job's launchers and ranks meet, and asks it. Torch-free.

Nobody is let in, to read or to write, who has not proven that it knows the job's secret, and every message is signed
with a key of its connection (`windlass.checkpoint.net`). Strangers who reach the port can keep it busy, and no more.
What lies in the store is bytes; keys are text. Values are what torch's stores would hold: a number that is counted is
decimal text.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import HANDSHAKE_S, TransportError
from windlass.checkpoint.net.signed import SignedChannel
from windlass.checkpoint.net.transport import Listener, connect
from windlass.untrusted import Malformed, convert

PATIENCE_S = 30.0
"""How long a client tries to reach a store that strangers, or many ranks that start, keep busy."""
CUT_S = 10.0
"""A network that is silent for so long is cut. A process that stands still is waited for."""
STORE, STORE_SECRET = "WINDLASS_STORE", "WINDLASS_STORE_SECRET"
"""Variables by which a launcher tells its workers of the store: HOST:PORT, and the secret, hexadecimal."""


def store_variables(address: tuple[str, int], secret: bytes) -> dict[str, str]:
    """Returns the environment that tells a worker of the store."""
    host, port = address
    return {STORE: f"{host}:{port}", STORE_SECRET: secret.hex()}


@dataclass(frozen=True)
class Request:
    """Values are bytes as text of Latin-1."""

    do: Literal["get", "set", "compare_set", "add", "append", "delete"]
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    amount: int = 0


class StoreServer:
    """Serves a store until it is closed.

    Args:
        host: the address to listen on; `::`: all.

    Raises:
        OSError: one cannot listen there.
    """

    def __init__(self, host: str, secret: bytes, port: int = 0) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self._listener = Listener(host, self._serve, lambda: secret, port, is_quiet=True)

    @property
    def port(self) -> int:
        return self._listener.address[1]

    @property
    def num_refused(self) -> int:
        """Connections of who did not know the secret, or did not finish the handshake."""
        return self._listener.refused

    def close(self) -> None:
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        connection.settimeout(None)
        channel = SignedChannel(connection, is_connector=False)
        while True:
            try:
                request = convert(channel.receive(math.inf), Request)
                with self._lock:
                    answer = _answer(request, self._values)
            except (Malformed, ValueError) as error:
                raise TransportError(f"{connection.peer} asked what cannot be answered: {error}") from error
            channel.send(answer)


def _answer(request: Request, values: dict[str, str]) -> list[Any]:
    """Does what is asked; as torch's stores do it. Raises ValueError."""
    keys, given = request.keys, request.values
    if request.do == "get":
        return [values.get(key) for key in keys]
    if request.do == "set":
        values.update(zip(keys, given, strict=True))
        return []
    if request.do == "delete":
        return [values.pop(key, None) is not None for key in keys]
    (key,) = keys
    if request.do == "compare_set":
        expected, desired = given
        if values.get(key, "") == expected:
            values[key] = desired
        return [values.get(key, expected)]
    if request.do == "append":
        values[key] = values.get(key, "") + "".join(given)
        return []
    number = int(values.get(key, "0")) + request.amount
    values[key] = str(number)
    return [number]


class StoreClient:
    """Asks a store over one connection. Any thread may ask, one at a time; nothing waits for a key.

    A store that is lost stays so. An interrupt in the middle of a question costs the connection, and the next one makes
    another.

    Args:
        timeout_s: of one try to connect.

    Raises:
        OtherSecret, RefusedPeer: who is there is not the job's.
        TransportError: nobody is there.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, patience_s: float = PATIENCE_S, timeout_s: float = HANDSHAKE_S
    ) -> None:
        self.address, self.secret, self._timeout_s = address, secret, timeout_s
        self._lock = threading.Lock()
        self._is_lost = False
        self._channel: SignedChannel | None = self._connect(patience_s)

    def _connect(self, patience_s: float) -> SignedChannel:
        connection = connect(self.address, self.secret, self._timeout_s, patience_s=patience_s)
        connection.settimeout(None)
        connection.break_when_cut(CUT_S)
        return SignedChannel(connection, is_connector=True)

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        values = self._ask(Request("get", tuple(keys)))
        return [None if value is None else value.encode("latin-1") for value in values]

    def set(self, items: dict[str, bytes]) -> None:
        self._ask(Request("set", tuple(items), tuple(value.decode("latin-1") for value in items.values())))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Sets `key` to `desired` if it has `expected`, or nothing where that is empty. Returns what it has then."""
        (value,) = self._ask(Request("compare_set", (key,), (expected.decode("latin-1"), desired.decode("latin-1"))))
        return value.encode("latin-1")

    def add(self, key: str, amount: int) -> int:
        (number,) = self._ask(Request("add", (key,), amount=amount))
        return number

    def append(self, key: str, value: bytes) -> None:
        self._ask(Request("append", (key,), (value.decode("latin-1"),)))

    def delete(self, key: str) -> bool:
        (was_there,) = self._ask(Request("delete", (key,)))
        return was_there

    def _ask(self, request: Request) -> list[Any]:
        """Raises TransportError once the store is lost."""
        with self._lock:
            if self._is_lost:
                raise TransportError("the job's store is lost")
            channel, self._channel = self._channel, None  # it comes back with a whole answer
            try:
                channel = channel or self._connect(PATIENCE_S)
                channel.send(asdict(request))
                answer = channel.receive(math.inf)
            except TransportError:
                self._is_lost = True
                raise
            self._channel = channel
            return answer
