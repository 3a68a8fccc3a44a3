"""What the tests of the transport share: both ends of connections, honest and not."""

from __future__ import annotations

import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from windlass.checkpoint.net.transport import Connection, Listener, Pacer, connect

SECRET = b"the secret of one job, 32 bytes."
SOON_S = 0.5
"""A time limit for tests in which it must pass."""
LATE_S = 60.0
"""A time limit for tests in which it must not."""
HAPPENS_S = 10.0
"""What `wait_until` waits for has so long."""


def echo(connection: Connection) -> None:
    """Sends back what it receives, until the peer closes."""
    while True:
        header, num_bytes = connection.receive(math.inf)
        payload = memoryview(bytearray(num_bytes))
        connection.receive_into(payload)
        connection.send(header, payload)


def works(connection: Connection) -> bool:
    """Whether an `echo` answers."""
    connection.send({"are you": "there"})
    return connection.receive() == ({"are you": "there"}, 0)


@contextmanager
def listening(secret: bytes | None = SECRET, handshake_s: float = LATE_S) -> Iterator[Listener]:
    with Listener("127.0.0.1", echo, lambda: secret, handshake_s=handshake_s) as listener:
        yield listener


@contextmanager
def accepting() -> Iterator[tuple[Listener, queue.Queue[Connection]]]:
    """A listener, and the connections that it has accepted, open until the end of the block."""
    accepted: queue.Queue[Connection] = queue.Queue()
    done = threading.Event()

    def hand_over(connection: Connection) -> None:
        accepted.put(connection)
        done.wait()

    with Listener("127.0.0.1", hand_over, lambda: SECRET) as listener:
        try:
            yield listener, accepted
        finally:
            done.set()


@contextmanager
def pair(pacer: Pacer | None = None) -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection."""
    with accepting() as (listener, accepted), connect(listener.address, SECRET, pacer=pacer) as here:
        yield here, accepted.get()


@contextmanager
def raw_pair() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare socket and the connection at its other end."""
    raw, other = tcp_pair()
    with raw, Connection(other, "peer") as connection:
        yield raw, connection


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


@contextmanager
def impostor(script: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server that runs `script` on its first connection, and then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as sock:
                script(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()
        thread.join()


def read(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = sock.recv(num_bytes - len(data))
        assert part, "closed"
        data += part
    return data


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionError):
        while part := sock.recv(4096):
            data += part
    return data


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HAPPENS_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {HAPPENS_S:.0f} s"
        time.sleep(0.01)
