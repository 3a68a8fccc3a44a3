"""The listener: many at once, strangers among them, and an end."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
from transport_helpers import SECRET, echo, listening, read_to_end, wait_until, works

from windlass.checkpoint.net import transport
from windlass.checkpoint.net.transport import MAX_UNPROVEN, Connection, Listener, RefusedPeer, TransportError, connect


def test_a_flood_of_strangers_does_not_disturb_who_is_in(caplog: pytest.LogCaptureFixture) -> None:
    num_strangers = 200
    with listening() as listener, connect(listener.address, SECRET) as connection, ExitStack() as stack:
        num_threads = threading.active_count()
        for _ in range(num_strangers):
            stack.enter_context(socket.create_connection(listener.address))
            assert works(connection)
        wait_until(lambda: listener.refused == num_strangers - MAX_UNPROVEN)  # closed at once
        assert threading.active_count() <= num_threads + MAX_UNPROVEN
        with pytest.raises(RefusedPeer):
            connect(listener.address, SECRET)
        stack.close()  # the strangers go
        wait_until(lambda: listener.refused == num_strangers + 1)
        assert works(connection)
        with connect(listener.address, SECRET) as other:
            assert works(other)
    assert "32 others are in the handshake" in caplog.text


def test_refusals_are_logged_once_a_second_and_all_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 50.0
    refusals = transport._Refusals(lambda: now)
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


def test_no_torch_is_needed() -> None:
    program = "import sys, windlass.checkpoint.net.transport; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
