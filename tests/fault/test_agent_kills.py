"""Snapshot agents are killed at every labelled transition; trainers go on, and no committed snapshot is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.agents import LATE_S, Cluster, cluster, wait_until
from support.gated import Gate, gated_store
from support.stored import are_sound

from windlass.checkpoint.agent.client import AgentError
from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.durable.store import DurableStore
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.snapshot.plan import RecoveryPlan

NUM_NODES = 3
SLOW = 1.5e6
"""Bytes a second: a push of parity takes seconds."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """Three agents with a committed snapshot of step 1."""
    with cluster(NUM_NODES, 1, tmp_path / "checkpoints") as opened:
        opened.take(1)
        yield opened


# --- The moments: each has a snapshot of step 2 in flight, node 0 at that transition. ---


def slow_down(nodes: Cluster, *senders: int) -> None:
    nodes.rates = dict.fromkeys(senders, SLOW)
    nodes.configure()


def asked_to_begin(nodes: Cluster) -> SnapshotId:
    """Node 0 has the request and has done nothing about it."""
    nodes.signal(0, signal.SIGSTOP)
    asking = threading.Thread(target=begin_in_vain, args=(nodes,), daemon=True)
    asking.start()
    wait_until(lambda: nodes.number == 2, "the request")
    time.sleep(0.05)
    assert nodes.phase(0, SnapshotId(1, 2)) == "empty"
    return SnapshotId(1, 2)


def begin_in_vain(nodes: Cluster) -> None:
    with contextlib.suppress(TransportError):
        nodes.begin(2)


def writing(nodes: Cluster) -> SnapshotId:
    snapshot = nodes.begin(2)
    nodes.wait_for_phase("writing", snapshot)
    return snapshot


def local(nodes: Cluster) -> SnapshotId:
    """Node 0 has its own data, and parity of one of two others."""
    snapshot = nodes.begin(2)
    nodes.copy(snapshot, [0, 1])
    nodes.wait_for_phase("local", snapshot, [0, 1])
    assert nodes.phase(2, snapshot) == "writing"
    return snapshot


def pushing(nodes: Cluster) -> SnapshotId:
    """Some of the data of node 0 has arrived, and not all."""
    slow_down(nodes, 0, 1, 2)
    snapshot = nodes.begin(2)
    nodes.copy(snapshot)
    parity = nodes.slot(1, snapshot).path("parity")
    wait_until(lambda: any(parity.read_bytes()), "some parity")
    assert [nodes.phase(node, snapshot) for node in range(NUM_NODES)] == ["local"] * NUM_NODES
    return snapshot


def prepared(nodes: Cluster) -> SnapshotId:
    """Node 0 has all that others owe it, and they wait for what it sends."""
    slow_down(nodes, 0)
    snapshot = nodes.begin(2)
    nodes.copy(snapshot)
    nodes.wait_for_phase("prepared", snapshot, [0])
    assert [nodes.phase(node, snapshot) for node in (1, 2)] == ["local", "local"]
    return snapshot


def committed(nodes: Cluster) -> SnapshotId:
    snapshot = nodes.begin(2)
    nodes.copy(snapshot)
    nodes.wait_for_phase("committed", snapshot, [0])
    return snapshot


MOMENTS = [asked_to_begin, writing, local, pushing, prepared, committed]
EACH_SECOND = [m if i % 2 else pytest.param(m, marks=pytest.mark.full) for i, m in enumerate(MOMENTS)]


def newest_committed(nodes: Cluster) -> SnapshotId:
    """Of any node, as the files say it."""
    snapshots = [SnapshotId(1, number) for number in range(1, nodes.number + 1)]
    return max(s for s in snapshots for node in range(NUM_NODES) if nodes.phase(node, s) == "committed")


def check_recovery(nodes: Cluster, at_least: SnapshotId) -> RecoveryPlan:
    """Trainers that are started again get the bits of a snapshot that is not older, and take others."""
    plan = nodes.recover()
    assert plan is not None
    assert plan.snapshot >= at_least, "a committed snapshot was lost"
    assert nodes.read(plan.snapshot) == nodes.expected(plan.step)
    check_snapshots(nodes)
    return plan


def check_snapshots(nodes: Cluster) -> None:
    """Three more are committed, so that every slot is used again."""
    for step in (11, 12, 13):
        snapshot = nodes.take(step)
    assert nodes.read(snapshot) == nodes.expected(13)


@pytest.mark.parametrize("victims", [[0], pytest.param([0, 1, 2], marks=pytest.mark.full)], ids=["one", "all"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_trainers_that_live_go_on(moment: Callable[[Cluster], SnapshotId], victims: list[int], nodes: Cluster) -> None:
    moment(nodes)
    before = newest_committed(nodes)
    nodes.kill(*victims)
    assert newest_committed(nodes) >= before
    nodes.rates = {}
    nodes.reopen()
    plan = nodes.plan()
    assert plan is not None and plan.snapshot >= before
    assert plan.lost == [], "memory outlives its agent"
    check_snapshots(nodes)


@pytest.mark.parametrize("victims", [[0], pytest.param([0, 1, 2], marks=pytest.mark.full)], ids=["one", "all"])
@pytest.mark.parametrize("moment", EACH_SECOND)
def test_trainers_that_are_started_again_lose_nothing(
    moment: Callable[[Cluster], SnapshotId], victims: list[int], nodes: Cluster
) -> None:
    moment(nodes)
    before = newest_committed(nodes)
    nodes.kill(*victims)
    nodes.rates = {}
    nodes.open()
    check_recovery(nodes, before)


@pytest.mark.parametrize("moment", EACH_SECOND)
def test_a_node_that_is_lost_is_made_again(moment: Callable[[Cluster], SnapshotId], nodes: Cluster) -> None:
    moment(nodes)
    before = newest_committed(nodes)
    nodes.lose(0)
    nodes.rates = {}
    nodes.open()
    plan = check_recovery(nodes, before)
    assert plan.lost == [0]


def kill_all_at_random(nodes: Cluster, randomness: random.Random) -> str:
    """Kills all agents after some moment of a snapshot's way, and checks what they left. Returns how far it was."""
    wait_until(lambda: all(nodes.status(node)["is_free"] for node in nodes.clients), "a free slot")
    snapshot = nodes.begin(100 + len(nodes.steps))
    copying = threading.Thread(target=copy_in_vain, args=(nodes, snapshot))
    copying.start()
    time.sleep(randomness.uniform(0, 0.15))
    nodes.kill(*range(NUM_NODES))
    copying.join(LATE_S)
    phases = sorted(nodes.phase(node, snapshot) for node in range(NUM_NODES))
    held = [s for s in nodes.steps for node in range(NUM_NODES) if nodes.phase(node, s) == "committed"]
    nodes.open()
    plan = nodes.recover()
    assert plan is not None and plan.snapshot >= max(held)
    assert nodes.read(plan.snapshot) == nodes.expected(nodes.steps[plan.snapshot])
    return " ".join(phases)


