"""Where the launchers of a job find the job store, over sockets."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from support.ranks import free_port

from windlass.errors import ConfigError
from windlass.launch import store_endpoint
from windlass.launch.interfaces import everywhere, listen_address
from windlass.launch.job_store import StoreServer
from windlass.launch.store_endpoint import StoreEndpoint, open_endpoint

SECRET = b"the secret of one job, 32 bytes."


def test_the_first_on_the_host_serves_and_the_next_find_it() -> None:
    address = f"127.0.0.1:{free_port()}"
    store, endpoint = open_endpoint(address, 5, SECRET)
    assert (endpoint.is_host, endpoint.local_address) == (True, "127.0.0.1")
    other, other_endpoint = open_endpoint(address, 5, SECRET)
    assert not other_endpoint.is_host
    store.set({"key": b"value"})
    assert other.get(["key"]) == [b"value"]
    assert endpoint.connect().get(["key"]) == [b"value"]


def test_the_port_is_free_again_when_the_store_is_closed() -> None:
    address = f"127.0.0.1:{free_port()}"
    store, endpoint = open_endpoint(address, 5, SECRET)
    store.set({"key": b"value"})
    endpoint.close()
    again, endpoint = open_endpoint(address, 5, SECRET)
    assert endpoint.is_host and again.get(["key"]) == [None]


def listening_on(port: int) -> set[str]:
    """The addresses at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {own.laddr.ip for own in connections if own.status == psutil.CONN_LISTEN and own.laddr.port == port}


def test_a_node_that_is_alone_needs_no_address_and_is_reached_by_no_other() -> None:
    _, endpoint = open_endpoint("auto", 5, SECRET)
    assert endpoint.is_host and listening_on(endpoint.port) == {"127.0.0.1"}
    assert endpoint.interface == "lo" or sys.platform != "linux"


@pytest.mark.parametrize(
    ("host", "resolved", "expected"),
    [
        ("node0", "10.0.0.1", "10.0.0.1"),  # no other interface
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
        ("node0", "127.0.1.1", everywhere()),  # Debian's name of the machine itself, which others know otherwise
    ],
)
def test_a_store_listens_where_others_look_for_it(host: str, resolved: str, expected: str) -> None:
    assert listen_address(host, resolved) == expected


def test_the_first_node_may_know_its_own_name_as_loopback() -> None:
    server = StoreServer(listen_address("node0", "127.0.1.1"), SECRET)
    try:
        for host in ("127.0.1.1", "127.0.0.1"):
            StoreEndpoint(host, server.port, host, is_host=True, secret=SECRET).connect().set({"a": b"1"})
    finally:
        server.close()


def test_a_node_with_another_secret_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_endpoint, "ANSWER_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    open_endpoint(address, 5, SECRET)
    with pytest.raises(
        ConfigError, match=rf"launch\.secret_file=\(hidden\): the launcher at launch.address={address} has"
    ):
        open_endpoint(address, 5, b"another secret of another job")


def test_an_unknown_name_is_said_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_endpoint, "SAY_AFTER_S", 0.0)
    with pytest.raises(ConfigError, match=r"launch\.address=nowhere\.invalid:29400: does not answer .*name is unknown"):
        open_endpoint("nowhere.invalid:29400", 0.1, SECRET)
    assert "does not answer yet" in capsys.readouterr().err


def test_an_address_that_nobody_answers_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_endpoint, "is_own", lambda _: False)
    with pytest.raises(ConfigError, match=r"does not answer after 0\.1 s: Connection refused"):
        open_endpoint(f"127.0.0.1:{free_port()}", 0.1, SECRET)


@contextmanager
def listener() -> Iterator[int]:
    """Takes connections, and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_that_something_else_has_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_endpoint, "ANSWER_S", 0.0)
    monkeypatch.setattr(store_endpoint, "HANDSHAKE_S", 0.2)
    with listener() as port, pytest.raises(ConfigError, match="something else than a launcher of windlass uses"):
        open_endpoint(f"127.0.0.1:{port}", 5, SECRET)
