"""Reed-Solomon erasure coding: k data shards, m parity shards, and any k of the k + m give back the others.

The code is systematic (the data stays as it is) over GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1. Its matrix
is a Cauchy matrix (Bloemer et al. 1995, "An XOR-Based Erasure-Resilient Coding Scheme") whose columns are scaled so
that the first row is all ones. Every square part of it stays invertible, and the first parity shard of every code is
the XOR of the data: m = 1 is plain XOR, and with any m so is the repair of a single lost data shard.

Shards are bytes at addresses, and byte i of every shard depends on byte i of the others only. So any range of bytes may
be encoded or repaired on its own: whoever must not be kept long passes slices.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from windlass import isal

if TYPE_CHECKING:
    from windlass.isal import Memory

MAX_SHARDS = 255
ENGINES = ("isa-l", "torch")

POLYNOMIAL = 0x11D
_WORKING_BYTES = 6 << 20
"""Touched at once, all shards together: with more than 6 targets ISA-L reads the sources again, from a cache."""


class Codec:
    """Encodes and repairs shards in memory, without copies. Safe to use from several threads.

    Args:
        num_data_shards: k, at least 1.
        num_parity_shards: m, at least 1; k + m <= 255.
        engine: "isa-l", "torch", or None for ISA-L where it can be loaded and torch elsewhere. Both give the same
            bytes; for m = 2 torch takes some 25 times as long.

    Raises:
        ValueError: other counts, an engine of another name, or "isa-l" where it cannot be loaded.
    """

    def __init__(self, num_data_shards: int, num_parity_shards: int, engine: str | None = None) -> None:
        if num_data_shards < 1 or num_parity_shards < 1 or num_data_shards + num_parity_shards > MAX_SHARDS:
            raise ValueError(
                f"{num_data_shards} data and {num_parity_shards} parity shards: there must be at least 1 of each "
                f"and at most {MAX_SHARDS} together"
            )
        self.num_data_shards, self.num_parity_shards = num_data_shards, num_parity_shards
        self._engine = _engine(engine)
        self._parity_rows = parity_matrix(num_data_shards, num_parity_shards)

    @property
    def engine(self) -> str:
        """The library that computes: "isa-l" or "torch"."""
        return self._engine.name

    def encode(self, data: Sequence[Memory], parity: Sequence[Memory]) -> None:
        """Fills the `parity` shards from the `data` shards.

        Args:
            data: k buffers of the same length, any number of bytes.
            parity: m writable buffers of that length, apart from each other and from the data.

        Raises:
            ValueError: other numbers of buffers, lengths that differ, or memory that cannot be used so.
        """
        self._require_count("data", len(data), self.num_data_shards)
        self._require_count("parity", len(parity), self.num_parity_shards)
        sources = _arrays(dict(enumerate(data)), "data")
        targets = _arrays(dict(enumerate(parity)), "parity", writable=True)
        _require_apart(sources, targets)
        self._engine.multiply(self._parity_rows, sources, targets)

    def encode_update(self, index: int, data: Memory, parity: Sequence[Memory], first: bool = False) -> None:
        """Adds data shard `index` to `parity`, which after all k of them, in any order, is what `encode` gives.

        Args:
            index: which data shard it is, from 0. Adding a shard twice takes it out again.
            data: a buffer.
            parity: m writable buffers of its length. Zeros before the first shard is added, unless it is said to be:
            first: whatever was in `parity` is written over, which also is faster than to zero it.

        Raises:
            ValueError: as `encode`, or there is no such data shard.
        """
        if not 0 <= index < self.num_data_shards:
            raise ValueError(f"there is no data shard {index} of {self.num_data_shards}")
        self._require_count("parity", len(parity), self.num_parity_shards)
        source = _arrays({index: data}, "data")
        targets = _arrays(dict(enumerate(parity)), "parity", writable=True)
        _require_apart(source, targets)
        coefficients = self._parity_rows[:, index : index + 1]
        if first:
            self._engine.multiply(coefficients, source, targets)
        else:
            self._engine.add(coefficients, source[0], targets)

    def add(self, row: int, index: int, data: Memory, parity: Memory, first: bool = False) -> None:
        """`encode_update` of one parity shard, for who keeps that one only.

        Args:
            row: which parity shard it is, from 0.

        Raises:
            ValueError: as `encode_update`.
        """
        if not 0 <= index < self.num_data_shards or not 0 <= row < self.num_parity_shards:
            raise ValueError(f"there is no data shard {index} of {self.num_data_shards}, or no parity {row}")
        source, target = _arrays({index: data}, "data"), _arrays({row: parity}, "parity", writable=True)
        _require_apart(source, target)
        coefficients = self._parity_rows[row : row + 1, index : index + 1]
        if first:
            self._engine.multiply(coefficients, source, target)
        else:
            self._engine.add(coefficients, source[0], target)

    def is_copy(self, row: int) -> bool:
        """True if parity `row` is data shard 0 itself: a mirror."""
        return self.num_data_shards == 1 and int(self._parity_rows[row, 0]) == 1

    def reconstruct(self, shards: Mapping[int, Memory], missing: Mapping[int, Memory]) -> None:
        """Restores lost shards from those that are left.

        Args:
            shards: what is left, at least k of them: data shards are 0..k-1, parity shards k..k+m-1.
            missing: those to restore, and the writable buffers to fill. Shards in neither are lost and not asked for.

        Raises:
            ValueError: fewer than k are left, a shard does not exist or is in both, or as `encode`.
        """
        num_shards = self.num_data_shards + self.num_parity_shards
        strangers = sorted(index for index in {*shards, *missing} if not 0 <= index < num_shards)
        if strangers:
            raise ValueError(f"there are no shards {strangers} of {num_shards}")
        if both := sorted(shards.keys() & missing.keys()):
            raise ValueError(f"shards {both} are both there and missing")
        if len(shards) < self.num_data_shards:
            raise ValueError(f"{len(shards)} shards are left where {self.num_data_shards} are needed")
        used = tuple(sorted(shards)[: self.num_data_shards])  # data before parity, and the parity that is XOR first
        wanted = tuple(sorted(missing))
        sources = _arrays({index: shards[index] for index in used}, "shard")
        targets = _arrays({index: missing[index] for index in wanted}, "shard", writable=True)
        _require_apart(sources, targets)
        if wanted:
            self._engine.multiply(_repair_matrix(self.num_data_shards, num_shards, used, wanted), sources, targets)

    def _require_count(self, kind: str, found: int, expected: int) -> None:
        if found != expected:
            raise ValueError(f"{found} {kind} shards were given where there are {expected}")


def _arrays(shards: Mapping[int, Memory], kind: str, writable: bool = False) -> list[np.ndarray]:
    return [isal.byte_array(shard, f"{kind} {index}", writable) for index, shard in shards.items()]


def _require_apart(sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
    """Raises ValueError unless all have one length and nothing is written that is read or written elsewhere."""
    lengths = {array.size for array in [*sources, *targets]}
    if len(lengths) > 1:
        raise ValueError(f"shards must have the same length: they have {sorted(lengths)} bytes")
    if lengths == {0}:
        return
    starts = sorted([(isal.address(array), False) for array in sources] + [(isal.address(a), True) for a in targets])
    length = sources[0].size
    for (start, written), (next_start, next_written) in itertools.pairwise(starts):
        if next_start < start + length and (written or next_written):
            raise ValueError("a shard that is written shares memory with another")


# --- The field and its matrices. ---


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """The powers of 2 (x), repeated so that two logarithms can be added, and the logarithms of 1..255."""
    powers, logarithms = np.zeros(510, np.uint8), np.zeros(256, np.int64)
    value = 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logarithms[value] = exponent
        value = value << 1 ^ (POLYNOMIAL if value & 0x80 else 0)
    return powers, logarithms


def gf_multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The products in GF(2^8), element by element: uint8 of any shapes that broadcast."""
    powers, logarithms = _powers()
    products = powers[logarithms[left] + logarithms[right]]
    return np.where((left == 0) | (right == 0), np.uint8(0), products)


