"""CRC32C: the published values, any cut, and no flipped bit missed."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass import checksum, isal
from windlass.checksum import crc32c


@pytest.fixture(params=["isa-l", "package"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "package":
        pytest.importorskip("crc32c")
        monkeypatch.setattr(isal, "load", lambda: None)
    elif isal.load() is None:
        pytest.skip("no ISA-L here")
    yield request.param


def slow_crc32c(data: bytes) -> int:
    """A bit at a time, as the standard (RFC 3720, appendix B.4) defines it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values(engine: str, data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=600), cuts=st.lists(st.integers(0, 600), max_size=3))
def test_any_bytes_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    expected = slow_crc32c(data)
    assert crc32c(data) == expected
    value = 0
    edges = [0, *sorted(cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        value = crc32c(data[begin:end], value)
    assert value == slow_crc32c(b"".join(data[a:b] for a, b in itertools.pairwise(edges)))


def test_every_kind_of_memory_at_any_address(engine: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    expected = slow_crc32c(data.tobytes())
    assert crc32c(torch.from_numpy(data)) == crc32c(memoryview(data)) == crc32c(bytearray(data)) == expected
    assert crc32c(torch.from_numpy(data).view(torch.float32)) == expected
    for shift in (1, 7, 33):
        assert crc32c(data[shift:]) == slow_crc32c(data[shift:].tobytes())


def test_memory_longer_than_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_CALL_BYTES", 100)
    assert crc32c(bytes(range(250))) == slow_crc32c(bytes(range(250)))


def test_each_of_a_thousand_flipped_bits_is_found(engine: str) -> None:
    chance = random.Random(0)
    data = bytearray(chance.randbytes(1 << 16))
    right = crc32c(data)
    for _ in range(1000):
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != right
        data[bit // 8] ^= 1 << bit % 8
    assert crc32c(data) == right


def test_memory_that_is_in_pieces_is_refused(engine: str) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(memoryview(bytes(8))[::2])
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(torch.zeros(8)[::2])


def test_with_nothing_to_compute_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "load", lambda: None)
    monkeypatch.setitem(sys.modules, "crc32c", None)
    with pytest.raises(RuntimeError, match="pip install pyeclib"):
        crc32c(b"1")
