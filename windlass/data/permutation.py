"""A random order of any number of samples in no memory: a Feistel network with cycle walking. Torch-free.

Luby and Rackoff, How to Construct Pseudorandom Permutations from Pseudorandom Functions, 1988; Black and
Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
"""

from __future__ import annotations

import numpy as np

NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(positions: np.ndarray, size: int, seed: int, epochs: np.ndarray | int = 0) -> np.ndarray:
    """Maps `positions` by the random permutation of range(size) of `seed` and the epoch.

    Args:
        positions: integers [n] in [0, size).
        epochs: integers [n] or one; each epoch has a permutation of its own.

    Returns:
        int64 [n].
    """
    values = np.asarray(positions, dtype=np.uint64)
    assert size >= 1 and (values < size).all(), "positions must be below size"
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, np.broadcast_to(np.asarray(epochs, dtype=np.uint64), values.shape))
    values = _encrypt(values, keys, half_bits)
    # The network permutes [0, 4 ** half_bits), up to 4 times too many: who lands outside walks on until
    # inside.
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _encrypt(values[outside], keys[:, outside], half_bits)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


def _encrypt(values: np.ndarray, keys: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    """A permutation of [0, 4 ** half_bits) for each column of `keys`, uint64 [NUM_ROUNDS, n]."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _round_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """uint64 [NUM_ROUNDS, n] for `epochs` [n]."""
    unique, inverse = np.unique(epochs, return_inverse=True)
    of_epoch = _mix(_mix(np.uint64(seed % 2**64) + _GOLDEN * np.ones_like(unique)) ^ unique)
    rounds = np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64)[:, None]
    return _mix(of_epoch[None] + rounds * _GOLDEN)[:, inverse]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Fast Splittable Pseudorandom Number Generators, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