def gf_inverse(values: np.ndarray) -> np.ndarray:
    """1 / values in GF(2^8), none of them 0."""
    powers, logarithms = _powers()
    return powers[255 - logarithms[values]]


def _matrix_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(a, b) x (b, c) -> (a, c) over GF(2^8)."""
    product = np.zeros((left.shape[0], right.shape[1]), np.uint8)
    for column, row in zip(left.T, right, strict=True):
        product ^= gf_multiply(column[:, None], row[None, :])
    return product


def _matrix_inverse(matrix: np.ndarray) -> np.ndarray:
    """The inverse of an (n, n) part of a parity matrix, by Gauss-Jordan elimination.

    Without a search for pivots: the leading parts of such a matrix are invertible too, so none is ever 0.
    """
    size = len(matrix)
    both = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        both[column] = gf_multiply(both[column], gf_inverse(both[column, column]))
        others = both[:, column].copy()
        others[column] = 0
        both ^= gf_multiply(others[:, None], both[column][None, :])
    return both[:, size:]


@functools.cache
def parity_matrix(num_data_shards: int, num_parity_shards: int) -> np.ndarray:
    """(m, k) uint8, read-only: parity r is the sum over j of element (r, j) times data j.

    Element (r, j) is (k ^ j) / ((k + r) ^ j): the matrix 1 / ((k + r) ^ j), its columns over their first element.
    """
    row = np.arange(num_parity_shards, dtype=np.uint8)[:, None]
    column = np.arange(num_data_shards, dtype=np.uint8)[None, :]
    k = np.uint8(num_data_shards)
    matrix = gf_multiply(k ^ column, gf_inverse((k + row) ^ column))
    matrix.flags.writeable = False
    return matrix


@functools.lru_cache(maxsize=256)
def _repair_matrix(num_data_shards: int, num_shards: int, used: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """(len(wanted), k) uint8: the shards `wanted` from the k shards `used`, both sorted."""
    parity = parity_matrix(num_data_shards, num_shards - num_data_shards)
    known = [index for index in used if index < num_data_shards]
    rows = [index - num_data_shards for index in used if index >= num_data_shards]
    lost = sorted(set(range(num_data_shards)) - set(known))
    # As many parity shards are used as data shards are lost: parity[rows] = A known + B lost, solved for the lost.
    data = np.zeros((num_data_shards, num_data_shards), np.uint8)  # every data shard from the used ones
    data[known, range(len(known))] = 1
    if lost:
        solution = _matrix_inverse(parity[np.ix_(rows, lost)])
        data[lost, : len(known)] = _matrix_product(solution, parity[np.ix_(rows, known)])
        data[lost, len(known) :] = solution
    repair = np.empty((len(wanted), num_data_shards), np.uint8)
    for target, index in zip(repair, wanted, strict=True):
        is_data = index < num_data_shards
        target[:] = data[index] if is_data else _matrix_product(parity[[index - num_data_shards]], data)[0]
    repair.flags.writeable = False
    return repair


# --- What computes. ---


class _Engine(Protocol):
    """Sums of products of shards: arrays of bytes, all of one length, whose outputs share no memory with others."""

    name: str

    def multiply(self, coefficients: np.ndarray, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        """targets[r] = the sum over j of coefficients[r, j] * sources[j]."""

    def add(self, coefficients: np.ndarray, source: np.ndarray, targets: list[np.ndarray]) -> None:
        """targets[r] += coefficients[r, 0] * source."""


def _engine(name: str | None) -> _Engine:
    if name not in (None, *ENGINES):
        raise ValueError(f"engine={name!r}: there are {', '.join(ENGINES)}")
    library = isal.load() if name != "torch" else None
    if library is not None:
        return _IsalEngine(library)
    if name == "isa-l":
        raise ValueError(f"engine='isa-l': ISA-L cannot be loaded. Fix: {isal.FIX}")
    # Late: agents, which have ISA-L, do not wait for torch, nor hold its memory.
    from windlass.checkpoint.codec.erasure_torch import TorchEngine

    return TorchEngine(POLYNOMIAL)


class _IsalEngine:
    name = "isa-l"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._tables = functools.lru_cache(maxsize=256)(self._make_tables)

    def _make_tables(self, rows: int, columns: int, coefficients: bytes) -> ctypes.Array[ctypes.c_ubyte]:
        tables = (ctypes.c_ubyte * (32 * rows * columns))()
        self._library.ec_init_tables(columns, rows, coefficients, tables)
        return tables

    def multiply(self, coefficients: np.ndarray, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        rows, columns = coefficients.shape
        tables = self._tables(rows, columns, coefficients.tobytes())
        inputs, outputs = [isal.address(a) for a in sources], [isal.address(a) for a in targets]
        length, done = targets[0].size, 0
        aligned = all(place % isal.XOR_ALIGNMENT == 0 for place in inputs + outputs)
        may_xor = rows == 1 and columns > 1 and aligned and bool((coefficients == 1).all())
        block = _block_bytes(rows + columns)
        while done < length:
            size = min(block, length - done)
            whole = size - size % isal.XOR_ALIGNMENT
            if may_xor and whole and self._xor([place + done for place in inputs + outputs], whole):
                done += whole  # a tail comes back here as a block too short for it
                continue
            self._library.ec_encode_data(size, columns, rows, tables, _pointers(inputs, done), _pointers(outputs, done))
            done += size

    def _xor(self, places: list[int], size: int) -> bool:
        return self._library.xor_gen(len(places), size, _pointers(places, 0)) == 0

    def add(self, coefficients: np.ndarray, source: np.ndarray, targets: list[np.ndarray]) -> None:
        rows = len(coefficients)
        tables = self._tables(rows, 1, coefficients.tobytes())
        begin, outputs = isal.address(source), [isal.address(a) for a in targets]
        block = _block_bytes(rows + 1)
        for done in range(0, source.size, block):
            size = min(block, source.size - done)
            self._library.ec_encode_data_update(size, 1, rows, 0, tables, begin + done, _pointers(outputs, done))


def _pointers(places: list[int], offset: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(places))(*[place + offset for place in places])


def _block_bytes(num_shards: int) -> int:
    """The bytes of a shard that are computed at a time: whole pages, so that aligned shards stay so."""
    return max(16, _WORKING_BYTES // num_shards // 4096) * 4096
