"""Authenticated TCP between snapshot agents, and between the processes of a job.

A listener gives each peer a thread. A stranger costs that thread for a few seconds at most, a line in the log at most
once a second, and no memory: nothing that it sends is parsed (see `handshake`). There are never more than a few peers
that have proven nothing yet. One that comes when there are that many takes the place of the oldest, of the address that
has most of them, and a flood is taken in slowly: so strangers who stop in the handshake delay who is honest, by a
second or two, and keep nobody out. Who has proven itself is left alone.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from windlass.checkpoint.net.connection import Connection, PeerClosed, address_text
from windlass.checkpoint.net.handshake import (
    HANDSHAKE_S,
    OtherSecret,
    RefusedPeer,
    TransportError,
    prove_as_connector,
    prove_as_listener,
)
from windlass.checkpoint.net.pacer import Pacer

__all__ = ["Connection", "Listener", "OtherSecret", "Pacer", "PeerClosed", "RefusedPeer", "TransportError", "connect"]

MAX_UNPROVEN = 128
"""Peers in the handshake at a time."""
MAX_UNPROVEN_OF_ADDRESS = 64
"""The most of these from one address, or one network of IPv6: a flood from there leaves room for others."""
FLOOD_PAUSE_S = 0.01
"""Before the next peer is taken in, after one was closed to make place: so who was taken in has
`FLOOD_PAUSE_S * MAX_UNPROVEN_OF_ADDRESS` seconds to prove itself, however fast strangers come."""
LOG_EVERY_S = 1.0

_BACKLOG = 128
_DROPPED = "it made place in the handshake for one that came later"
_RETRY_S = 0.1
"""After the system could not accept, for want of memory or file descriptors; and between two tries to connect."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Peer:
    connection: Connection
    origin: str
    thread: threading.Thread | None = None
    is_dropped: bool = False


