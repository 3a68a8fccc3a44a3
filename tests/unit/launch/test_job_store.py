"""The store on which a job meets: as torch has stores, for who knows the secret, and for nobody else."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from types import FrameType

import pytest
from torch.distributed import DistNetworkError, DistStoreError, HashStore, PrefixStore, Store, TCPStore

from windlass.checkpoint.net.handshake import GREETING, NONCE_BYTES, OtherSecret, TransportError
from windlass.checkpoint.net.signed import SignedChannel
from windlass.checkpoint.net.transport import connect
from windlass.launch import torch_store
from windlass.launch.job_store import StoreClient, StoreServer, store_variables
from windlass.launch.torch_store import JobStore, take_store_variables

SECRET = b"the secret of one job, 32 bytes."


@pytest.fixture
def server() -> Iterator[StoreServer]:
    server = StoreServer("127.0.0.1", SECRET)
    yield server
    server.close()


def store_of(server: StoreServer, timeout_s: float = 10.0) -> JobStore:
    return JobStore(StoreClient(("127.0.0.1", server.port), SECRET), timedelta(seconds=timeout_s))


OPERATIONS: list[tuple[str, Callable[[Store], object]]] = [
    ("set and get", lambda store: (store.set("a", "1"), store.get("a"))),
    ("set again", lambda store: (store.set("a", "1"), store.set("a", "2"), store.get("a"))),
    ("text beyond ASCII", lambda store: (store.set("\u00e4", "\u20ac"), store.get("\u00e4"))),
    ("add", lambda store: [store.add("n", amount) for amount in (1, 5, -2, 0)]),
    ("what was added", lambda store: (store.add("n", 7), store.get("n"))),
    ("compare with nothing", lambda store: (store.compare_set("c", "", "x"), store.get("c"))),
    ("compare with another", lambda store: (store.set("c", "x"), store.compare_set("c", "y", "z"), store.get("c"))),
    ("compare with the same", lambda store: (store.set("c", "x"), store.compare_set("c", "x", "z"), store.get("c"))),
    ("check", lambda store: (store.set("a", ""), store.check(["a"]), store.check(["a", "b"]))),
    ("delete", lambda store: (store.set("a", "1"), store.delete_key("a"), store.delete_key("a"), store.check(["a"]))),
    ("many", lambda store: (store.multi_set(["a", "b"], ["1", "2"]), store.multi_get(["b", "a"]))),
    ("append", lambda store: (store.append("a", "1"), store.append("a", "2"), store.get("a"))),
]


@pytest.mark.parametrize(("what", "do"), OPERATIONS, ids=[what for what, _ in OPERATIONS])
def test_it_does_as_torchs_own_stores_do(what: str, do: Callable[[Store], object], server: StoreServer) -> None:
    expected = do(HashStore())
    mine = store_of(server)
    assert do(mine) == expected
    assert do(PrefixStore("as torch's C++ calls it", mine)) == expected


def test_any_byte_can_be_kept(server: StoreServer) -> None:
    store, value = store_of(server), bytes(range(256))
    store.set("a", value)
    assert store_of(server).get("a") == value


def test_who_waits_hears_what_another_sets(server: StoreServer) -> None:
    mine, other = store_of(server), store_of(server)
    threading.Timer(0.1, lambda: other.set("p/a", "1")).start()
    assert PrefixStore("p", mine).get("a") == b"1"


def test_what_does_not_come_is_named(server: StoreServer) -> None:
    mine = store_of(server, timeout_s=0.05)
    for store in (mine, PrefixStore("job", mine)):
        with pytest.raises(DistStoreError, match=r"no other process has set (job/)?a within"):
            store.get("a")
        with pytest.raises(DistStoreError, match=r"no other process has set (job/)?b within"):
            store.wait(["b"], timedelta(seconds=0.01))


def test_a_store_that_is_lost_stays_so() -> None:
    server = StoreServer("127.0.0.1", SECRET)
    store = store_of(server)
    server.close()
    for _ in range(2):
        with pytest.raises(DistNetworkError, match="the job's store"):
            store.check(["a"])


def test_clones_are_other_connections_and_live_as_long(server: StoreServer) -> None:
    mine = store_of(server)
    clone = PrefixStore("p", mine).clone()  # of which Python holds only torch's part
    clone.set("a", "1")
    assert mine.get("p/a") == b"1"


def test_an_interrupt_in_the_middle_costs_the_connection_only(server: StoreServer) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    store, other = store_of(server), store_of(server)
    previous = signal.signal(signal.SIGUSR2, interrupt)
    try:
        with server._lock:  # no answer comes meanwhile
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
            with pytest.raises(Interrupted):
                PrefixStore("p", store).set("a", "1")
    finally:
        signal.signal(signal.SIGUSR2, previous)
    store.set("b", "2")
    assert other.get("b") == b"2"


# --- Strangers. ---


def wait_for_refusal(server: StoreServer) -> None:
    deadline = time.monotonic() + 30
    while server.num_refused < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.abort, ()


def test_torchs_own_store_gets_no_answer(server: StoreServer) -> None:
    """Which is how a stranger came in, read all, and left a pickle."""
    mine = store_of(server)
    mine.set("outcome", "none")
    with pytest.raises(DistNetworkError):
        stranger = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=0.5))
        stranger.set("outcome", base64.b64encode(pickle.dumps(Trap())).decode())
        stranger.get("outcome")
    assert mine.get("outcome") == b"none"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        GREETING + bytes(NONCE_BYTES) + bytes(32),
        b"\x00\xce\xf7\x85\x3c\x01" + b"\xff" * 8,
        b"wlas" + b"\xff" * 100,
    ],
)
def test_what_strangers_send_changes_nothing(data: bytes, server: StoreServer) -> None:
    mine = store_of(server)
    mine.set("a", "1")
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        with suppress(OSError):  # it may be cut off by now
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        wait_for_refusal(server)
    assert mine.get("a") == b"1"


def test_another_secret_is_refused(server: StoreServer) -> None:
    with pytest.raises(OtherSecret):
        StoreClient(("127.0.0.1", server.port), b"another", patience_s=0.0)
    wait_for_refusal(server)


@pytest.mark.parametrize(
    "message",
    [
        None,
        {"do": "eval"},
        {"do": "set", "keys": ["a"]},
        {"do": "set", "keys": ["a"], "values": [1]},
        {"do": "add", "keys": ["a", "b"]},
        {"do": "add", "keys": ["text"], "amount": 1},
        {"do": "compare_set", "keys": ["a"], "values": ["b"]},
        {"do": "get", "keys": ["a"], "more": 1},
    ],
)
def test_what_cannot_be_answered_ends_that_connection_alone(message: object, server: StoreServer) -> None:
    mine = store_of(server)
    mine.set("text", "x")
    with connect(("127.0.0.1", server.port), SECRET) as connection:
        channel = SignedChannel(connection, is_connector=True)
        channel.send(message)
        with pytest.raises(TransportError):
            channel.receive(10.0)
    assert mine.get("text") == b"x" and not mine.check(["a"])


# --- What a worker is told. ---


def test_a_worker_takes_what_it_was_told_of_the_store_out_of_its_environment(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert take_store_variables() is None
    variables = store_variables(("127.0.0.1", server.port), SECRET)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    connect_store = take_store_variables()
    assert not variables.keys() & os.environ.keys()
    assert connect_store is not None
    store = connect_store(5.0)
    store.set("a", "1")
    assert store_of(server).get("a") == b"1"


def test_a_store_that_is_gone_is_torchs_error(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in store_variables(("127.0.0.1", server.port), SECRET).items():
        monkeypatch.setenv(key, value)
    connect_store = take_store_variables()
    server.close()
    assert connect_store is not None
    with pytest.raises(DistNetworkError, match="the job's store: cannot connect"):
        connect_store(5.0)
    assert torch_store.STORE not in os.environ
