"""Shards come back to the byte, whichever are lost, whatever computes, wherever they lie."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass import isal
from windlass.checkpoint.codec import erasure
from windlass.checkpoint.codec.erasure import ENGINES, MAX_SHARDS, Codec, parity_matrix

needs_isal = pytest.mark.skipif(isal.load() is None, reason="no ISA-L here")
engines = pytest.mark.parametrize("engine", ["torch", pytest.param("isa-l", marks=needs_isal)])
LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([4095, 32 << 10, (32 << 10) + 7, 100_003]))


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def aligned(count: int, length: int) -> np.ndarray:
    """(count, length) uint8, each row at a multiple of 64 bytes."""
    row_bytes = -(-length // 64) * 64
    return np.frombuffer(mmap.mmap(-1, count * row_bytes), np.uint8).reshape(count, row_bytes)[:, :length]


def encoded(codec: Codec, data: np.ndarray) -> np.ndarray:
    """(k + m, length): the data and its parity, whose buffers held something else before."""
    parity = random_bytes(codec.num_parity_shards, data.shape[1], seed=99)
    codec.encode(list(data), list(parity))
    return np.concatenate([data, parity])


def slow_product(left: int, right: int) -> int:
    """In GF(2^8), as one would on paper."""
    product = 0
    for bit in range(8):
        if right >> bit & 1:
            product ^= left << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


def test_on_linux_the_library_is_there() -> None:
    if sys.platform == "linux":
        assert isal.load() is not None and Codec(4, 2).engine == "isa-l"


@engines
def test_parity_is_what_the_matrix_says(engine: str) -> None:
    data = random_bytes(5, 41)
    matrix = parity_matrix(5, 3)
    expected = np.zeros((3, 41), np.uint8)
    for r, j, i in np.ndindex(3, 5, 41):
        expected[r, i] ^= slow_product(int(matrix[r, j]), int(data[j, i]))
    assert np.array_equal(encoded(Codec(5, 3, engine), data)[5:], expected)


@needs_isal
def test_the_matrix_is_isals_cauchy_matrix_with_scaled_columns() -> None:
    library = isal.load()
    assert library is not None
    library.gf_mul.argtypes, library.gf_mul.restype = [ctypes.c_ubyte] * 2, ctypes.c_ubyte
    for k, m in ((1, 1), (4, 2), (7, 9), (200, 55)):
        theirs = (ctypes.c_ubyte * ((k + m) * k))()
        library.gf_gen_cauchy1_matrix(theirs, k + m, k)
        cauchy = np.array(theirs, np.uint8).reshape(k + m, k)[k:]
        mine = parity_matrix(k, m)
        for r, j in itertools.product(range(m), range(k)):
            assert library.gf_mul(int(mine[r, j]), int(cauchy[0, j])) == cauchy[r, j]


@engines
@pytest.mark.parametrize("num_parity", [1, 2, 4])
def test_the_first_parity_is_the_xor_of_the_data(engine: str, num_parity: int) -> None:
    data = random_bytes(6, 70_001)
    assert np.array_equal(encoded(Codec(6, num_parity, engine), data)[6], np.bitwise_xor.reduce(data))


@pytest.mark.slow
@needs_isal
@settings(max_examples=150, deadline=None)
@given(k=st.integers(1, 20), m=st.integers(1, 9), length=LENGTHS, seed=st.integers(0, 2**32), pick=st.data())
def test_any_m_lost_shards_come_back_and_both_engines_agree(
    k: int, m: int, length: int, seed: int, pick: st.DataObject
) -> None:
    lost = pick.draw(st.lists(st.integers(0, k + m - 1), max_size=m, unique=True), label="lost")
    asked = pick.draw(st.lists(st.sampled_from(lost), unique=True) if lost else st.just([]), label="asked for")
    data = random_bytes(k, length, seed=seed)
    whole = {engine: encoded(Codec(k, m, engine), data) for engine in ENGINES}
    assert np.array_equal(whole["isa-l"], whole["torch"])
    for engine, shards in whole.items():
        left = {i: bytes(shards[i]) for i in range(k + m) if i not in lost}
        restored = {i: bytearray(b"\xa5" * length) for i in asked}
        Codec(k, m, engine).reconstruct(left, restored)
        for i, shard in restored.items():
            assert shard == shards[i].tobytes(), (engine, i)


@engines
def test_every_pattern_of_a_small_code(engine: str) -> None:
    """Also one at a time, where XOR might be used that is not meant: aligned, a single target."""
    k, m = 4, 3
    codec = Codec(k, m, engine)
    shards, room = aligned(k + m, 67), aligned(m, 67)
    shards[:] = encoded(codec, random_bytes(k, 67))
    for lost in itertools.combinations(range(k + m), m):
        left = {i: shards[i] for i in range(k + m) if i not in lost}
        for asked in (lost, *[(i,) for i in lost]):
            room[:] = 0
            restored = dict(zip(asked, room, strict=False))
            codec.reconstruct(left, restored)
            assert all(np.array_equal(restored[i], shards[i]) for i in asked), (lost, asked)


@pytest.mark.slow
@engines
@pytest.mark.parametrize(("k", "m"), [(1, 254), (254, 1), (128, 127), (250, 5)])
def test_codes_as_large_as_they_may_be(engine: str, k: int, m: int) -> None:
    codec = Codec(k, m, engine)
    shards = encoded(codec, random_bytes(k, 65))
    lost = np.random.default_rng(1).choice(k + m, m, replace=False).tolist()
    restored = {i: bytearray(65) for i in lost}
    codec.reconstruct({i: shards[i] for i in range(k + m) if i not in lost}, restored)
    assert all(restored[i] == shards[i].tobytes() for i in lost)


@engines
@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 6), m=st.integers(1, 7), length=LENGTHS, start=st.booleans(), order=st.randoms())
def test_shard_by_shard_is_all_at_once(engine: str, k: int, m: int, length: int, start: bool, order) -> None:
    codec = Codec(k, m, engine)
    data = random_bytes(k, length, seed=7)
    parity = random_bytes(m, length, seed=8) if start else np.zeros((m, length), np.uint8)
    arrivals = list(range(k))
    order.shuffle(arrivals)
    for number, index in enumerate(arrivals):
        codec.encode_update(index, data[index], list(parity), first=start and number == 0)
    assert np.array_equal(parity, encoded(codec, data)[k:])


@engines
def test_slices_of_shards_are_coded_on_their_own(engine: str) -> None:
    codec = Codec(3, 2, engine)
    data = random_bytes(3, 1000)
    parity = np.zeros((2, 1000), np.uint8)
    for part in (slice(0, 333), slice(333, 900), slice(900, 1000)):
        codec.encode([shard[part] for shard in data], [shard[part] for shard in parity])
    assert np.array_equal(parity, encoded(codec, data)[3:])


@engines
@pytest.mark.parametrize("num_parity", [1, 2])
def test_buffers_at_any_address_and_nothing_beside_them(
    engine: str, num_parity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, length, gap = 3, 9001, 64
    codec = Codec(k, num_parity, engine)
    data = random_bytes(k, length)
    expected = encoded(codec, data)[k:]
    xored = 0
    if engine == "isa-l":
        really_xor = codec._engine._xor

        def counted_xor(places: list[int], size: int) -> bool:
            nonlocal xored
            xored += 1
            return really_xor(places, size)

        monkeypatch.setattr(codec._engine, "_xor", counted_xor)
    for shift in (0, 1, 8, 17, 31, 32, 63):
        memory = aligned(k + num_parity, length + 2 * gap + 64)
        memory[:] = 0xEE
        offsets = [gap + (shift + row) % 64 if shift % 32 else gap + shift for row in range(k + num_parity)]
        places = [row[offset : offset + length] for row, offset in zip(memory, offsets, strict=True)]
        for place, shard in zip(places[:k], data, strict=True):
            place[:] = shard
        codec.encode(places[:k], places[k:])
        assert np.array_equal(np.stack(places[k:]), expected), shift
        for row, offset in zip(memory, offsets, strict=True):
            assert (row[:offset] == 0xEE).all() and (row[offset + length :] == 0xEE).all(), shift
    assert xored == (2 if engine == "isa-l" and num_parity == 1 else 0)  # shifts of 0 and 32: aligned


@engines
def test_lengths_around_a_block(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_WORKING_BYTES", 0)  # the smallest block, 64 KiB
    for m, length in itertools.product((1, 2), ((64 << 10) - 1, 64 << 10, (64 << 10) + 1, (192 << 10) + 33)):
        shards = aligned(3 + m, length)  # so that XOR goes block by block as well
        data = shards[:3]
        data[:] = random_bytes(3, length)
        Codec(3, m, engine).encode(list(data), list(shards[3:]))
        assert np.array_equal(shards, encoded(Codec(3, m, engine), data.copy())), length
        assert np.array_equal(shards[3], np.bitwise_xor.reduce(data)), length
        restored = bytearray(length)
        Codec(3, m, engine).reconstruct({0: data[0], 2: data[2], m + 2: shards[m + 2]}, {1: restored})
        assert restored == data[1].tobytes(), length
        parity = [bytearray(length) for _ in range(m)]
        for index, shard in enumerate(data):
            Codec(3, m, engine).encode_update(index, shard, parity)
        assert [bytes(shard) for shard in parity] == [shard.tobytes() for shard in shards[3:]], length


@engines
def test_every_kind_of_memory(engine: str, tmp_path: Path) -> None:
    """Tensors, shared memory, a mapped file, bytes: in place, and all let go of at the end."""
    codec, length = Codec(3, 2, engine), 5000
    data = random_bytes(3, length)
    expected = encoded(codec, data)[3:]
    shm = shared_memory.SharedMemory(create=True, size=length)
    path = tmp_path / "parity"
    path.write_bytes(bytes(length))
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), length) as mapped:
            sources = [torch.from_numpy(data[0]), data[1].tobytes(), memoryview(data[2])]
            shared = shm.buf[:length]
            codec.encode(sources, [shared, mapped])
            assert bytes(shared) == expected[0].tobytes() and mapped[:] == expected[1].tobytes()
            floats = torch.zeros(length // 4, dtype=torch.float32)
            codec.reconstruct({0: sources[0], 3: shared, 4: mapped}, {1: bytearray(length), 2: floats})
            assert floats.view(torch.uint8).numpy().tobytes() == data[2].tobytes()
            shared.release()
        assert path.read_bytes() == expected[1].tobytes()
    finally:
        shm.close()  # BufferError if the codec held on to it
        shm.unlink()


@engines
def test_zero_length(engine: str) -> None:
    codec = Codec(2, 2, engine)
    codec.encode([b"", torch.empty(0, dtype=torch.uint8)], [bytearray(), bytearray()])
    codec.encode_update(0, b"", [bytearray(), bytearray()])
    codec.reconstruct({0: b"", 3: b""}, {1: bytearray(), 2: bytearray()})


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 3), (200, 56), (MAX_SHARDS, 1)])
def test_counts_that_cannot_be(k: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{k} data and {m} parity shards"):
        Codec(k, m)


def shard(length: int = 8) -> bytearray:
    return bytearray(length)


@engines
def test_mistakes_are_refused(engine: str) -> None:
    codec = Codec(2, 2, engine)
    two = [shard(), shard()]
    for fault, act in {
        "1 data shards were given where there are 2": lambda: codec.encode([shard()], two),
        "3 parity shards were given where there are 2": lambda: codec.encode(two, [shard(), shard(), shard()]),
        r"same length: they have \[8, 9\]": lambda: codec.encode([shard(), shard(9)], [shard(), shard()]),
        r"same length: they have \[7, 8\]": lambda: codec.encode(two, [shard(), shard(7)]),
        "same length": lambda: codec.encode_update(0, shard(0), two),
        "parity 1 is read-only": lambda: codec.encode(two, [shard(), bytes(8)]),
        "data 1 must be contiguous": lambda: codec.encode([shard(), memoryview(shard(16))[::2]], two),
        "data 0 must be a contiguous tensor": lambda: codec.encode([torch.zeros(16)[::2], shard()], two),
        "shares memory": lambda: codec.encode(two, [shard(), two[0]]),
        "there is no data shard 2 of 2": lambda: codec.encode_update(2, shard(), two),
        "1 shards are left where 2": lambda: codec.reconstruct({0: shard()}, {1: shard(), 2: shard(), 3: shard()}),
        r"there are no shards \[-1, 4\]": lambda: codec.reconstruct({-1: shard(), 0: shard()}, {4: shard()}),
        r"shards \[1\] are both": lambda: codec.reconstruct({0: shard(), 1: shard()}, {1: shard()}),
        r"same length: they have \[8, 10\]": lambda: codec.reconstruct({0: shard(), 2: shard()}, {1: shard(10)}),
    }.items():
        with pytest.raises(ValueError, match=fault):
            act()
    with pytest.raises(ValueError, match="shares memory"):  # not at the same begin
        memory = memoryview(shard(12))
        codec.encode([memory[4:12], shard()], [memory[:8], shard()])
    with pytest.raises(TypeError):
        codec.encode([1.5, shard()], two)  # pyrefly: ignore


@engines
def test_more_than_m_missing_are_refused_and_left_alone(engine: str) -> None:
    codec = Codec(4, 2, engine)
    shards = encoded(codec, random_bytes(4, 10))
    for lost in itertools.combinations(range(6), 3):
        buffers = {i: bytearray(b"\x11" * 10) for i in lost}
        with pytest.raises(ValueError, match="3 shards are left where 4 are needed"):
            codec.reconstruct({i: shards[i] for i in range(6) if i not in lost}, buffers)
        assert all(buffer == b"\x11" * 10 for buffer in buffers.values())


def test_without_the_library_torch_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure.isal, "load", lambda: None)
    assert Codec(4, 2).engine == "torch"
    with pytest.raises(ValueError, match="pip install pyeclib"):
        Codec(4, 2, "isa-l")


def test_engines_are_chosen_by_name() -> None:
    assert Codec(4, 2, "torch").engine == "torch"
    with pytest.raises(ValueError, match="'numpy': there are isa-l, torch"):
        Codec(4, 2, "numpy")


def test_a_library_that_is_too_old_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal.ctypes, "CDLL", lambda path: SimpleNamespace(ec_init_tables=SimpleNamespace()))
    assert isal.load.__wrapped__() is None


def test_a_library_of_the_system_serves_where_there_is_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(path: str) -> None:
        tried.append(path)
        raise OSError("not there")

    monkeypatch.setattr(isal, "find_spec", lambda name: None)
    monkeypatch.setattr(isal.ctypes, "CDLL", refuse)
    assert isal.load.__wrapped__() is None
    assert "libisal.so.2" in tried


@needs_isal
def test_a_refusal_to_xor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(3, 1, "isa-l")
    data = random_bytes(3, 640)
    monkeypatch.setattr(codec._engine, "_xor", lambda places, size: False)
    assert np.array_equal(encoded(codec, data)[3], np.bitwise_xor.reduce(data))
