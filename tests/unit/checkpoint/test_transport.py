"""The listener: many at once, strangers among them, and an end."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack, suppress

import pytest
from transport_helpers import LATE_S, SECRET, echo, listening, read, read_to_end, wait_until, works

from windlass.checkpoint.net import transport
from windlass.checkpoint.net.handshake import GREETING, NONCE_BYTES
from windlass.checkpoint.net.transport import MAX_UNPROVEN_OF_ADDRESS, Connection, Listener, TransportError, connect


def test_a_flood_of_strangers_does_not_disturb_who_is_in(caplog: pytest.LogCaptureFixture) -> None:
    num_strangers = 3 * MAX_UNPROVEN_OF_ADDRESS
    with listening() as listener, connect(listener.address, SECRET) as connection, ExitStack() as stack:
        num_threads = threading.active_count()
        for _ in range(num_strangers):
            stack.enter_context(socket.create_connection(listener.address))
            assert works(connection)
        wait_until(lambda: listener.refused == num_strangers - MAX_UNPROVEN_OF_ADDRESS)  # the oldest
        wait_until(lambda: threading.active_count() <= num_threads + MAX_UNPROVEN_OF_ADDRESS)
        with connect(listener.address, SECRET) as other:  # in place of one more
            assert works(other) and works(connection)
        assert listener.refused == num_strangers - MAX_UNPROVEN_OF_ADDRESS + 1
        stack.close()  # the strangers go
        wait_until(lambda: listener.refused == num_strangers)
        assert works(connection)
    assert "made place in the handshake for one that came later" in caplog.text


def test_who_is_honest_gets_in_through_half_open_handshakes_that_are_begun_again_and_again() -> None:
    """From its own address too."""
    over = threading.Event()

    def hold(address: tuple[str, int]) -> None:
        while not over.is_set():
            with suppress(OSError), socket.create_connection(address) as sock:
                sock.sendall(GREETING + bytes(NONCE_BYTES))
                while sock.recv(4096):
                    pass

    with listening() as listener:
        strangers = [
            threading.Thread(target=hold, args=(listener.address,)) for _ in range(MAX_UNPROVEN_OF_ADDRESS + 8)
        ]
        for stranger in strangers:
            stranger.start()
        wait_until(lambda: listener.refused > 8)
        for _ in range(3):
            with connect(listener.address, SECRET, patience_s=10.0) as connection:
                assert works(connection)
        over.set()
        listener.close()
        for stranger in strangers:
            stranger.join()


def test_a_flood_from_one_address_takes_no_place_of_others() -> None:
    with listening() as listener, ExitStack() as stack:
        other = stack.enter_context(socket.create_connection(listener.address, source_address=("127.0.0.2", 0)))
        wait_until(lambda: len(listener._unproven) == 1)
        for _ in range(2 * MAX_UNPROVEN_OF_ADDRESS):
            stack.enter_context(socket.create_connection(listener.address))
        wait_until(lambda: listener.refused == MAX_UNPROVEN_OF_ADDRESS)
        hosts = Counter(peer.origin for peer in listener._unproven)
        assert hosts == {"127.0.0.1": MAX_UNPROVEN_OF_ADDRESS, "127.0.0.2": 1}
        other.sendall(GREETING + bytes(NONCE_BYTES))
        assert read(other, len(GREETING)) == GREETING  # it is the oldest, and still there


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1:2%eth0", "fe80::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ],
)
def test_a_network_of_ipv6_counts_as_one_address(host: str, origin: str) -> None:
    assert transport._origin(host) == origin


def test_where_all_places_are_taken_the_oldest_of_the_address_with_the_most_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "MAX_UNPROVEN", 4)
    with listening() as listener, ExitStack() as stack:
        for number in (1, 2, 2, 2, 3):
            sock = socket.create_connection(listener.address, source_address=(f"127.0.0.{number}", 0))
            stack.enter_context(sock)
        wait_until(lambda: listener.refused == 1)
        assert [peer.origin for peer in listener._unproven] == ["127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3"]


def test_who_has_proven_itself_makes_place_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the moment before its answer is sent."""
    monkeypatch.setattr(transport, "MAX_UNPROVEN_OF_ADDRESS", 1)
    is_proven, go_on = threading.Event(), threading.Event()
    keep = Listener._keep

    def keep_and_wait(self: Listener, peer: transport._Peer) -> None:
        keep(self, peer)
        is_proven.set()
        go_on.wait()

    monkeypatch.setattr(Listener, "_keep", keep_and_wait)
    with listening() as listener, ExitStack() as stack:
        connected: list[Connection] = []
        thread = threading.Thread(target=lambda: connected.append(connect(listener.address, SECRET, LATE_S)))
        thread.start()
        is_proven.wait()
        for _ in range(3):
            stack.enter_context(socket.create_connection(listener.address))
        wait_until(lambda: listener.refused == 2)
        go_on.set()
        thread.join()
        with connected[0] as connection:
            assert works(connection)


