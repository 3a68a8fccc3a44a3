"""What is left of a job in memory: which nodes' loss it survives, and what agents do that stop, die or are outdated."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support import nodes, runs
from support.ranks import run_ranks
from support.snapshots import Protected
from support.toy import Layout

from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import Phase, SnapshotId, Stale
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.errors import EXIT_DONE

NUM_NODES, NUM_PARITY = 6, 2
SURVIVED = [lost for count in (1, 2) for lost in itertools.combinations(range(NUM_NODES), count)]
TOO_MANY = list(itertools.combinations(range(NUM_NODES), 3))


def own_memory(shm: Path) -> Path:
    return shm / f"node{os.environ['RANK']}"


def take(directory: Path, shm: Path, layout: Layout) -> dict[int, tuple[str, str]]:
    """Step 1 on disk, steps 2 and 3 in memory. Returns the digests of each; agents go on, trainers end."""
    own_memory(shm).mkdir()
    state = Protected(directory, layout)
    assert state.protect(own_memory(shm), num_parity_shards=NUM_PARITY) is None
    digests = {}
    for step in (1, 2, 3):
        state.advance()
        digests[step] = state.digests()
        if step == 1:
            assert state.checkpointer is not None
            state.checkpointer.save(step)
        else:
            state.snapshot(step)
    state.mesh.stop()
    return digests


Outcome = tuple[int, str, int, tuple[str, str]]
"""Step, source, lost nodes, and digests of what was restored."""


def restore_each(directory: Path, kept: Path, stage: Path, subsets: list[tuple[int, ...]]) -> list[Outcome]:
    """Restores from copies of what is in memory, without that of the nodes of each subset."""
    state = Protected(directory, seed=99)
    outcomes = []
    for number, lost in enumerate(subsets):
        memory = own_memory(stage / str(number))
        if state.mesh.rank in lost:
            memory.mkdir(parents=True)
        else:
            shutil.copytree(own_memory(kept), memory, ignore=shutil.ignore_patterns("*.sock"))
        state.advance()
        restored = state.protect(memory, num_parity_shards=NUM_PARITY)
        assert restored is not None
        outcomes.append((restored.step, restored.source, restored.lost_nodes, state.digests()))
        state.close()
        nodes.Node(memory).wait_until_left()
        shutil.rmtree(memory)
    state.mesh.stop()
    return outcomes


def check_subsets(tmp_path: Path, subsets: list[tuple[int, ...]]) -> None:
    with nodes.shared_memory() as shm, nodes.shared_memory() as stage:
        digests = run_ranks(take, NUM_NODES, tmp_path, shm, Layout(), local_world_size=1)[0]
        for number in range(NUM_NODES):
            nodes.Node(shm / f"node{number}").kill_agent()
        assert committed_steps(tmp_path) == [1]

        by_rank = run_ranks(restore_each, NUM_NODES, tmp_path, shm, stage, subsets, local_world_size=1)

        assert all(outcomes == by_rank[0] for outcomes in by_rank)
        for lost, outcome in zip(subsets, by_rank[0], strict=True):
            from_memory = (3, "parity", len(lost), digests[3])
            from_disk = (1, "durable", 0, digests[1])
            assert outcome == (from_memory if len(lost) <= NUM_PARITY else from_disk), lost
        assert committed_steps(tmp_path) == [1]


def test_some_losses_of_two_nodes_are_survived_in_memory_and_of_three_on_disk(tmp_path: Path) -> None:
    randomness = random.Random(0)
    check_subsets(tmp_path, randomness.sample(SURVIVED, 3) + randomness.sample(TOO_MANY, 1))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_all_losses_of_two_nodes_are_survived_in_memory_and_of_three_on_disk(tmp_path: Path) -> None:
    check_subsets(tmp_path, SURVIVED + TOO_MANY)
    print(f"{len(SURVIVED)} subsets of 1 or 2 nodes: from memory; {len(TOO_MANY)} of 3: from disk; to the bit")


def restore_in_place(directory: Path, shm: Path, layout: Layout) -> dict:
    """Restores from the agents that are there; what they sent for it, and a copy of the same bytes to compare."""
    state = Protected(directory, layout, seed=99)
    state.advance()
    before = nodes.Node(own_memory(shm)).status()["sent_bytes"]
    state.mesh.barrier()
    begin = time.perf_counter()
    restored = state.protect(own_memory(shm), num_parity_shards=NUM_PARITY)
    seconds = time.perf_counter() - begin
    assert restored is not None
    status = state.status()
    tensors = [piece.tensor for piece in state.checkpointer.objects.pieces()] if state.checkpointer else []
    sources = [np.ones(tensor.nbytes, np.uint8) for tensor in tensors]
    targets = [np.ones(tensor.nbytes, np.uint8) for tensor in tensors]  # its pages are there before the clock runs
    state.mesh.barrier()
    begin = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        target[:] = source
    memcpy_s = time.perf_counter() - begin
    result = {
        "restored": (restored.step, restored.source, restored.lost_nodes, state.digests()),
        "before": before,
        "sent": {kind: status["sent_bytes"][kind] - before[kind] for kind in before},
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "restore_s": seconds,
        "memcpy_s": memcpy_s,
        "data_bytes": Header.from_json(status["slots"][0]).stripes.data_bytes,
    }
    state.close()
    state.mesh.stop()
    return result


def restart_trainers(tmp_path: Path, layout: Layout) -> list[dict]:
    """All trainers end without a word, and others come to the agents that are there."""
    with nodes.shared_memory() as shm:
        digests = run_ranks(take, NUM_NODES, tmp_path, shm, layout, local_world_size=1)[0]
        results = run_ranks(restore_in_place, NUM_NODES, tmp_path, shm, layout, local_world_size=1)
    for result in results:
        assert result["restored"] == (3, "local_ram", 0, digests[3])
        assert result["sent"]["parity"] == 0
        assert result["before"] == {"parity": 3 * NUM_PARITY * result["data_bytes"], "read": 0}
    return results


def test_new_trainers_go_on_from_their_own_nodes_memory_and_no_parity_is_sent(tmp_path: Path) -> None:
    sent = [result["sent"]["read"] for result in restart_trainers(tmp_path, Layout())]
    # But what is small and held alike by all ranks, such as counts of steps: the first has it, here in one block.
    assert sent == [(NUM_NODES - 1) * BLOCK_BYTES, *[0] * (NUM_NODES - 1)]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_restoring_from_local_memory_beside_copying_as_many_bytes(tmp_path: Path) -> None:
    results = restart_trainers(tmp_path, Layout(hidden_size=768, num_layers=4, vocab_size=4096))
    print("rank       MB  restore s  memcpy s  sent MB")
    for rank, result in enumerate(results):
        size, sent = result["bytes"] / 1e6, result["sent"]["read"] / 1e6
        print(f"{rank:>4} {size:>8.1f} {result['restore_s']:>10.3f} {result['memcpy_s']:>9.3f} {sent:>8.1f}")


def start_small(tmp_path: Path, cluster: nodes.Cluster, num_steps: int) -> tuple[runs.Config, runs.Config]:
    """The undisturbed run, done, and the configuration of the one that is disturbed."""
    num_nodes = len(cluster.nodes)
    calm = nodes.undisturbed(num_nodes, f"train.steps={num_steps}")
    parity = "checkpoint.num_parity_shards=1"
    return calm, nodes.erasure_config(tmp_path, "disturbed", f"train.steps={num_steps}", parity)


def check_same_bits(calm: runs.Config, disturbed: runs.Config) -> None:
    assert committed_steps(runs.checkpoints(disturbed)) == committed_steps(runs.checkpoints(calm))
    runs.assert_same_training(disturbed, calm)


def wait_for_commits(cluster: nodes.Cluster, count: int) -> None:
    """Until every node has committed a snapshot that is `count` steps newer than the newest now."""
    step = cluster.newest_committed() + count
    nodes.wait_until(lambda: all(node.committed() >= step for node in cluster.nodes), f"the commit of step {step}")


def test_agents_that_stop_or_die_are_waited_for_or_started_again_and_no_bit_changes(tmp_path: Path) -> None:
    with nodes.cluster(3) as cluster:
        calm, config = start_small(tmp_path, cluster, num_steps=50)
        attempt = cluster.start(config)
        wait_for_commits(cluster, 2)

        stopped = cluster.nodes[1].running_agent()
        nodes.stop(stopped)
        time.sleep(2.0)
        stopped.resume()
        wait_for_commits(cluster, 2)

        for victims in ([2], [0, 1, 2]):
            agents = [cluster.nodes[victim].running_agent() for victim in victims]
            for agent in agents:
                agent.kill()
            wait_for_commits(cluster, 2)
            assert attempt.is_alive()
            assert not {agent.pid for agent in agents} & {node.running_agent().pid for node in cluster.nodes}

        doomed = [node.running_agent() for node in cluster.nodes]
        attempt.kill()
        for agent in doomed:
            agent.kill()
        attempt.join()
        committed = cluster.newest_committed()
        assert cluster.start(config).join() == [EXIT_DONE] * 3, runs.output(config)

    (recovered,) = runs.events(config, "recovered")
    assert recovered["source"] in ("local_ram", "parity") and recovered["step"] >= committed
    check_same_bits(calm, config)


@pytest.mark.full
def test_a_trainer_that_was_stopped_while_it_copied_changes_nothing_when_it_wakes(tmp_path: Path) -> None:
    with nodes.cluster(3) as cluster:
        calm, config = start_small(tmp_path, cluster, num_steps=40)
        check_old_trainer(cluster, config, stopped_s=3.0)
    check_same_bits(calm, config)


@pytest.mark.soak
def test_a_trainer_that_was_stopped_for_20_s_changes_nothing_when_it_wakes(tmp_path: Path) -> None:
    with nodes.cluster(3) as cluster:
        calm, config = start_small(tmp_path, cluster, num_steps=600)
        check_old_trainer(cluster, config, stopped_s=20.0)
    check_same_bits(calm, config)


def check_old_trainer(cluster: nodes.Cluster, config: runs.Config, stopped_s: float) -> None:
    """The job is started again while a trainer of the attempt before stands still in the middle of a copy."""
    node = cluster.nodes[1]
    old_attempt = cluster.start(config)
    wait_for_commits(cluster, 2)
    old_process = old_attempt.processes[1]
    old_trainer = psutil.Process(old_process.pid)
    node.stop_within(Phase.writing, old_trainer)
    begin = time.monotonic()
    old = next(header for header in node.headers() if header.phase == Phase.writing)
    for process in (old_attempt.processes[0], old_attempt.processes[2]):
        process.kill()

    attempt = cluster.start(config)
    nodes.wait_until(lambda: cluster.has_committed_after(old.snapshot.generation), "a snapshot of the new attempt")
    time.sleep(max(0.0, begin + stopped_s - time.monotonic()))
    assert node.status()["num_stale"] == 0
    old_trainer.resume()
    nodes.wait_until(lambda: node.status()["num_stale"] == 1, "the old trainer's last words")
    assert old_attempt.join()[1] != EXIT_DONE
    with node.client() as client:
        num_refused = refused_words(client, old, store=Path(config.run_dir) / "elsewhere")
    assert node.status()["num_stale"] == 1 + num_refused
    assert attempt.is_alive(), "the words of the old attempt are to come while the new one trains"
    assert attempt.join() == [EXIT_DONE] * 3, runs.output(config)
    assert runs.events(config, "persist_failed") == [], "agents write where this attempt has told them to"


def refused_words(client: AgentClient, old: Header, store: Path) -> int:
    """Says again what a trainer of the attempt before may still have to say. Returns how much of it there was."""
    later = SnapshotId(old.snapshot.generation, old.snapshot.number + 100)
    regions = [[region.position, region.rank, region.offset, region.nbytes] for region in old.regions]
    begin = {"step": old.step, "rank": 1, "regions": regions, "node_bytes": old.node_bytes, "world_size": 3}
    words = [
        ("begin", {"snapshot": old.snapshot, "layout": old.layout, "persist": True, **begin}, None),
        ("begin", {"snapshot": later, "layout": old.layout, "persist": True, **begin}, None),
        ("copied", {"snapshot": old.snapshot, "rank": 1}, np.zeros(4, np.uint8)),
        ("copied", {"snapshot": later, "rank": 1}, np.zeros(4, np.uint8)),
        ("configure", configuration(old.snapshot.generation, store), None),
    ]
    for do, fields, payload in words:
        with pytest.raises(Stale):
            client.ask(do, payload, **fields)
    return len(words)


def configuration(generation: int, store: Path) -> dict:
    return {
        "generation": generation,
        "position": 0,
        "addresses": [["127.0.0.1", 1]] * 3,
        "secret": "00" * 32,
        "num_parity_shards": 1,
        "writer": 0,
        "keep": [],
        "store": str(store),
        "keep_durable": 1,
        "max_send_bytes_per_s": None,
    }


@pytest.mark.full
def test_an_agent_that_was_cut_off_and_replaced_is_listened_to_no_more(tmp_path: Path) -> None:
    """It stands still while its node is given up, and wakes to write to disk what it takes for the newest snapshot."""
    with nodes.cluster(3) as cluster:
        calm, config = start_small(tmp_path, cluster, num_steps=40)
        attempt = cluster.start(config)
        wait_for_commits(cluster, 2)
        cut_off = cluster.nodes[1]
        agent = cut_off.running_agent()
        nodes.stop(agent)
        nodes.kill_trainers(attempt)
        generation = cluster.newest_generation()
        cluster.replace(1)

        attempt = cluster.start(config)
        nodes.wait_until(lambda: cluster.has_committed_after(generation), "a snapshot of the new attempt")
        before = num_refused(cluster)
        agent.resume()
        agent.terminate()
        nodes.wait_until(lambda: num_refused(cluster) > before, "what the old agent has written")
        assert attempt.is_alive()
        assert attempt.join() == [EXIT_DONE] * 3, runs.output(config)
        assert cut_off.headers(), "it still has what nobody wants"
        cut_off.kill_agent()

    (recovered,) = runs.events(config, "recovered")
    assert (recovered["source"], recovered["lost_nodes"]) == ("parity", 1)
    check_same_bits(calm, config)


def num_refused(cluster: nodes.Cluster) -> int:
    """What the agents have refused: strangers, and messages of older attempts."""
    statuses = [node.status() for node in cluster.nodes]
    return sum(status["num_refused"] + status["num_stale"] for status in statuses)
