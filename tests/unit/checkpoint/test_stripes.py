"""Where the parity goes: every shard of a stripe on another node, and nobody does more than the others."""

from __future__ import annotations

from collections import Counter

import pytest

from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes

SHAPES = [(n, m) for n in range(1, 10) for m in range(n)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_shard_of_a_stripe_is_on_another_node(n: int, m: int) -> None:
    stripes = Stripes(n, m, node_bytes=1)
    for stripe in range(n):
        assert sorted(stripes.node_of_shard(stripe, shard) for shard in range(n)) == list(range(n))


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_a_node_gives_k_chunks_and_keeps_m_parities(n: int, m: int) -> None:
    stripes = Stripes(n, m, node_bytes=1)
    k = n - m
    given, kept = Counter[int](), Counter[int]()
    for stripe in range(n):
        given.update(stripes.node_of_shard(stripe, shard) for shard in range(k))
        kept.update(stripes.node_of_shard(stripe, k + row) for row in range(m))
    assert given == dict.fromkeys(range(n), k)
    assert kept == (dict.fromkeys(range(n), m) if m else {})


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_the_three_ways_to_ask_agree(n: int, m: int) -> None:
    stripes = Stripes(n, m, node_bytes=1)
    for node in range(n):
        for chunk in range(n - m):
            assert stripes.node_of_shard(stripes.stripe_of_chunk(node, chunk), chunk) == node
        for row in range(m):
            assert stripes.node_of_shard(stripes.stripe_of_parity(node, row), n - m + row) == node


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_a_node_sends_m_times_its_data_and_receives_as_much(n: int, m: int) -> None:
    stripes = Stripes(n, m, node_bytes=5 * BLOCK_BYTES + 1)
    received = Counter[int]()
    for node in range(n):
        targets = list(stripes.parity_targets(node))
        assert len(targets) * stripes.chunk_bytes == m * stripes.data_bytes
        assert len(set(targets)) == len(targets)
        assert node not in [target for _, _, target in targets], "a node keeps no parity of its own data"
        for chunk, row, target in targets:
            assert stripes.stripe_of_parity(target, row) == stripes.stripe_of_chunk(node, chunk)
            received[target] += 1
    assert received == (dict.fromkeys(range(n), m * (n - m)) if m else {})


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("node_bytes", [0, 1, BLOCK_BYTES, 7 * BLOCK_BYTES - 1, 7 * BLOCK_BYTES, 7 * BLOCK_BYTES + 1])
def test_chunks_are_as_few_whole_blocks_as_hold_the_data(n: int, m: int, node_bytes: int) -> None:
    stripes = Stripes(n, m, node_bytes)
    k = n - m
    assert stripes.chunk_bytes % BLOCK_BYTES == 0
    assert node_bytes <= stripes.data_bytes < node_bytes + k * BLOCK_BYTES
    assert stripes.parity_bytes == m * stripes.chunk_bytes
    assert stripes.blocks_per_chunk * BLOCK_BYTES == stripes.chunk_bytes


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (3, 4), (3, -1)])
def test_parity_of_all_nodes_cannot_be_kept(n: int, m: int) -> None:
    with pytest.raises(AssertionError):
        Stripes(n, m, 1)
