"""One agent, or a few: how it lives, what it refuses, and how it goes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agents import Cluster, cluster, small_tmpfs, wait_until
from support.stored import are_sound, noise

from windlass.checkpoint.agent.client import AgentClient, AgentError, NoMemory
from windlass.checkpoint.agent.ledger import Busy, SnapshotId, Stale
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.checkpoint.durable.store import DurableStore
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.transport import connect
from windlass.checksum import crc32c


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(1, 0, tmp_path / "checkpoints") as opened:
        yield opened


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, 1, tmp_path / "checkpoints") as opened:
        yield opened


def events(nodes: Cluster, kind: str, node: int = 0) -> list[dict]:
    return [event for event in nodes.status(node)["events"] if event["kind"] == kind]


def wait_for_event(nodes: Cluster, kind: str, step: int, node: int = 0) -> dict:
    return wait_until(
        lambda: next((event for event in events(nodes, kind, node) if event["step"] == step), None), f"{kind} of {step}"
    )


# --- Snapshots. ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 0), pytest.param(2, 0, marks=pytest.mark.full), (2, 1), (4, 2), pytest.param(4, 3, marks=pytest.mark.full)],
)
def test_snapshots_are_committed_on_all_nodes(n: int, m: int, tmp_path: Path) -> None:
    with cluster(n, m, tmp_path / "checkpoints") as nodes:
        for step in (1, 2, 3, 4):
            snapshot = nodes.take(step)
            assert nodes.read(snapshot) == nodes.expected(step)
        for each in range(n):
            assert [event["step"] for event in events(nodes, "snapshot_committed", each)] == [1, 2, 3, 4]
            assert nodes.plan() is not None
            assert list(nodes.status(each)["slots"]) != []


@pytest.mark.slow
def test_a_header_says_committed_when_all_nodes_have_prepared_and_not_before(tmp_path: Path) -> None:
    """Node 0 holds no parity for node 1, so it has prepared before that has copied anything."""
    with cluster(2, 0, tmp_path / "checkpoints") as nodes:
        snapshot = nodes.begin(1)
        nodes.copy(snapshot, [0])
        wait_until(lambda: nodes.phase(0, snapshot) not in ("writing", "local"), "what comes after the copy")
        time.sleep(0.1)  # nothing more comes
        assert nodes.phase(0, snapshot) == "prepared"
        assert events(nodes, "snapshot_committed") == []
        nodes.copy(snapshot, [1])
        nodes.wait_for_phase("committed", snapshot)


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [False, True])
def test_data_that_was_damaged_on_its_way_gives_the_snapshot_up(is_damaged: bool, tmp_path: Path) -> None:
    """The test is node 1's agent: it sends node 0 all that its mirror needs, with the checksums of other bytes."""
    with cluster(2, 1, tmp_path / "checkpoints") as nodes:
        snapshot = nodes.begin(1, nodes=[0])
        nodes.copy(snapshot, [0])
        files = nodes.slot(0, snapshot)
        assert files.header is not None
        count = files.header.stripes.blocks_per_chunk
        data = noise("what node 1 has", count * BLOCK_BYTES)
        sums = [crc32c(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
        sums[-1] ^= int(is_damaged)
        peer = connect(tuple(nodes.status(0)["address"]), nodes.secret)
        peer.send({"position": 1, "generation": nodes.generation})
        parity = {"type": "parity", "snapshot": snapshot, "chunk": 0, "row": 0, "block": 0, "crcs": sums}
        peer.send(parity, data)
        ends = "empty" if is_damaged else "prepared"
        assert wait_until(lambda: nodes.phase(0, snapshot).replace("local", ""), "what comes of it") == ends
        if is_damaged:
            assert "damaged on its way" in wait_for_event(nodes, "snapshot_given_up", 1)["reason"]
        peer.close()


def test_a_snapshot_before_the_last_is_done_is_refused(nodes: Cluster) -> None:
    nodes.take(1)
    snapshot = nodes.begin(2)
    with pytest.raises(Busy, match="not committed yet"):
        nodes.begin(3)
    nodes.copy(snapshot)
    nodes.wait_for_phase("committed", snapshot)


def test_a_snapshot_is_given_up_on_all_nodes(nodes: Cluster) -> None:
    first = nodes.take(1)
    snapshot = nodes.begin(2)
    nodes.copy(snapshot, [0, 1])
    nodes.clients[2].ask("abort", snapshot=snapshot, why="no reason")
    for node in range(3):
        assert wait_for_event(nodes, "snapshot_given_up", 2, node)
    assert events(nodes, "snapshot_given_up", 2)[0]["reason"] == "no reason"
    assert nodes.read(first) == nodes.expected(1)
    with pytest.raises(Stale):
        nodes.clients[0].ask("copied", bytearray(12), snapshot=snapshot, rank=0)
    assert nodes.read(nodes.take(3)) == nodes.expected(3)


def test_a_trainer_that_ends_while_it_copies_gives_its_snapshot_up(nodes: Cluster) -> None:
    nodes.begin(1)
    nodes.clients[1].close()
    wait_for_event(nodes, "snapshot_given_up", 1, 0)
    nodes.start(1)
    assert "ended while it copied" in events(nodes, "snapshot_given_up", 1)[0]["reason"]
    nodes.take(2)


@pytest.mark.slow
def test_a_push_that_comes_too_late_harms_nothing(tmp_path: Path) -> None:
    """Node 2 takes nothing for a while, so that pushes wait for it until their snapshots are given up."""
    with cluster(3, 1, tmp_path / "checkpoints", tensor_bytes=8 << 20) as nodes:
        nodes.take(1)
        nodes.signal(2, signal.SIGSTOP)
        for step in (2, 3):
            snapshot = nodes.begin(step, nodes=[0, 1])
            nodes.copy(snapshot, [0, 1])
            for node in (0, 1):
                nodes.clients[node].ask("abort", snapshot=snapshot, why="it is too late")
                assert nodes.phase(node, snapshot) == "empty"
        nodes.signal(2, signal.SIGCONT)
        for step in (4, 5):
            assert nodes.read(nodes.take(step)) == nodes.expected(step)
        for node in range(3):
            assert "Traceback" not in (nodes.folder(node).path / "agent.log").read_text()


def test_another_generation_is_refused_and_counted(node: Cluster) -> None:
    node.take(1)
    old = node.begin(2)
    node.generation = 2
    node.configure([SnapshotId(1, 1)])
    with pytest.raises(Stale):
        node.clients[0].ask("copied", bytearray(12), snapshot=old, rank=0)
    node.generation = 1
    with pytest.raises(Stale, match="generation 1 is over"):
        node.configure()
    assert node.status(0)["num_stale"] == 2
    node.generation, node.number = 2, 0
    node.take(3)


@pytest.mark.slow
def test_memory_that_is_not_there_is_refused_with_numbers(tmp_path: Path) -> None:
    nodes = Cluster(tmp_path, 1, 0, tmp_path / "checkpoints")
    with small_tmpfs(tmp_path, 8 * BLOCK_BYTES) as small:
        nodes.root = small
        try:
            nodes.open()
            with pytest.raises(NoMemory) as raised:
                nodes.clients[0].ask("reserve", node_bytes=6 * BLOCK_BYTES)
            assert raised.value.needed_bytes == 2 * 6 * BLOCK_BYTES
            assert 7 * BLOCK_BYTES < raised.value.free_bytes <= 8 * BLOCK_BYTES
            nodes.clients[0].ask("reserve", node_bytes=3 * BLOCK_BYTES)
            for step in (1, 2, 3):
                nodes.take(step)  # 3 blocks
        finally:
            nodes.close()


def test_reserved_memory_is_not_taken_again(node: Cluster) -> None:
    node.clients[0].ask("reserve", node_bytes=3 * BLOCK_BYTES)
    before = {path.name: path.stat().st_ino for path in node.folder(0).path.glob("?.data")}
    assert sorted(before) == ["0.data", "1.data"]
    for step in (1, 2, 3):
        node.take(step)
    assert {path.name: path.stat().st_ino for path in node.folder(0).path.glob("?.data")} == before


# --- Questions that it cannot answer. ---


@pytest.mark.parametrize("request_", [{"do": "nothing that is"}, {}, {"do": "begin"}, {"do": "verify", "snapshot": 7}])
def test_a_question_that_makes_no_sense_ends_its_connection_alone(request_: dict, node: Cluster) -> None:
    """No answer would be worse: who asks waits for one."""
    node.take(1)
    asking = node.folder(0).connect()
    asking.settimeout(20.0)
    asking.send(request_)
    with pytest.raises(TransportError, match="closed the connection"):
        asking.receive()
    node.take(2)


@pytest.mark.slow
def test_a_rebuild_without_sources_is_refused(nodes: Cluster) -> None:
    snapshot = nodes.take(1)
    plan = nodes.plan()
    assert plan is not None
    request = nodes.rebuild_request(plan, 0) | {"sources": {}}
    nodes.lose(0)
    nodes.open()
    with pytest.raises(AgentError, match="sound shards are left"):
        nodes.clients[0].ask("rebuild", **request)
    nodes.recover()
    assert nodes.read(snapshot) == nodes.expected(1)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(3, 1), (4, 2)])
