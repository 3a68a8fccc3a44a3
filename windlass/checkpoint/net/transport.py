"""How snapshot agents reach each other: authenticated TCP.

A listener gives each peer a thread. A stranger costs that thread for a few seconds at most, a line in the log at most
once a second, and no memory: nothing that it sends is parsed (see `handshake`). There are never more than a few peers
that have proven nothing yet, so a flood of them delays new connections and leaves the others alone.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from windlass.checkpoint.net.connection import Connection, PeerClosed, address_text
from windlass.checkpoint.net.handshake import (
    HANDSHAKE_S,
    RefusedPeer,
    TransportError,
    prove_as_connector,
    prove_as_listener,
)
from windlass.checkpoint.net.pacer import Pacer

__all__ = ["Connection", "Listener", "Pacer", "PeerClosed", "RefusedPeer", "TransportError", "connect"]

MAX_UNPROVEN = 32
"""Peers in the handshake at a time; more are closed at once."""
LOG_EVERY_S = 1.0

_BACKLOG = 128
_RETRY_S = 0.1
"""After the system could not accept, for want of memory or file descriptors."""

logger = logging.getLogger(__name__)


class Listener:
    """Accepts connections until it is closed, and gives each a daemon thread.

    Args:
        host: the address of the interface to listen on.
        handle: called with each proven peer in its thread. The connection is closed when it returns or raises.
        secret: the job's, asked at each connection; None: nobody is let in yet.
        port: 0: any that is free; see `address`.
        pacer: what sends on all connections wait for; None: nothing.
        handshake_s: what a peer has for the whole handshake.

    Raises:
        OSError: one cannot listen there: not an address of this node, or in use.
    """

    def __init__(
        self,
        host: str,
        handle: Callable[[Connection], None],
        secret: Callable[[], bytes | None],
        port: int = 0,
        pacer: Pacer | None = None,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        self._handle, self._secret, self._pacer, self._handshake_s = handle, secret, pacer, handshake_s
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self._wake_read, self._wake_write = socket.socketpair()
        self._lock = threading.Lock()
        self._peers: dict[threading.Thread, Connection] = {}
        self._num_unproven = 0
        self._refusals = _Refusals()
        self._is_closing = False
        host_and_port = self._socket.getsockname()[:2]
        self.address: tuple[str, int] = (host_and_port[0], host_and_port[1])
        self._thread = threading.Thread(target=self._accept_all, name=f"listen {self.address[1]}", daemon=True)
        self._thread.start()

    @property
    def refused(self) -> int:
        """Peers turned away so far."""
        return self._refusals.count

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops accepting, closes all connections, and waits for the threads.

        Args:
            timeout_s: a handler that is still running after so long is named in the log and left.
        """
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        if was_closing:
            return
        self._wake_write.send(b"x")
        self._thread.join()
        for sock in (self._socket, self._wake_read, self._wake_write):
            sock.close()
        with self._lock:
            peers = dict(self._peers)
        for connection in peers.values():
            connection.close()
        deadline = time.monotonic() + timeout_s
        for thread, connection in peers.items():
            if thread is threading.current_thread():
                continue  # a handler closes its own listener
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("the handler of %s goes on after its connection was closed", connection.peer)
        self._refusals.flush()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._is_closing:
                selector.select()
                try:
                    sock, address = self._socket.accept()
                except (BlockingIOError, ConnectionError):
                    continue  # woken to close, or the peer has gone again
                except OSError as error:
                    logger.warning("cannot accept a connection: %s", error)
                    time.sleep(_RETRY_S)
                    continue
                self._admit(sock, address_text(address))

    def _admit(self, sock: socket.socket, peer: str) -> None:
        with self._lock:
            is_full = self._num_unproven >= MAX_UNPROVEN
            self._num_unproven += not is_full
        if is_full:
            sock.close()
            self._refusals.add(peer, f"{MAX_UNPROVEN} others are in the handshake")
            return
        deadline = time.monotonic() + self._handshake_s
        connection = Connection(sock, peer, self._pacer)
        thread = threading.Thread(target=self._serve, args=(sock, connection, deadline), name=peer, daemon=True)
        with self._lock:
            self._peers[thread] = connection
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            with self._lock:
                del self._peers[thread]
                self._num_unproven -= 1
            connection.close()
            self._refusals.add(peer, str(error))

    def _serve(self, sock: socket.socket, connection: Connection, deadline: float) -> None:
        try:
            with connection:
                if self._is_proven(sock, connection, deadline):
                    self._handle(connection)
        except PeerClosed:
            pass  # how a conversation ends
        except TransportError as error:
            if not self._is_closing:
                logger.warning("%s", error)
        except Exception:
            logger.exception("the handler of %s failed", connection.peer)
        finally:
            with self._lock:
                del self._peers[threading.current_thread()]

    def _is_proven(self, sock: socket.socket, connection: Connection, deadline: float) -> bool:
        try:
            secret = self._secret()
            if not secret:
                raise RefusedPeer("there is no secret yet")
            connection.shake_hands(lambda: prove_as_listener(sock, secret, deadline))
        except TransportError as error:
            if not self._is_closing:
                self._refusals.add(connection.peer, str(error))
            return False
        finally:
            with self._lock:
                self._num_unproven -= 1
        return True


def connect(
    address: tuple[str, int], secret: bytes, timeout_s: float = HANDSHAKE_S, pacer: Pacer | None = None
) -> Connection:
    """A connection with the agent that listens at `address`, each having proven itself to the other.

    Args:
        address: host and port.
        secret: the job's.
        timeout_s: for connecting and the handshake together.
        pacer: what sends wait for; None: nothing.

    Raises:
        ValueError: the secret is empty.
        RefusedPeer: the peer does not know the secret, or refused this side.
        TransportError: nobody is there.
    """
    if not secret:
        raise ValueError("the secret must not be empty")
    peer, deadline = address_text(address), time.monotonic() + timeout_s
    try:
        sock = socket.create_connection(address, timeout_s)
        connection = Connection(sock, peer, pacer)
    except OSError as error:
        raise TransportError(f"cannot connect to {peer}: {error}") from error
    try:
        connection.shake_hands(lambda: prove_as_connector(sock, secret, deadline))
    except RefusedPeer as error:
        raise RefusedPeer(f"the handshake with {peer} failed: {error}") from error
    return connection


class _Refusals:
    """Counts them, and logs one a second, so that a flood fills no disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._num_logged = 0
        self._clock, self._next_line = clock, -float("inf")
        self._lock = threading.Lock()

    def add(self, peer: str, reason: str) -> None:
        with self._lock:
            self.count += 1
            now = self._clock()
            if now < self._next_line:
                return
            self._next_line = now + LOG_EVERY_S
            more = self.count - self._num_logged - 1
            self._num_logged = self.count
        logger.warning("refused %s: %s (and %d more since the last such line)", peer, reason, more)

    def flush(self) -> None:
        """Logs those that no line has counted yet."""
        with self._lock:
            more = self.count - self._num_logged
            self._num_logged = self.count
        if more:
            logger.warning("refused %d more", more)