class Listener:
    """Accepts connections until it is closed, and gives each a daemon thread.

    Args:
        host: the address of the interface to listen on; `::` is all of them, of both versions of IP.
        handle: called with each proven peer in its thread. The connection is closed when it returns or raises.
        secret: the job's, asked at each connection; None: nobody is let in yet.
        port: 0: any that is free; see `address`.
        pacer: what sends on all connections wait for; None: nothing.
        handshake_s: what a peer has for the whole handshake.
        is_quiet: who is refused and who is lost is not logged, only counted.

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
        is_quiet: bool = False,
    ) -> None:
        self._level = logging.DEBUG if is_quiet else logging.WARNING
        self._handle, self._secret, self._pacer, self._handshake_s = handle, secret, pacer, handshake_s
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        is_everywhere = host == "::" and socket.has_dualstack_ipv6()
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_everywhere)
        self._socket.setblocking(False)
        self._wake_read, self._wake_write = socket.socketpair()
        self._lock = threading.Lock()
        self._peers: set[_Peer] = set()
        self._unproven: dict[_Peer, None] = {}  # the oldest first
        self._refusals = _Refusals(self._level)
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
            peers = list(self._peers)
        for peer in peers:
            peer.connection.close()
        deadline = time.monotonic() + timeout_s
        for peer in peers:
            thread = peer.thread
            if thread is None or thread is threading.current_thread():
                continue  # a handler closes its own listener
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("the handler of %s goes on after its connection was closed", peer.connection.peer)
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
                if self._admit(sock, address):
                    time.sleep(FLOOD_PAUSE_S)

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> bool:
        """Gives a peer its thread; whether another was closed to make place."""
        deadline = time.monotonic() + self._handshake_s
        origin = _origin(address[0])
        peer = _Peer(Connection(sock, address_text(address), self._pacer), origin)
        peer.thread = threading.Thread(
            target=self._serve, args=(sock, peer, deadline), name=peer.connection.peer, daemon=True
        )
        with self._lock:
            dropped = self._take_place(origin)
            self._peers.add(peer)
            self._unproven[peer] = None
        if dropped is not None:
            dropped.connection.close()
            self._refusals.add(dropped.connection.peer, _DROPPED)
        try:
            peer.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            with self._lock:
                self._peers.discard(peer)
                self._unproven.pop(peer, None)
            peer.connection.close()
            self._refusals.add(peer.connection.peer, str(error))
        return dropped is not None

    def _take_place(self, origin: str) -> _Peer | None:
        """Makes room for one more peer from `origin`; returns the peer that has to go, None if there is room."""
        counts = Counter(peer.origin for peer in self._unproven)
        if counts[origin] < MAX_UNPROVEN_OF_ADDRESS:
            if len(self._unproven) < MAX_UNPROVEN:
                return None
            origin = counts.most_common(1)[0][0]
        oldest = next(peer for peer in self._unproven if peer.origin == origin)
        del self._unproven[oldest]
        oldest.is_dropped = True
        return oldest

    def _serve(self, sock: socket.socket, peer: _Peer, deadline: float) -> None:
        connection = peer.connection
        try:
            with connection:
                if self._is_proven(sock, peer, deadline):
                    self._handle(connection)
        except PeerClosed:
            pass  # how a conversation ends
        except TransportError as error:
            if not self._is_closing:
                logger.log(self._level, "%s", error)
        except Exception:
            logger.exception("the handler of %s failed", connection.peer)
        finally:
            with self._lock:
                self._peers.discard(peer)

    def _is_proven(self, sock: socket.socket, peer: _Peer, deadline: float) -> bool:
        try:
            secret = self._secret()
            if not secret:
                raise RefusedPeer("there is no secret yet")
            peer.connection.shake_hands(lambda: prove_as_listener(sock, secret, deadline, lambda: self._keep(peer)))
        except TransportError as error:
            if not (peer.is_dropped or self._is_closing):  # the first was counted when it was
                self._refusals.add(peer.connection.peer, str(error))
            return False
        finally:
            with self._lock:
                self._unproven.pop(peer, None)
        return True

    def _keep(self, peer: _Peer) -> None:
        """Marks `peer` as proven: it makes room for nobody from now on."""
        with self._lock:
            if peer.is_dropped:
                raise RefusedPeer(_DROPPED)
            self._unproven.pop(peer, None)


def connect(
    address: tuple[str, int],
    secret: bytes,
    timeout_s: float = HANDSHAKE_S,
    pacer: Pacer | None = None,
    patience_s: float = 0.0,
) -> Connection:
    """A connection with who listens at `address`, each having proven itself to the other.

    Args:
        address: host and port.
        secret: the job's.
        timeout_s: for connecting and the handshake together, of one try.
        pacer: what sends wait for; None: nothing.
        patience_s: for how long a handshake that fails is begun again: a flood of strangers, or a crowd of others, may
            have taken this side's place in it.

    Raises:
        ValueError: the secret is empty.
        OtherSecret: the peer does not know the secret, or refused this side.
        RefusedPeer: it speaks another protocol, or did not answer in time.
        TransportError: nobody is there.
    """
    if not secret:
        raise ValueError("the secret must not be empty")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _connect(address, secret, timeout_s, pacer)
        except TransportError as error:
            is_busy = isinstance(error, RefusedPeer) or isinstance(error.__cause__, TimeoutError)
            if not is_busy or time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S * (0.5 + random.random()))  # not all of a crowd at once


def _connect(address: tuple[str, int], secret: bytes, timeout_s: float, pacer: Pacer | None) -> Connection:
    peer, deadline = address_text(address), time.monotonic() + timeout_s
    try:
        sock = socket.create_connection(address, timeout_s)
        connection = Connection(sock, peer, pacer)
    except OSError as error:
        raise TransportError(f"cannot connect to {peer}: {error}") from error
    try:
        connection.shake_hands(lambda: prove_as_connector(sock, secret, deadline))
    except RefusedPeer as error:
        kind = OtherSecret if isinstance(error, OtherSecret) else RefusedPeer
        raise kind(f"the handshake with {peer} failed: {error}") from error
    return connection


def _origin(host: str) -> str:
    """The part of an address that counts as one: in IPv6 the 64 bits of a network, in which a machine takes many."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


class _Refusals:
    """Counts them, and logs one a second, so that a flood fills no disk."""

    def __init__(self, level: int = logging.WARNING, clock: Callable[[], float] = time.monotonic) -> None:
        self.count, self._level = 0, level
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
        logger.log(self._level, "refused %s: %s (and %d more since the last such line)", peer, reason, more)

    def flush(self) -> None:
        """Logs those that no line has counted yet."""
        with self._lock:
            more = self.count - self._num_logged
            self._num_logged = self.count
        if more:
            logger.log(self._level, "refused %d more", more)