def test_a_source_that_is_gone_by_now_is_done_without(n: int, m: int, tmp_path: Path) -> None:
    """Two nodes are lost, the second after it was planned to read from it."""
    with cluster(n, m, tmp_path / "checkpoints") as nodes:
        snapshot = nodes.take(1)
        before = nodes.files(0, snapshot)
        nodes.lose(0)
        nodes.open()
        plan = nodes.plan()
        assert plan is not None and plan.lost == [0]
        request = nodes.rebuild_request(plan, 0)
        nodes.kill(1)
        if m == 1:
            with pytest.raises(AgentError, match="sound shards are left"):
                nodes.clients[0].ask("rebuild", **request)
        else:
            nodes.clients[0].ask("rebuild", **request)
            assert nodes.files(0, snapshot) == before
        assert nodes.status(0)["pid"] == nodes.pids[0]


# --- Agents after agents. ---


@pytest.mark.slow
def test_an_agent_adopts_what_another_left(node: Cluster) -> None:
    snapshot = node.take(1)
    before = node.files(0, snapshot)
    node.kill(0)
    node.reopen()
    assert node.files(0, snapshot) == before
    status = node.status(0)
    assert (status["generation"], [slot["step"] for slot in status["slots"]]) == (1, [1])
    assert node.read(node.take(2)) == node.expected(2)


