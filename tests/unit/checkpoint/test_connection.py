"""Frames arrive whole or not at all, and nobody waits for ever for a peer."""

from __future__ import annotations

import json
import math
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transport_helpers import LATE_S, SECRET, SOON_S, accepting, listening, pair, raw_pair, wait_until

from windlass.checkpoint.net import connection as connection_module
from windlass.checkpoint.net.connection import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from windlass.checkpoint.net.transport import MAX_UNPROVEN, Listener, PeerClosed, TransportError, connect
from windlass.checksum import crc32c

LARGER_THAN_BUFFERS = 128 << 20
"""Bytes that no system takes without a reader."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


def bytes_of_frame(header: object, payload: bytes = b"") -> bytes:
    return frame_with(json.dumps(header).encode(), payload)


def frame_with(
    text: bytes, payload: bytes = b"", header_bytes: int | None = None, num_bytes: int | None = None
) -> bytes:
    lengths = struct.pack(
        "<4sIQI",
        b"wlas",
        len(text) if header_bytes is None else header_bytes,
        len(payload) if num_bytes is None else num_bytes,
        crc32c(text),
    )
    return lengths + struct.pack("<I", crc32c(lengths)) + text + payload


# Frames


@pytest.mark.parametrize("length", [0, 1, 4095, (1 << 20) - 1, 1 << 20, (3 << 20) + 17])
def test_a_frame_comes_back(listener: Listener, length: int) -> None:
    payload = random.Random(length).randbytes(length)
    header = {"kind": "chunk", "crc": crc32c(payload), "größe": [1, None, 2.5, {"a": "b"}]}
    with connect(listener.address, SECRET) as connection:
        for _ in range(2):
            connection.send(header, payload)
            received, num_bytes = connection.receive()
            buffer = bytearray(num_bytes)
            connection.receive_into(memoryview(buffer))
            assert received == header and buffer == payload


def test_a_frame_without_payload(listener: Listener) -> None:
    with connect(listener.address, SECRET) as connection:
        connection.send({})
        assert connection.receive() == ({}, 0)


@pytest.mark.parametrize(
    "payload",
    [torch.arange(12.0).reshape(3, 4), np.arange(12.0, dtype=np.float32).reshape(3, 4), torch.arange(12).bfloat16()],
    ids=["tensor", "array", "bfloat16"],
)
def test_memory_of_any_kind_is_sent_as_its_bytes(payload: torch.Tensor | np.ndarray) -> None:
    with pair() as (here, there):
        here.send({}, payload)
        _, num_bytes = there.receive()
        buffer = bytearray(num_bytes)
        there.receive_into(memoryview(buffer))
        bits = payload.view(torch.uint8).numpy() if isinstance(payload, torch.Tensor) else payload
        assert buffer == bits.tobytes()


def test_a_payload_is_received_in_parts_and_skipped(listener: Listener) -> None:
    data = random.Random(1).randbytes(1 << 20)
    with connect(listener.address, SECRET) as connection:
        connection.send({}, data)
        connection.send({"last": True}, b"end")
        _, num_bytes = connection.receive()
        assert num_bytes == len(data)
        image = memoryview(bytearray(len(data)))
        connection.receive_into(image[:1000])
        connection.skip(700_000)
        connection.receive_into(image[701_000:])
        assert image[:1000] == data[:1000] and image[701_000:] == data[701_000:]
        assert connection.receive() == ({"last": True}, 3)
        connection.skip(3)


def test_what_is_left_of_a_payload_is_neither_exceeded_nor_forgotten() -> None:
    with pair() as (here, there):
        here.send({}, b"0123456789")
        there.receive()
        with pytest.raises(ValueError, match="11 bytes of a payload of which 10 are left"):
            there.receive_into(memoryview(bytearray(11)))
        with pytest.raises(ValueError, match="11 bytes"):
            there.skip(11)
        with pytest.raises(ValueError, match="-1 bytes"):
            there.skip(-1)
        with pytest.raises(ValueError, match="read-only"):
            there.receive_into(memoryview(bytes(10)))
        with pytest.raises(RuntimeError, match="10 bytes of the last frame"):
            there.receive()
        there.skip(10)  # none of it cost the connection
        here.send({"next": 1})
        assert there.receive() == ({"next": 1}, 0)


def test_what_cannot_be_sent_costs_nothing(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_HEADER_BYTES", 100)
    monkeypatch.setattr(connection_module, "MAX_PAYLOAD_BYTES", 1000)
    with connect(listener.address, SECRET) as connection:
        with pytest.raises(TypeError):
            connection.send({"a": object()})
        with pytest.raises(ValueError, match="too large"):
            connection.send({"a": "x" * 100})
        with pytest.raises(ValueError, match="too large"):
            connection.send({}, bytes(1001))
        with pytest.raises(ValueError, match="contiguous"):
            connection.send({}, np.zeros((4, 4))[:, 1])
        connection.send({"still": "there"}, bytes(1000))
        assert connection.receive() == ({"still": "there"}, 1000)


def test_threads_share_a_connection(listener: Listener) -> None:
    num_threads, num_frames = 6, 8
    received: dict[int, list[int]] = {i: [] for i in range(num_threads)}
    with connect(listener.address, SECRET) as connection:

        def send(sender: int) -> None:
            for i in range(num_frames):
                payload = bytes([sender]) * random.Random(i).randrange(3 << 20)  # several slices each
                connection.send({"sender": sender, "i": i, "crc": crc32c(payload)}, payload)

        threads = [threading.Thread(target=send, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for _ in range(num_threads * num_frames):
            header, num_bytes = connection.receive()
            buffer = bytearray(num_bytes)
            connection.receive_into(memoryview(buffer))
            assert crc32c(buffer) == header["crc"]
            received[header["sender"]].append(header["i"])
        for thread in threads:
            thread.join()
    assert all(order == list(range(num_frames)) for order in received.values())


def test_many_connections_at_once(listener: Listener) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(listener.address, SECRET)) for _ in range(MAX_UNPROVEN + 8)]
        for i, connection in enumerate(connections):
            connection.send({"i": i})
        assert [connection.receive()[0]["i"] for connection in connections] == list(range(len(connections)))
        assert listener.refused == 0


# Damage


def test_any_damaged_bit_of_a_prefix_or_header_is_found() -> None:
    frame = bytes_of_frame({"kind": "chunk", "index": 7}, b"data")
    for bit in range(8 * (len(frame) - 4)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with raw_pair() as (raw, connection):
            raw.sendall(damaged)
            with pytest.raises(TransportError, match="damaged"):
                connection.receive()
            assert connection.is_closed


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"[1]", "no object"), (b"{", "no JSON"), (b"", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[" * 10**6, "no JSON")],
    ids=["list", "cut", "empty", "no text", "deep"],
)
def test_a_header_that_is_no_json_object(text: bytes, message: str) -> None:
    with raw_pair() as (raw, connection):
        sender = threading.Thread(target=raw.sendall, args=(frame_with(text),))
        sender.start()
        with pytest.raises(TransportError, match=message):
            connection.receive()
        sender.join()


@pytest.mark.parametrize(
    ("header_bytes", "num_bytes"),
    [(MAX_HEADER_BYTES + 1, 0), (2**32 - 1, 0), (2, MAX_PAYLOAD_BYTES + 1), (2, 2**64 - 1)],
)
def test_too_large_a_frame_is_refused_and_nothing_allocated(header_bytes: int, num_bytes: int) -> None:
    with raw_pair() as (raw, connection):
        raw.sendall(frame_with(b"{}", header_bytes=header_bytes, num_bytes=num_bytes))
        tracemalloc.start()
        try:
            with pytest.raises(TransportError, match="too large"):
                connection.receive()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_damaged_lengths_within_the_limits_allocate_nothing() -> None:
    frame = bytearray(frame_with(b"{}"))
    frame[7] ^= 2  # a header of 32 MiB
    with raw_pair() as (raw, connection):
        raw.sendall(frame)
        tracemalloc.start()
        try:
            with pytest.raises(TransportError, match="damaged"):
                connection.receive()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("length", range(1, 37, 5))
def test_a_frame_that_breaks_off(length: int) -> None:
    frame = bytes_of_frame({"a": 1}, b"payload")
    with raw_pair() as (raw, connection):
        raw.sendall(frame[:length])
        raw.close()
        with pytest.raises(TransportError, match="within a frame") as caught:
            connection.receive()
            connection.skip(7)
        assert not isinstance(caught.value, PeerClosed)


def test_the_end_between_two_frames_is_an_end() -> None:
    with raw_pair() as (raw, connection):
        raw.sendall(bytes_of_frame({"a": 1}))
        raw.close()
        assert connection.receive() == ({"a": 1}, 0)
        with pytest.raises(PeerClosed):
            connection.receive()
        with pytest.raises(TransportError, match="is closed"):
            connection.send({})
        with pytest.raises(TransportError, match="is closed"):
            connection.receive()


def test_another_magic_is_no_frame() -> None:
    lengths = struct.pack("<4sIQI", b"wlax", 2, 0, crc32c(b"{}"))
    with raw_pair() as (raw, connection):
        raw.sendall(lengths + struct.pack("<I", crc32c(lengths)) + b"{}")
        with pytest.raises(TransportError, match="damaged"):
            connection.receive()


# Peers that stop


def test_both_ends_have_the_idle_timeout_once_the_handshake_is_over() -> None:
    with pair() as (here, there):
        assert here._socket.gettimeout() == there._socket.gettimeout() == connection_module.IDLE_S


@pytest.mark.slow
def test_a_peer_that_does_not_read_makes_the_sender_wait() -> None:
    data = np.arange(LARGER_THAN_BUFFERS // 8)
    with pair() as (here, there):
        done = threading.Event()

        def send() -> None:
            here.send({}, data)
            done.set()

        sender = threading.Thread(target=send)
        sender.start()
        _, num_bytes = there.receive()
        buffer = np.empty(num_bytes // 8, np.int64)
        there.receive_into(buffer.view(np.uint8).data[: 64 << 20])
        assert not done.is_set()  # the rest fits no buffer
        there.receive_into(buffer.view(np.uint8).data[64 << 20 :])
        sender.join()
        assert done.is_set() and np.array_equal(buffer, data)


def test_a_peer_that_does_not_read_is_given_up() -> None:
    with pair() as (here, there):
        here.settimeout(SOON_S)
        with pytest.raises(TransportError, match=f"has stopped: nothing moved for {SOON_S} s"):
            here.send({}, bytearray(LARGER_THAN_BUFFERS))
        assert here.is_closed
        there.receive()
        with pytest.raises(TransportError, match="within a frame"):
            there.receive_into(memoryview(bytearray(LARGER_THAN_BUFFERS)))


@pytest.mark.parametrize("sent", [b"", bytes_of_frame({"a": 1}, b"data")[:10], bytes_of_frame({"a": 1}, b"data")[:-1]])
def test_a_peer_that_says_no_more_is_given_up(sent: bytes) -> None:
    with raw_pair() as (raw, connection):
        connection.settimeout(SOON_S)
        raw.sendall(sent)
        with pytest.raises(TransportError, match="has stopped"):
            connection.receive()
            connection.skip(4)
        assert connection.is_closed


@pytest.mark.slow
def test_the_wait_for_a_frame_has_a_limit_of_its_own() -> None:
    with raw_pair() as (_, connection), pytest.raises(TransportError, match=f"no frame came within {SOON_S} s"):
        connection.receive(SOON_S)
    with raw_pair() as (raw, connection):
        connection.settimeout(SOON_S)
        later = threading.Timer(3 * SOON_S, raw.sendall, args=(bytes_of_frame({"a": 1}),))
        later.start()
        assert connection.receive(math.inf) == ({"a": 1}, 0)
        later.join()


@pytest.mark.slow
def test_a_stopped_process_is_given_up() -> None:
    program = (
        "import math, sys\n"
        "from windlass.checkpoint.net.transport import connect\n"
        f"connection = connect(('127.0.0.1', int(sys.argv[1])), {SECRET!r}, timeout_s={LATE_S})\n"
        "connection.send({})\n"
        "connection.receive(math.inf)\n"
    )
    with (
        accepting() as (listener, accepted),
        subprocess.Popen([sys.executable, "-c", program, str(listener.address[1])]) as process,
    ):
        connection = accepted.get()
        connection.receive()
        process.send_signal(signal.SIGSTOP)
        try:
            connection.settimeout(SOON_S)
            with pytest.raises(TransportError, match="has stopped"):
                connection.send({}, bytearray(LARGER_THAN_BUFFERS))
        finally:
            process.kill()


@pytest.mark.parametrize("operation", ["receive", "receive(inf)", "receive_into", "send"])
def test_closing_wakes_whoever_waits(operation: str) -> None:
    with raw_pair() as (raw, connection):
        connection.settimeout(None)
        if operation == "receive_into":
            raw.sendall(bytes_of_frame({}, b"data")[:-1])
            connection.receive()
        actions = {
            "receive": connection.receive,
            "receive(inf)": lambda: connection.receive(math.inf),
            "receive_into": lambda: connection.receive_into(memoryview(bytearray(4))),
            "send": lambda: connection.send({}, bytearray(LARGER_THAN_BUFFERS)),
        }
        errors: list[Exception] = []

        def wait() -> None:
            try:
                actions[operation]()
            except TransportError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: connection._num_users == 1)
        time.sleep(0.05)  # into the system call, most likely; right either way
        connection.close()
        waiting.join()
        assert len(errors) == 1 and "is closed" in str(errors[0])
        assert connection._socket.fileno() == -1
