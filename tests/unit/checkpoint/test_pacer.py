"""The pacer's own arithmetic, on a clock that only sleeping moves."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_helpers import tcp_pair

from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.pacer import BURST_S, SLICE_BYTES, Pacer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.naps.append(seconds)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(1e3, 1e10),
    takes=st.lists(st.tuples(st.integers(1, SLICE_BYTES), st.floats(0, 2)), min_size=1, max_size=40),
)
def test_no_interval_has_more_than_the_rate_and_one_burst(rate: float, takes: list[tuple[int, float]]) -> None:
    clock = Clock()
    pacer = Pacer(rate, clock, clock.sleep)
    passed: list[tuple[float, int]] = []
    for num_bytes, pause in takes:
        clock.now += pause
        pacer.take(num_bytes)
        passed.append((clock.now, num_bytes))
    for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
        seconds = passed[last][0] - passed[first][0]
        num_bytes = sum(count for _, count in passed[first:last])  # the slice that begins at the end is on its way
        assert num_bytes <= rate * (seconds + BURST_S) * (1 + 1e-6) + 1


def test_a_busy_sender_gets_the_whole_rate() -> None:
    clock = Clock()
    pacer = Pacer(10e6, clock, clock.sleep)
    start = clock.now
    for _ in range(1000):
        pacer.take(100_000)
    assert clock.now - start == pytest.approx(1000 * 100_000 / 10e6 - BURST_S - 100_000 / 10e6)


def test_a_long_pause_saves_up_no_more_than_a_burst() -> None:
    clock = Clock()
    pacer = Pacer(1e6, clock, clock.sleep)
    clock.now += 3600
    burst = int(1e6 * BURST_S)
    pacer.take(burst)
    assert clock.naps == []
    pacer.take(1)  # begins as the burst ends
    pacer.take(1)
    assert clock.naps == [pytest.approx(1e-6, abs=1e-9)]


def test_connections_share_the_rate() -> None:
    """Each waits behind what the others have taken, whoever they are."""
    clock = Clock()
    naps: list[float] = []
    pacer = Pacer(1e6, clock, naps.append)  # all come at the same moment
    threads = [threading.Thread(target=pacer.take, args=(100_000,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(naps) == pytest.approx([i * 0.1 - BURST_S for i in range(1, 10)])


def test_without_a_rate_nothing_waits() -> None:
    clock = Clock()
    pacer = Pacer(None, clock, clock.sleep)
    for _ in range(100):
        pacer.take(1 << 40)
    assert clock.naps == []


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_must_be_above_zero(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pacer(rate)


@pytest.mark.parametrize(("rate", "expected"), [(None, SLICE_BYTES), (1e12, SLICE_BYTES), (1e6, 50_000), (1.0, 4096)])
def test_slices_fit_the_rate(rate: float | None, expected: int) -> None:
    assert Pacer(rate).slice_bytes == expected


def test_a_connection_takes_all_that_it_sends_in_slices() -> None:
    clock = Clock()
    pacer = Pacer(1e6, clock, clock.sleep)
    here, there = tcp_pair()
    with Connection(here, "peer", pacer) as sender, Connection(there, "peer") as receiver:
        start = clock.now
        sender.send({"a": 1}, bytes(120_000))
        header, num_bytes = receiver.receive()
        buffer = bytearray(num_bytes)
        receiver.receive_into(memoryview(buffer))
        assert header == {"a": 1} and num_bytes == 120_000
    # The head and the first slice go in the burst and on credit; the others wait for those before them.
    assert len(clock.naps) == 2
    head_bytes = 24 + len('{"a":1}')
    assert clock.now - start == pytest.approx((head_bytes + 100_000) / 1e6 - BURST_S)