@pytest.mark.slow
def test_events_are_numbered_on_over_agents(node: Cluster) -> None:
    node.take(1)
    last = events(node, "snapshot_committed")[-1]["number"]
    node.kill(0)
    node.reopen()
    node.take(2)
    answer = node.clients[0].ask("status", since=last)
    assert [event["step"] for event in answer["events"]] == [2]


@pytest.mark.slow
def test_an_agent_without_a_group_takes_no_snapshot(node: Cluster) -> None:
    node.kill(0)
    node.start(0)
    assert not node.status(0)["is_configured"]
    with pytest.raises(Stale, match="does not know its group"):
        node.begin(1)


# --- The durable tier. ---


def test_what_is_to_be_durable_is_written_by_all_nodes(nodes: Cluster) -> None:
    nodes.take(1, persist=True)
    for node in range(3):
        event = wait_for_event(nodes, "persisted", 1, node)
        assert event["bytes"] == event["written_bytes"] > 6 * nodes.tensor_bytes - 3 * 12345
    assert committed_steps(Path(nodes.store)) == [1]
    assert are_sound(nodes.store)


@pytest.mark.slow
def test_what_does_not_come_through_a_disk_is_told(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, 2 << 20) as disk, cluster(2, 1, disk / "checkpoints") as nodes:
        nodes.take(1, persist=True)
        for node in range(2):
            assert "No space left" in wait_for_event(nodes, "persist_failed", 1, node)["reason"]
        assert committed_steps(disk / "checkpoints") == []
        assert nodes.read(nodes.take(2)) == nodes.expected(2)


def test_memory_that_has_changed_is_not_made_durable(node: Cluster) -> None:
    """The check is made of the blocks that are written, before they are."""
    node.clients[0].ask("reserve", node_bytes=3 * BLOCK_BYTES)
    snapshot = node.begin(1, persist=True)
    files = node.slot(0, snapshot)
    node.copy(snapshot)
    node.wait_for_phase("committed", snapshot)
    wait_for_event(node, "persisted", 1)
    with files.path("data").open("r+b") as file:
        file.seek(BLOCK_BYTES + 5)
        file.write(b"\xff\x00\xff\x00")
    node.signal(0, signal.SIGTERM)
    wait_until(lambda: not node.folder(0).path.exists(), "the agent's leaving")
    assert are_sound(node.store)


