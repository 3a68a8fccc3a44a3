"""Parity as it arrives: whatever the order and the threads, it is what `Codec.encode` makes of the whole."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.agents import shared_memory

from windlass.checkpoint.agent.encoding import Encoding
from windlass.checkpoint.agent.header import Header, Region
from windlass.checkpoint.agent.ledger import Phase, SnapshotId
from windlass.checkpoint.agent.progress import Progress
from windlass.checkpoint.agent.slots import SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.codec.erasure import Codec
from windlass.checksum import crc32c

SNAPSHOT = SnapshotId(1, 1)
SHAPES = [(2, 1), (3, 1), (3, 2), (4, 2), (5, 2), (5, 4), (6, 3)]


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


def begin(shm: Path, stripes: Stripes, position: int, region_bytes: list[int]) -> tuple[SlotFiles, Encoding]:
    regions, offset = [], 0
    for rank, size in enumerate(region_bytes):
        regions.append(Region(position, rank, offset, size))
        offset += -(-size // BLOCK_BYTES) * BLOCK_BYTES
    n, m = stripes.num_nodes, stripes.num_parity_shards
    files = SlotFiles(shm, position)
    files.begin(Header(SNAPSHOT, 1, Phase.writing, position, n, m, stripes.node_bytes, n, "", tuple(regions)))
    return files, Encoding(files.memory)


def add(encoding: Encoding, row: int, chunk: int, block: int, data: np.ndarray) -> bool | None:
    """As a peer's thread does it."""
    mirror = encoding.mirror_block(row, block)
    if mirror is not None:
        mirror[:] = data.data
    return encoding.add_block(row, chunk, block, data.data if mirror is None else mirror, crc32c(data))


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_on_any_threads_gives_the_parity_of_the_whole(n: int, m: int, seed: int, shm: Path) -> None:
    stripes = Stripes(n, m, node_bytes=(n - m) * 3 * BLOCK_BYTES - 5)
    generator, order = np.random.default_rng(seed), random.Random(seed)
    data = generator.integers(0, 256, (n, stripes.num_data_shards, stripes.chunk_bytes), np.uint8)
    position = order.randrange(n)
    files, encoding = begin(shm, stripes, position, [stripes.node_bytes])

    expected = np.zeros((m, stripes.chunk_bytes), np.uint8)
    arrivals = []
    for row in range(m):
        stripe = stripes.stripe_of_parity(position, row)
        shards = [data[stripes.node_of_shard(stripe, chunk), chunk] for chunk in range(n - m)]
        parity = np.zeros((m, stripes.chunk_bytes), np.uint8)
        Codec(n - m, m).encode(shards, list(parity))
        expected[row] = parity[row]
        arrivals += [(row, chunk, block) for chunk in range(n - m) for block in range(stripes.blocks_per_chunk)]
    order.shuffle(arrivals)
    assert files.header is not None
    progress = Progress.begin(files.header, now=0.0)
    assert progress.parity_left == m * stripes.blocks_per_chunk
    assert sum(progress.owed.values()) == len(arrivals)

    def arrive(arrival: tuple[int, int, int]) -> bool:
        row, chunk, block = arrival
        owner = stripes.node_of_shard(stripes.stripe_of_parity(position, row), chunk)
        part = data[owner, chunk, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        return add(encoding, row, chunk, block, part)

    with ThreadPoolExecutor(4) as pool:
        whole = list(pool.map(arrive, arrivals))
    assert sum(whole) == m * stripes.blocks_per_chunk, "each block becomes whole once"
    assert files.parity is not None
    assert bytes(files.parity.view) == expected.tobytes()
    num_data = stripes.data_bytes // BLOCK_BYTES
    assert files.table[num_data:].tolist() == [crc32c(block) for block in expected.reshape(-1, BLOCK_BYTES)]


def test_memory_of_an_older_snapshot_does_not_come_through(shm: Path) -> None:
    stripes = Stripes(3, 1, 2 * BLOCK_BYTES)
    files, _ = begin(shm, stripes, 0, [2 * BLOCK_BYTES])
    assert files.parity is not None
    files.parity.view[:] = b"\xff" * BLOCK_BYTES
    files, encoding = begin(shm, stripes, 0, [2 * BLOCK_BYTES])
    left, right = (np.random.default_rng(side).integers(0, 256, BLOCK_BYTES, np.uint8) for side in (1, 2))
    assert not add(encoding, 0, 1, 0, right)
    assert add(encoding, 0, 0, 0, left)
    assert files.parity is not None
    assert bytes(files.parity.view) == (left ^ right).tobytes()


def test_what_a_node_owes_is_known(shm: Path) -> None:
    stripes = Stripes(4, 1, 6 * BLOCK_BYTES)  # 2 blocks a chunk
    files, _ = begin(shm, stripes, 0, [6 * BLOCK_BYTES])
    assert files.header is not None
    progress = Progress.begin(files.header, now=0.0)
    assert dict(progress.owed) == {1: 2, 2: 2, 3: 2}
    assert not progress.has_begun_to_send(1)
    progress.owed[1] -= 1
    assert progress.has_begun_to_send(1)
    progress.owed[1] -= 1
    assert not progress.has_begun_to_send(1), "it has sent all"
    assert not progress.has_begun_to_send(0), "a node owes itself nothing"


def test_nothing_is_added_to_a_snapshot_that_is_over(shm: Path) -> None:
    stripes = Stripes(3, 1, 2 * BLOCK_BYTES)
    files, encoding = begin(shm, stripes, 0, [2 * BLOCK_BYTES])
    encoding.is_over = True
    block = np.ones(BLOCK_BYTES, np.uint8)
    assert not add(encoding, 0, 0, 0, block)
    assert not add(encoding, 0, 1, 0, block)
    assert files.parity is not None
    assert not any(files.parity.view)


def test_blocks_that_no_region_covers_are_the_agents_to_sum(shm: Path) -> None:
    stripes = Stripes(3, 1, 7 * BLOCK_BYTES)  # 8 blocks with the padding
    _, encoding = begin(shm, stripes, 1, [BLOCK_BYTES + 1, 100])
    assert encoding.uncovered_blocks() == [3, 4, 5, 6, 7]


def test_without_parity_only_ranks_are_awaited(shm: Path) -> None:
    files, _ = begin(shm, Stripes(3, 0, 2 * BLOCK_BYTES), 0, [10, 10])
    assert files.header is not None
    progress = Progress.begin(files.header, now=0.0)
    assert (progress.parity_left, progress.waiting, sum(progress.owed.values())) == (0, {0, 1}, 0)


def test_two_threads_on_one_block_lose_nothing(shm: Path) -> None:
    """The two data shards of each block arrive at the same moment."""
    stripes = Stripes(3, 1, 16 * BLOCK_BYTES)
    files, encoding = begin(shm, stripes, 0, [16 * BLOCK_BYTES])
    data = np.random.default_rng(0).integers(0, 256, (2, 8, BLOCK_BYTES), np.uint8)
    gate = threading.Barrier(2)

    def send(chunk: int) -> int:
        num_whole = 0
        for block in range(8):
            gate.wait()
            num_whole += add(encoding, 0, chunk, block, data[chunk, block])
        return num_whole

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(send, range(2))) == 8
    assert files.parity is not None
    assert bytes(files.parity.view) == (data[0] ^ data[1]).tobytes()


def test_a_block_that_comes_again_is_passed_over(shm: Path) -> None:
    """A sender whose connection broke sends all of it again; added twice, a block would cancel itself out."""
    data = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, np.uint8)
    _, encoding = begin(shm, Stripes(3, 1, BLOCK_BYTES), 0, [BLOCK_BYTES])
    assert encoding.expects(0, 1, 0)
    assert add(encoding, 0, 1, 0, data) is False
    before = bytes(encoding.memory.blocks(2))
    assert not encoding.expects(0, 1, 0) and encoding.expects(0, 0, 0)
    assert add(encoding, 0, 1, 0, data) is None
    assert bytes(encoding.memory.blocks(2)) == before
