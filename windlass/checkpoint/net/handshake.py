"""The handshake with a snapshot agent: both sides prove that they know the job's secret, before anything is parsed.

Four messages of fixed size: the connector greets with a nonce, the listener answers with its own, the connector proves
itself with an HMAC-SHA256 over both nonces, and so does the listener. The role is part of what is proven, so a proof
that is sent back proves nothing; nonces are fresh, so an old one proves nothing either. Both sides get a key of this
connection alone, with which `signed` signs messages. What agents send is neither encrypted nor signed: who can change
packets on the way between two nodes is not kept out.
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from collections.abc import Callable

HANDSHAKE_S = 5.0
"""For the whole handshake, however its bytes trickle."""
NONCE_BYTES = 32
PROOF_BYTES = 32
GREETING = b"windlass\x01"
"""The protocol and its version, which begin each side's first message; its nonce follows."""

_MAPPED = "::ffff:"
_CONNECTOR, _LISTENER, _SESSION = b"connector", b"listener", b"session"
_own_challenges: dict[bytes, tuple[tuple[str, int], tuple[str, int]]] = {}
"""The nonces with which this process connects just now, and the addresses at both ends."""


class TransportError(OSError):
    """Something is wrong with a connection: it is closed, timed out, or brought a damaged frame."""


class RefusedPeer(TransportError):
    """The handshake failed."""


class _Closed(RefusedPeer):
    pass


class OtherSecret(RefusedPeer):
    """The peer speaks the protocol, and does not know the secret, or does not take this side's for its own."""


def prove_as_connector(sock: socket.socket, secret: bytes, deadline: float) -> bytes:
    """The handshake of the side that connected.

    Args:
        sock: connected, and nothing sent or read yet. Its timeout is changed.
        secret: the job's.
        deadline: on the monotonic clock.

    Returns:
        The key of this connection, which both sides know.

    Raises:
        OtherSecret: the peer does not know the secret, or refused ours.
        RefusedPeer: it speaks another protocol, or did not answer in time.
    """
    nonce = os.urandom(NONCE_BYTES)
    _own_challenges[nonce] = _ends(sock)
    try:
        _send(sock, GREETING + nonce, deadline)
        peer_nonce = _read_greeting(sock, deadline)
        _send(sock, proof(secret, _CONNECTOR, nonce, peer_nonce), deadline)
        try:
            theirs = _read(sock, PROOF_BYTES, deadline)
        except _Closed as error:
            raise OtherSecret(f"{error} after this side had proven itself") from error
        if not hmac.compare_digest(theirs, proof(secret, _LISTENER, nonce, peer_nonce)):
            raise OtherSecret("it does not know the secret")
    finally:
        del _own_challenges[nonce]
    return proof(secret, _SESSION, nonce, peer_nonce)


def prove_as_listener(
    sock: socket.socket, secret: bytes, deadline: float, admit: Callable[[], None] = lambda: None
) -> bytes:
    """The handshake of the side that was connected to: it proves itself only to a peer that has proven itself.

    Args:
        sock: accepted, and nothing sent or read yet. Its timeout is changed.
        secret: the job's.
        deadline: on the monotonic clock.
        admit: called once the peer has proven itself, before it is answered; raises RefusedPeer to turn it away.

    Returns:
        The key of this connection, which both sides know.

    Raises:
        RefusedPeer: the peer does not know the secret, did not answer in time, or is this process, whose connection
            somebody redirected here; or `admit` did.
    """
    peer_nonce = _read_greeting(sock, deadline)
    ends = _own_challenges.get(peer_nonce)
    if ends is not None and ends != _ends(sock)[::-1]:
        raise RefusedPeer("it is this process itself, which connected to another address")
    nonce = os.urandom(NONCE_BYTES)
    _send(sock, GREETING + nonce, deadline)
    if not hmac.compare_digest(_read(sock, PROOF_BYTES, deadline), proof(secret, _CONNECTOR, peer_nonce, nonce)):
        raise OtherSecret("it does not know the secret")
    admit()
    _send(sock, proof(secret, _LISTENER, peer_nonce, nonce), deadline)
    return proof(secret, _SESSION, peer_nonce, nonce)


def proof(secret: bytes, role: bytes, connector_nonce: bytes, listener_nonce: bytes) -> bytes:
    """The proof that `role` sends to show that it knows `secret`; for a session, its key, which nobody sends.

    Unambiguous: all that follows the role has a fixed size.
    """
    return hmac.digest(secret, GREETING + role + connector_nonce + listener_nonce, "sha256")


def _read_greeting(sock: socket.socket, deadline: float) -> bytes:
    """The peer's nonce. Who speaks another protocol is cut off at its first bytes."""
    greeting = _read(sock, len(GREETING), deadline)
    if greeting[:-1] != GREETING[:-1]:
        raise RefusedPeer("it speaks another protocol")
    if greeting != GREETING:
        raise RefusedPeer(f"it speaks version {greeting[-1]} of the protocol, and this is version {GREETING[-1]}")
    return _read(sock, NONCE_BYTES, deadline)


def _read(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        try:
            sock.settimeout(_left(deadline))
            part = sock.recv(num_bytes - len(data))
        except OSError as error:
            raise _failed(error) from error
        if not part:
            raise _Closed("it closed the connection during the handshake")
        data += part
    return data


def _send(sock: socket.socket, message: bytes, deadline: float) -> None:
    try:
        sock.settimeout(_left(deadline))
        sock.sendall(message)
    except OSError as error:
        raise _failed(error) from error


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _failed(error: OSError) -> RefusedPeer:
    if isinstance(error, TimeoutError):
        return RefusedPeer("it did not finish the handshake in time")
    return RefusedPeer(f"it broke off the handshake: {error.strerror}")


def _ends(sock: socket.socket) -> tuple[tuple[str, int], tuple[str, int]]:
    """Host and port of this end and the other, as both ends see them alike.

    An address of IPv6 says more, which the two need not see alike, and a socket for both versions of IP shows one of
    IPv4 as one of IPv6.
    """
    try:
        (own, own_port), (peer, peer_port) = sock.getsockname()[:2], sock.getpeername()[:2]
    except OSError as error:
        raise _failed(error) from error
    return (own.removeprefix(_MAPPED), own_port), (peer.removeprefix(_MAPPED), peer_port)