def test_memory_that_has_changed_since_its_commit_is_not_made_durable(node: Cluster) -> None:
    snapshot = node.take(1)
    with node.slot(0, snapshot).path("data").open("r+b") as file:
        file.seek(BLOCK_BYTES + 5)
        file.write(b"\xff\x00\xff\x00")
    node.signal(0, signal.SIGTERM)
    wait_until(lambda: not node.folder(0).path.exists(), "the agent's leaving")
    assert committed_steps(Path(node.store)) == []


# --- The end. ---


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "the end of the lease"])
def test_an_agent_writes_what_only_it_has_and_leaves(how: str, tmp_path: Path) -> None:
    lease_s = 60.0 if how == "SIGTERM" else 1.5
    with cluster(2, 1, tmp_path / "checkpoints", lease_s=lease_s) as nodes:
        nodes.take(5)
        if how == "SIGTERM":
            for node in range(2):
                nodes.signal(node, signal.SIGTERM)
        else:
            for client in nodes.clients.values():
                client.close()
        for node in range(2):
            wait_until(lambda node=node: not nodes.folder(node).path.exists(), "the agent's leaving")
        assert committed_steps(tmp_path / "checkpoints") == [5]
        assert are_sound(tmp_path / "checkpoints")


@pytest.mark.slow
def test_an_agent_stays_while_a_trainer_is_there(tmp_path: Path) -> None:
    with cluster(1, 0, tmp_path / "checkpoints", lease_s=0.5) as node:
        node.take(1)
        time.sleep(2.0)
        assert node.status(0)["pid"] == node.pids[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_are_not_for_agents(number: signal.Signals, node: Cluster) -> None:
    node.signal(0, number)
    node.take(1)
    assert node.status(0)["pid"] == node.pids[0]


def test_the_last_rank_of_a_node_ends_its_agent(node: Cluster) -> None:
    other = AgentClient(node.folder(0).connect())
    other.ask("end", rank=1, num_local_ranks=2, persist=False)
    other.ask("end", rank=1, num_local_ranks=2, persist=False)  # it says so twice, and is one
    time.sleep(0.1)
    assert node.status(0)["pid"] == node.pids[0]
    node.clients[0].ask("end", rank=0, num_local_ranks=2, persist=False)
    wait_until(lambda: not node.folder(0).path.exists(), "the agent's leaving")
    wait_until(lambda: not is_alive(node.pids[0]), "the end of its process")


def is_alive(pid: int) -> bool:
    """Whether it runs; a child that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_looks_does_not_wait_for_an_agent_that_has_stopped(node: Cluster) -> None:
    client = node.clients[0]
    assert client.look(20.0) is not None
    node.signal(0, signal.SIGSTOP)
    assert client.look(0.05) is None
    assert client.look(0.05) is None
    node.signal(0, signal.SIGCONT)
    status = wait_until(lambda: client.look(0.05), "an answer")
    assert status["pid"] == node.pids[0]
    node.take(1)  # no late answer is taken for another's
    assert [slot["step"] for slot in client.ask("status")["slots"]] == [1]


def test_a_snapshot_is_read_again_while_its_slot_is_emptied(node: Cluster) -> None:
    """And no later one is taken for damaged, as it has other bytes in the same place."""
    answers: list[int] = []
    client, is_over = AgentClient(node.folder(0).connect()), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            answers.append(client.ask("verify", snapshot=SnapshotId(node.generation, 1))["num_damaged"])

    looking = threading.Thread(target=look)
    looking.start()
    for step in range(1, 21):
        num_answers = len(answers)
        node.take(step)
        wait_until(lambda before=num_answers: len(answers) >= before + 2 or not looking.is_alive(), "an answer")
        assert all(slot["is_sound"] for slot in node.status(0)["slots"])
        node.generation, node.number = node.generation + 1, 0
        node.configure()  # nothing is kept
    is_over.set()
    looking.join()
    client.close()
    assert len(answers) > 20 and not any(answers)


def test_many_ask_at_once(node: Cluster) -> None:
    node.take(1)
    answers: list[int] = []

    def ask() -> None:
        client = AgentClient(node.folder(0).connect())
        answers.extend(client.ask("status")["pid"] for _ in range(20))
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [node.pids[0]] * 160
    wait_until(lambda: node.status(0)["num_trainers"] == 1, "the others' leaving")
    assert os.getpid() != node.pids[0]
    assert DurableStore(node.store).steps() == []