def copy_in_vain(nodes: Cluster, snapshot: SnapshotId) -> None:
    with contextlib.suppress(TransportError):
        nodes.copy(snapshot)


def test_all_agents_killed_at_random_moments(nodes: Cluster) -> None:
    randomness = random.Random(1)
    for _ in range(5):
        kill_all_at_random(nodes, randomness)
    check_snapshots(nodes)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_all_agents_killed_at_a_hundred_random_moments(nodes: Cluster) -> None:
    randomness = random.Random(2)
    seen = Counter(kill_all_at_random(nodes, randomness) for _ in range(100))
    for phases, count in seen.most_common():
        print(f"{count:4d}  {phases}")
    assert len(seen) >= 4, "the moments differ"
    check_snapshots(nodes)


# --- While agents write to the durable tier. ---


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Gate]]:
    with gated_store(tmp_path, monkeypatch) as (store, gate), cluster(NUM_NODES, 1, store) as nodes:
        DurableStore(store).open_for_writing()
        nodes.take(1, persist=True)
        wait_until(lambda: DurableStore(store).latest_step() == 1, "step 1 in the store")
        yield nodes, gate


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.full)], ids=["the writer", "another"])
@pytest.mark.parametrize("word", ["chunks", "manifest.json", "latest.json"])
def test_an_agent_killed_while_it_persists(word: str, victim: int, gated: tuple[Cluster, Gate]) -> None:
    nodes, gate = gated
    store = DurableStore(nodes.store)
    gate.close(word)
    snapshot = nodes.take(2, persist=True)
    writers = set(nodes.pids.values()) if word == "chunks" else {nodes.pids[0]}
    wait_until(lambda: gate.waiting() >= writers, f"the write of {word}")
    nodes.kill(victim)
    gate.open()
    assert store.latest_step() in (1, 2)
    assert are_sound(nodes.store)
    nodes.reopen()
    plan = nodes.plan()
    assert plan is not None and plan.snapshot == snapshot and plan.lost == []
    check_snapshots(nodes)
    nodes.take(14, persist=True)
    wait_until(lambda: store.latest_step() == 14, "step 14 in the store")
    assert are_sound(nodes.store)
    assert store.steps()[-1] == 14 and 1 in store.steps()