def test_refusals_are_logged_once_a_second_and_all_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 50.0
    refusals = transport._Refusals(clock=lambda: now)
    for i in range(100):
        refusals.add(f"peer {i}", "why")
    now += transport.LOG_EVERY_S
    refusals.add("a later peer", "why")
    refusals.add("the last peer", "why")
    refusals.flush()
    refusals.flush()
    assert refusals.count == 102
    assert [record.getMessage() for record in caplog.records] == [
        "refused peer 0: why (and 0 more since the last such line)",
        "refused a later peer: why (and 99 more since the last such line)",
        "refused 1 more",
    ]


def test_closing_ends_connections_and_threads() -> None:
    before = set(threading.enumerate())
    with ExitStack() as stack:
        listener = Listener("127.0.0.1", echo, lambda: SECRET)
        connections = [stack.enter_context(connect(listener.address, SECRET)) for _ in range(5)]
        assert all(works(connection) for connection in connections)
        silent = [stack.enter_context(socket.create_connection(listener.address)) for _ in range(5)]
        wait_until(lambda: len(set(threading.enumerate()) - before) == 11)
        listener.close()
        assert set(threading.enumerate()) <= before
        for connection in connections:
            with pytest.raises(TransportError):
                connection.receive()
        assert all(read_to_end(sock) == b"" for sock in silent)
        listener.close()  # again: nothing to do
        with pytest.raises(TransportError, match="cannot connect"):
            connect(listener.address, SECRET)
        with Listener("127.0.0.1", echo, lambda: SECRET, port=listener.address[1]) as again:  # the port is free
            assert again.address == listener.address


def test_a_handler_that_ignores_the_end_is_named(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    listener = Listener("127.0.0.1", lambda _: done.wait() and None, lambda: SECRET)
    with connect(listener.address, SECRET):
        listener.close(timeout_s=0.05)
    done.set()
    assert "goes on after its connection was closed" in caplog.text


def test_a_handler_may_close_its_listener() -> None:
    closed = threading.Event()

    def close(_: Connection) -> None:
        listener.close()
        closed.set()

    listener = Listener("127.0.0.1", close, lambda: SECRET)
    with connect(listener.address, SECRET):
        closed.wait()


def test_a_handler_that_fails_costs_only_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    def fail_once(connection: Connection) -> None:
        header, _ = connection.receive()
        if "fail" in header:
            raise KeyError("a bug")
        connection.send(header)

    with Listener("127.0.0.1", fail_once, lambda: SECRET) as listener:
        with connect(listener.address, SECRET) as connection:
            connection.send({"fail": 1})
            with pytest.raises(TransportError):
                connection.receive()
        with connect(listener.address, SECRET) as connection:
            connection.send({})
            assert connection.receive() == ({}, 0)
    assert "KeyError: 'a bug'" in caplog.text


def test_over_ipv6() -> None:
    try:
        listener = Listener("::1", echo, lambda: SECRET)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener, connect(listener.address, SECRET) as connection:
        assert works(connection) and connection.peer.startswith("[::1]:")


def test_over_all_interfaces_a_process_reaches_itself_by_either_version_of_ip() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Listener("::", echo, lambda: SECRET) as listener:
        for host in ("127.0.0.1", "::1"):
            with connect((host, listener.address[1]), SECRET) as connection:
                assert works(connection)


def test_no_torch_is_needed() -> None:
    program = "import sys, windlass.checkpoint.net.transport; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
