"""Only who knows the job's secret gets in; all others cost a thread for a moment."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import tracemalloc
from contextlib import suppress

import pytest
from transport_helpers import LATE_S, SECRET, SOON_S, echo, impostor, listening, read, read_to_end, wait_until, works

from windlass.checkpoint.net import handshake
from windlass.checkpoint.net.handshake import GREETING, NONCE_BYTES, PROOF_BYTES, proof
from windlass.checkpoint.net.transport import Listener, RefusedPeer, TransportError, connect

# Who does not know the secret


def test_both_know_the_secret() -> None:
    with listening() as listener, connect(listener.address, SECRET) as connection:
        assert works(connection) and listener.refused == 0


@pytest.mark.parametrize("secret", [b"another", SECRET[:-1], SECRET + b"."])
def test_a_peer_with_another_secret(secret: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with listening() as listener:
        with pytest.raises(RefusedPeer, match=r"the handshake with 127\.0\.0\.1:"):
            connect(listener.address, secret)
        wait_until(lambda: listener.refused == 1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "refused 127.0.0.1:" in caplog.text and "it does not know the secret" in caplog.text


@pytest.mark.parametrize("secret", [None, b""])
def test_before_there_is_a_secret_nobody_gets_in(secret: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    now = [secret]
    with Listener("127.0.0.1", echo, lambda: now[0]) as listener:
        with pytest.raises(RefusedPeer):
            connect(listener.address, SECRET)
        wait_until(lambda: listener.refused == 1)
        now[0] = SECRET
        with connect(listener.address, SECRET) as connection:
            assert works(connection)
    assert "there is no secret yet" in caplog.text


def test_an_empty_secret_opens_nothing() -> None:
    with listening() as listener, pytest.raises(ValueError, match="empty"):
        connect(listener.address, b"")


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(TransportError, match=r"cannot connect to 127\.0\.0\.1") as caught:
        connect(address, SECRET)
    assert not isinstance(caught.value, RefusedPeer)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: node\r\n\r\n", "another protocol"),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 10**7, "another protocol"),
        (os.urandom(1 << 16), "another protocol"),
        (bytes(1 << 16), "another protocol"),
        (GREETING[:-1] + b"\x02" + bytes(NONCE_BYTES), "version 2 of the protocol, and this is version 1"),
        (GREETING + bytes(NONCE_BYTES) + bytes(PROOF_BYTES), "does not know the secret"),
        (GREETING + bytes(NONCE_BYTES) + os.urandom(1 << 16), "does not know the secret"),
    ],
    ids=["http", "long http", "noise", "zeros", "version", "no proof", "noise for a proof"],
)
def test_strangers(sent: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with listening() as listener, socket.create_connection(listener.address) as sock:
        tracemalloc.start()
        try:
            with suppress(ConnectionError):  # cut off before it had said everything
                sock.sendall(sent)
            received = read_to_end(sock)
            wait_until(lambda: listener.refused == 1)
            assert tracemalloc.get_traced_memory()[1] < 1 << 18
        finally:
            tracemalloc.stop()
    assert reason in caplog.text
    assert len(received) <= len(GREETING) + NONCE_BYTES  # no proof by the listener


@pytest.mark.parametrize("length", [0, 1, len(GREETING), len(GREETING) + NONCE_BYTES])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "silent"])
def test_half_a_handshake(length: int, closes: bool, caplog: pytest.LogCaptureFixture) -> None:
    with listening(handshake_s=SOON_S) as listener, socket.create_connection(listener.address) as sock:
        sock.sendall((GREETING + bytes(NONCE_BYTES))[:length])
        if closes:
            sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)  # the listener closes
        wait_until(lambda: listener.refused == 1)
    assert ("closed the connection" if closes else "did not finish the handshake in time") in caplog.text


def test_a_peer_that_trickles_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """Each byte comes in time; all of them would not."""
    message = GREETING + bytes(NONCE_BYTES)
    num_sent = 0
    with listening(handshake_s=SOON_S) as listener, socket.create_connection(listener.address) as sock:
        try:
            for byte in message:
                time.sleep(0.1)
                sock.sendall(bytes([byte]))
                num_sent += 1
        except ConnectionError:
            pass
        wait_until(lambda: listener.refused == 1)
    assert num_sent < len(message) and "did not finish the handshake in time" in caplog.text


# Who only seems to know it


@pytest.mark.parametrize("trickles", [True, False])
def test_a_listener_that_does_not_answer(trickles: bool) -> None:
    done = threading.Event()

    def stall(sock: socket.socket) -> None:
        try:
            while trickles and not done.wait(0.05):
                sock.sendall(GREETING[:1])
        except ConnectionError:
            pass
        done.wait()

    with impostor(stall) as address:
        expected = "another protocol" if trickles else "did not finish the handshake in time"
        with pytest.raises(RefusedPeer, match=expected):
            connect(address, SECRET, timeout_s=SOON_S if not trickles else LATE_S)
        done.set()


def test_a_listener_that_does_not_know_the_secret() -> None:
    def pretend(sock: socket.socket) -> None:
        sock.sendall(GREETING + os.urandom(NONCE_BYTES))
        read(sock, len(GREETING) + NONCE_BYTES + PROOF_BYTES)
        sock.sendall(os.urandom(PROOF_BYTES))
        read_to_end(sock)

    with impostor(pretend) as address, pytest.raises(RefusedPeer, match="it does not know the secret"):
        connect(address, SECRET)


def test_a_listener_that_sends_back_what_it_gets() -> None:
    def reflect(sock: socket.socket) -> None:
        for num_bytes in (len(GREETING) + NONCE_BYTES, PROOF_BYTES):
            sock.sendall(read(sock, num_bytes))
        read_to_end(sock)

    with impostor(reflect) as address, pytest.raises(RefusedPeer, match="it does not know the secret"):
        connect(address, SECRET)


def test_a_peer_that_sends_back_what_it_gets() -> None:
    with listening() as listener, socket.create_connection(listener.address) as sock:
        sock.sendall(GREETING + os.urandom(NONCE_BYTES))
        greeting = read(sock, len(GREETING) + NONCE_BYTES)
        with socket.create_connection(listener.address) as other:  # its own challenge, put to itself
            other.sendall(greeting)
            read(other, len(GREETING) + NONCE_BYTES)
            sock.sendall(os.urandom(PROOF_BYTES))
            assert read_to_end(sock) == b""
            other.sendall(greeting[len(GREETING) :])
            assert read_to_end(other) == b""  # it proves nothing to who has proven nothing
        wait_until(lambda: listener.refused == 2)


def test_a_process_that_is_connected_to_itself_by_a_third(caplog: pytest.LogCaptureFixture) -> None:
    with listening() as listener:

        def relay(sock: socket.socket) -> None:
            with socket.create_connection(listener.address) as other:
                forward = threading.Thread(target=pump, args=(sock, other))
                forward.start()
                pump(other, sock)
                forward.join()

        with impostor(relay) as address, pytest.raises(RefusedPeer):
            connect(address, SECRET)
        wait_until(lambda: "it is this process itself" in caplog.text)
        assert listener.refused == 1
        with connect(listener.address, SECRET) as connection:  # by the straight way it may
            assert works(connection)
    assert not handshake._own_challenges


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class Recorder(socket.socket):
    """Keeps what is said on it."""

    sent: bytes = b""
    received: bytes = b""

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        self.sent += data
        super().sendall(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        self.received += data
        return data


def recorded_handshake(address: tuple[str, int]) -> tuple[bytes, bytes]:
    """What a connector that knows the secret, and the listener, say to each other."""
    with Recorder() as sock:
        sock.connect(address)
        handshake.prove_as_connector(sock, SECRET, time.monotonic() + LATE_S)
        return sock.sent, sock.received


def test_a_recorded_handshake_opens_nothing() -> None:
    with listening() as listener:
        sent, received = recorded_handshake(listener.address)
        assert listener.refused == 0 and len(sent) == len(received) == len(GREETING) + NONCE_BYTES + PROOF_BYTES
        with socket.create_connection(listener.address) as sock:
            sock.sendall(sent)
            assert len(read_to_end(sock)) == len(GREETING) + NONCE_BYTES  # a new nonce, and no proof
        wait_until(lambda: listener.refused == 1)

    def replay(sock: socket.socket) -> None:
        sock.sendall(received)
        read_to_end(sock)

    with impostor(replay) as address, pytest.raises(RefusedPeer, match="it does not know the secret"):
        connect(address, SECRET)


def test_a_proof_binds_role_nonces_and_secret() -> None:
    one, two = bytes(NONCE_BYTES), bytes([1]) * NONCE_BYTES
    proofs = {
        proof(secret, role, first, second)
        for secret in (SECRET, b"another")
        for role in (b"connector", b"listener")
        for first in (one, two)
        for second in (one, two)
    }
    assert len(proofs) == 16