# --- While an agent takes over what another has left. ---


@pytest.mark.parametrize(
    "name",
    [
        "0.table",
        pytest.param("1.table", marks=pytest.mark.full),
    ],
)
def test_an_agent_killed_while_it_adopts(name: str, nodes: Cluster) -> None:
    """It stands at one of the files, which is a pipe that nobody writes to."""
    nodes.take(2)
    nodes.kill(0)
    path = nodes.folder(0).path / name
    aside = path.with_name("aside")
    path.rename(aside)
    os.mkfifo(path)
    starting = threading.Thread(target=start_in_vain, args=(nodes,), daemon=True)
    starting.start()
    pipe = wait_until(lambda: writing_end(path), "an agent that reads the pipe")
    os.kill(agent_of(nodes), signal.SIGKILL)
    os.close(pipe)
    starting.join(LATE_S)
    path.unlink()
    aside.rename(path)
    nodes.reopen()
    plan = nodes.plan()
    assert plan is not None and (plan.step, plan.lost) == (2, [])
    check_recovery(nodes, plan.snapshot)


def start_in_vain(nodes: Cluster) -> None:
    with contextlib.suppress(Exception):
        nodes.start(0)


def agent_of(nodes: Cluster) -> int:
    """The process that runs for node 0."""
    folder = str(nodes.folder(0).path)
    found = [process for process in psutil.process_iter(["cmdline"]) if folder in (process.info["cmdline"] or [])]
    (process,) = [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    return process.pid


def writing_end(path: Path) -> int | None:
    """A pipe, open for writing, once somebody reads it: who reads it waits from then on."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


# --- While an agent rebuilds what was lost. ---


def test_an_agent_killed_while_it_rebuilds(tmp_path: Path) -> None:
    with cluster(NUM_NODES, 1, tmp_path / "checkpoints", tensor_bytes=24 << 20) as nodes:
        nodes.take(1)
        snapshot = nodes.take(2)
        before = nodes.files(0, snapshot)
        nodes.lose(0)
        nodes.open()
        plan = nodes.plan()
        assert plan is not None and plan.lost == [0]
        nodes.generation = 2
        nodes.configure([SnapshotId(1, 1), snapshot])
        rebuilding = threading.Thread(target=rebuild_in_vain, args=(nodes, nodes.rebuild_request(plan, 0)))
        rebuilding.start()
        nodes.wait_for_phase("writing", snapshot, [0])
        nodes.kill(0)
        rebuilding.join(LATE_S)
        assert nodes.phase(0, snapshot) == "writing", "it was rebuilt before it was killed"
        nodes.open()
        plan = nodes.recover()
        assert plan is not None and (plan.snapshot, plan.lost) == (snapshot, [0])
        assert nodes.files(0, snapshot) == before
        check_snapshots(nodes)


def rebuild_in_vain(nodes: Cluster, request: dict) -> None:
    with contextlib.suppress(TransportError, AgentError):
        nodes.clients[0].ask("rebuild", **request)
