"""A slot is rebuilt to the byte from those of other nodes, over real agents, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.agents import Cluster, cluster, shared_memory
from support.files import flip

from windlass.checkpoint.agent.ledger import Phase, SnapshotId
from windlass.checkpoint.agent.repair import BlockSource, Rebuilder, TooFewShards, block_number, runs_of
from windlass.checkpoint.agent.slots import SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.net.handshake import RefusedPeer, TransportError


@pytest.fixture(scope="module", params=[(3, 1), (4, 2), (5, 2)], ids=["3 nodes, 1 parity", "4, 2", "5, 2"])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Agents with one committed snapshot; tests leave it as it was."""
    num_nodes, num_parity_shards = request.param
    with cluster(num_nodes, num_parity_shards, tmp_path_factory.mktemp("store"), tensor_bytes=4 << 20) as opened:
        opened.take(1)
        yield opened


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


SNAPSHOT = SnapshotId(1, 1)


def empty_slot(nodes: Cluster, shm: Path, position: int) -> SlotFiles:
    header = nodes.slot(position, SNAPSHOT).header
    assert header is not None
    files = SlotFiles(shm, position)
    files.begin(replace(header, phase=Phase.writing, table_crc=0))
    return files


def source(nodes: Cluster, position: int) -> BlockSource:
    host, port = nodes.status(position)["address"]
    return BlockSource((host, port), nodes.secret, nodes.generation, SNAPSHOT, position)


def rebuild(nodes: Cluster, files: SlotFiles, sources: list[int], wanted: set[int] | None = None) -> int:
    with ExitStack() as stack:
        opened = {position: source(nodes, position) for position in sources}
        for each in opened.values():
            stack.callback(each.close)
        return Rebuilder(files.memory, opened).rebuild(wanted)


def content(files: SlotFiles) -> dict[str, bytes]:
    assert files.data is not None and files.parity is not None
    return {"data": bytes(files.data.view), "parity": bytes(files.parity.view), "table": files.table.tobytes()}


@pytest.mark.slow
def test_all_losses_that_parity_makes_up_for(nodes: Cluster, shm: Path) -> None:
    n, m = nodes.num_nodes, nodes.num_parity_shards
    for lost in itertools.chain.from_iterable(itertools.combinations(range(n), r) for r in range(1, m + 1)):
        for position in lost:
            files = empty_slot(nodes, shm, position)
            num_blocks = rebuild(nodes, files, [other for other in range(n) if other not in lost])
            assert num_blocks == files.table.size
            assert content(files) == nodes.files(position, SNAPSHOT), f"{position} of {lost}"


def test_one_loss_more_is_refused(nodes: Cluster, shm: Path) -> None:
    n, m = nodes.num_nodes, nodes.num_parity_shards
    with pytest.raises(TooFewShards, match=f"sound shards are left where {n - m} are needed"):
        rebuild(nodes, empty_slot(nodes, shm, 0), list(range(m + 1, n)))


def test_damage_at_a_source_is_passed_by_while_there_is_parity(nodes: Cluster, shm: Path) -> None:
    """One node is lost, and a block of another has changed: with a second parity that block comes from elsewhere."""
    n, m = nodes.num_nodes, nodes.num_parity_shards
    path = nodes.slot(1, SNAPSHOT).path("data")
    flip(path, BLOCK_BYTES // 2)
    try:
        files = empty_slot(nodes, shm, 0)
        if m == 1:
            with pytest.raises(TooFewShards):
                rebuild(nodes, files, list(range(1, n)))
        else:
            rebuild(nodes, files, list(range(1, n)))
            assert content(files) == nodes.files(0, SNAPSHOT)
    finally:
        flip(path, BLOCK_BYTES // 2)


def test_single_blocks_are_mended_in_place(nodes: Cluster, shm: Path) -> None:
    n = nodes.num_nodes
    files = empty_slot(nodes, shm, 0)
    rebuild(nodes, files, list(range(1, n)))
    numbers = {0, files.table.size // 2, files.table.size - 1}
    for number in numbers:
        files.memory.blocks(number)[:] = bytes(BLOCK_BYTES)
    assert set(files.memory.damaged_blocks()) == numbers
    assert rebuild(nodes, files, list(range(1, n)), numbers) == len(numbers)
    assert content(files) == nodes.files(0, SNAPSHOT)


def test_a_block_that_comes_out_otherwise_than_it_was_written_is_refused(nodes: Cluster, shm: Path) -> None:
    """Parts of different snapshots would give such blocks."""
    n = nodes.num_nodes
    files = empty_slot(nodes, shm, 0)
    rebuild(nodes, files, list(range(1, n)))
    files.table[1] ^= 1
    with pytest.raises(TooFewShards, match="block 1 does not come out as it was written"):
        rebuild(nodes, files, list(range(1, n)), {1})


def test_a_source_that_ends_is_passed_by(nodes: Cluster, shm: Path) -> None:
    n, m = nodes.num_nodes, nodes.num_parity_shards
    files = empty_slot(nodes, shm, 0)
    opened = {position: source(nodes, position) for position in range(1, n)}
    opened[1].close()
    rebuilder = Rebuilder(files.memory, opened)
    if m == 1:
        with pytest.raises(TooFewShards):
            rebuilder.rebuild()
    else:
        rebuilder.rebuild()
        assert content(files) == nodes.files(0, SNAPSHOT)
    assert 1 not in rebuilder.sources
    for other in rebuilder.sources.values():
        other.close()


def test_a_snapshot_that_a_node_does_not_hold_is_an_error(nodes: Cluster) -> None:
    host, port = nodes.status(0)["address"]
    for snapshot, position in ((SnapshotId(1, 99), 0), (SNAPSHOT, 1)):
        wrong = BlockSource((host, port), nodes.secret, nodes.generation, snapshot, position)
        wrong.ask(0, 1)
        with pytest.raises(TransportError, match="does not hold that"):
            wrong.take(np.empty(BLOCK_BYTES, np.uint8))


def test_a_reader_without_the_secret_is_refused(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.checkpoint.agent.repair.PATIENCE_S", 0.0)
    host, port = nodes.status(0)["address"]
    with pytest.raises(RefusedPeer):
        BlockSource((host, port), b"another secret", nodes.generation, SNAPSHOT, 0)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (5, 2), (6, 4)])
def test_the_runs_of_a_node_are_all_of_its_blocks(n: int, m: int) -> None:
    stripes = Stripes(n, m, 13 * BLOCK_BYTES)
    num_blocks = (stripes.data_bytes + stripes.parity_bytes) // BLOCK_BYTES
    for position in range(n):
        found = []
        for run in runs_of(stripes, position, None):
            first = block_number(stripes, run.shard, run.block)
            found += range(first, first + run.count)
            assert stripes.node_of_shard(run.stripe, run.shard) == position
        assert found == list(range(num_blocks))
        wanted = {1, num_blocks - 1}
        picked = [block_number(stripes, run.shard, run.block) for run in runs_of(stripes, position, wanted)]
        assert set(picked) == wanted and len(picked) == len(wanted)
