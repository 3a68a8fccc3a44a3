"""Bits of committed slots are flipped: every flip is found, up to m nodes are mended to the byte, more is refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.agents import Cluster, cluster
from support.files import flip

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.errors import CorruptCheckpoint

SUFFIXES = ("data", "parity", "table", "head")


@pytest.fixture(params=[(3, 1), (5, 2)], ids=["3 nodes, 1 parity", "5 nodes, 2 parity"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Agents that hold one committed snapshot."""
    num_nodes, num_parity_shards = request.param
    with cluster(num_nodes, num_parity_shards, tmp_path / "checkpoints") as opened:
        opened.take(1)
        yield opened


@dataclass(frozen=True)
class Flip:
    node: int
    suffix: str
    path: Path
    position: int
    mask: int

    def apply(self) -> None:
        flip(self.path, self.position, self.mask)

    @property
    def is_found_on_reading(self) -> bool:
        """Head and table are read by an agent when it starts, and by no other."""
        return self.suffix in ("data", "parity")


def random_flip(nodes: Cluster, node: int, suffix: str, randomness: random.Random) -> Flip:
    path = nodes.slot(node, SNAPSHOT).path(suffix)
    return Flip(node, suffix, path, randomness.randrange(path.stat().st_size), 1 << randomness.randrange(8))


SNAPSHOT = SnapshotId(1, 1)


def is_found(nodes: Cluster, made: Flip) -> bool:
    if made.is_found_on_reading:
        return nodes.clients[made.node].ask("verify", snapshot=SNAPSHOT)["num_damaged"] == 1
    nodes.kill(made.node)
    nodes.start(made.node)
    return not nodes.status(made.node)["slots"]


def damage_and_mend(nodes: Cluster, randomness: random.Random, suffixes: tuple[str, ...]) -> Counter[str]:
    """Flips a bit on each of up to m nodes."""
    n, m = nodes.num_nodes, nodes.num_parity_shards
    before = [nodes.files(node, SNAPSHOT) for node in range(n)]
    victims = sorted(randomness.sample(range(n), randomness.randint(1, m)))
    flips = [random_flip(nodes, node, randomness.choice(suffixes), randomness) for node in victims]
    for made in flips:
        made.apply()
    for made in flips:
        assert is_found(nodes, made), made
    plan = nodes.recover()
    assert plan is not None and (plan.snapshot, plan.lost) == (SNAPSHOT, victims)
    assert [nodes.files(node, SNAPSHOT) for node in range(n)] == before, flips
    for node in range(n):
        assert nodes.clients[node].ask("verify", snapshot=SNAPSHOT)["num_damaged"] == 0
    return Counter(made.suffix for made in flips)


def damage_too_much(nodes: Cluster, randomness: random.Random) -> Counter[str]:
    """Flips a bit on m + 1 nodes, looks, and flips them back."""
    n, m = nodes.num_nodes, nodes.num_parity_shards
    victims = randomness.sample(range(n), m + 1)
    flips = [random_flip(nodes, node, randomness.choice(("data", "parity")), randomness) for node in victims]
    for made in flips:
        made.apply()
    for made in flips:
        assert is_found(nodes, made), made
    assert nodes.plan() is None, "more is lost than parity makes up for"
    for made in flips:
        made.apply()
        assert nodes.clients[made.node].ask("verify", snapshot=SNAPSHOT)["num_damaged"] == 0
    plan = nodes.plan()
    assert plan is not None and plan.lost == []
    return Counter(made.suffix for made in flips)


def campaign(nodes: Cluster, num_flips: int, num_restarts: int, seed: int) -> Counter[str]:
    """Args:
    num_restarts: flips of heads and tables, each of which starts an agent anew.
    """
    randomness, made = random.Random(seed), Counter[str]()
    while made["table"] + made["head"] < num_restarts:
        made += damage_and_mend(nodes, randomness, ("table", "head"))
    while made.total() < num_flips:
        act = randomness.random()
        made += damage_too_much(nodes, randomness) if act < 0.2 else damage_and_mend(nodes, randomness, SUFFIXES[:2])
    assert nodes.read(SNAPSHOT) == nodes.expected(1)
    return made


def test_flips_are_found_and_mended(nodes: Cluster) -> None:
    made = campaign(nodes, num_flips=50, num_restarts=4, seed=1)
    assert made.keys() >= {"data", "parity"} and made.total() >= 50


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_flips_are_found_and_mended(nodes: Cluster) -> None:
    made = campaign(nodes, num_flips=500, num_restarts=100, seed=2)
    print(dict(made))
    assert made.keys() == set(SUFFIXES) and made.total() >= 500


def test_a_restore_takes_no_damaged_block(nodes: Cluster) -> None:
    """Also one that nobody has looked for: on this node and on another."""
    for node in (0, 1):
        files = nodes.slot(node, SNAPSHOT)
        assert files.header is not None
        place = files.header.own_regions[0].nbytes - nodes.tensor_bytes // 2  # in a tensor
        flip(files.path("data"), place, 0x04)
        with pytest.raises((CorruptCheckpoint, ValueError), match=r"has changed in (the )?memory"):
            nodes.read(SNAPSHOT)
        flip(files.path("data"), place, 0x04)
        assert nodes.read(SNAPSHOT) == nodes.expected(1)
