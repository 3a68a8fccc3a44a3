"""Nodes of a Ray cluster are lost, come back and are told to go while a job runs; it goes on from memory."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import nodes, runs
from support.launched import Recovery, beside_the_bar
from support.ray_cluster import Driver, RayletNode, RayNodes, ray_config, ray_nodes

from windlass.data.loader import Loader
from windlass.data.prepare import prepared_folder
from windlass.data.shards import TokenDataset
from windlass.errors import EXIT_DONE

NUM_NODES = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes(NUM_NODES) as cluster:
        yield cluster


def in_use(cluster: RayNodes, driver: Driver) -> list[RayletNode]:
    """The nodes with a worker, in the order of ranks, by what the driver has said when it began."""
    driver.wait_for("nodes   ")
    line = next(text for _, text in driver.lines if text.startswith("nodes   "))
    return sorted((node for node in cluster.nodes if node.id[:8] in line), key=lambda node: line.index(node.id[:8]))


def recoveries(config: runs.Config) -> list[dict]:
    return runs.events(config, "recovered")


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_lost_node_is_replaced_and_the_bits_are_the_same(tmp_path: Path, cluster: RayNodes) -> None:
    calm = nodes.undisturbed(NUM_NODES, "train.steps=60")
    config = ray_config(tmp_path, "stormy", cluster, str(NUM_NODES), "train.steps=60")
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for_step(8)
    victim = in_use(cluster, driver)[1]
    cluster.lose(victim)
    cluster.add()

    assert driver.join() == EXIT_DONE, driver.output

    assert driver.said(f"({victim.id[:8]}) is lost; waiting for another")
    (recovered,) = recoveries(config)
    assert (recovered["source"], recovered["lost_nodes"]) == ("parity", 1)
    assert recovered["step"] >= 7
    assert [event["step"] for event in runs.events(config, "persisted")] == [60], "no durable checkpoint was needed"
    runs.assert_same_training(config, calm)
    cluster.wait_until_left()
    assert list((tmp_path / "scratch").glob("windlass*")) == []


@pytest.mark.full
@pytest.mark.timeout(240)
def test_without_a_replacement_it_goes_on_with_three_and_grows_when_a_node_comes(
    tmp_path: Path, cluster: RayNodes
) -> None:
    config = ray_config(
        tmp_path,
        "changing",
        cluster,
        f"{NUM_NODES - 1}:{NUM_NODES}",
        "model.dropout=0.0",
        "data.borders=none",
        "train.steps=100000",
        "launch.wait_for_nodes_s=3",
    )
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for_step(8)
    victim = in_use(cluster, driver)[-1]
    cluster.lose(victim)
    driver.wait_for(f"({victim.id[:8]}) is lost; waiting up to 3 s for another")
    driver.wait_for("going on with 3 nodes")
    nodes.wait_until(lambda: len(recoveries(config)) == 1, "a recovery")
    driver.wait_for_step(recoveries(config)[0]["step"] + 8)
    cluster.add()
    driver.wait_for("can join: the workers start again")
    nodes.wait_until(lambda: len(recoveries(config)) == 2, "a recovery")
    shrunk, grown = recoveries(config)
    driver.wait_for_step(grown["step"] + 8)
    driver.interrupt()
    assert driver.join() == 75, driver.output

    assert (shrunk["source"], shrunk["lost_nodes"]) == ("parity", 1)
    assert grown["source"] in ("local_ram", "durable") and grown["lost_nodes"] == 0
    assert [event["world_size"] for event in runs.events(config, "start")] == [4, 3, 4]
    (stopped,) = runs.events(config, "preempted")
    ends = [0, shrunk["step"], grown["step"], stopped["step"]]
    attempts = [(ranks, last - first) for ranks, (first, last) in zip((4, 3, 4), pairwise(ends), strict=True)]
    assert samples_of(config) == sum(ranks * steps for ranks, steps in attempts)
    assert seen_once(config, attempts)
    cluster.wait_until_left()


def samples_of(config: runs.Config) -> int:
    """That the newest checkpoint has seen."""
    newest = max(path for path in runs.checkpoints(config).glob("step-????????"))
    return json.loads((newest / "manifest.json").read_text())["body"]["objects"]["data"]["cursor"]


def seen_once(config: runs.Config, attempts: list[tuple[int, int]]) -> bool:
    """Replays the loaders of every attempt, of so many ranks and steps: no sample twice, none left out."""
    dataset = TokenDataset(prepared_folder(config.data, progress=False), "train")
    common = {"seq_len": config.train.seq_len, "seed": config.train.seed, "borders": config.data.borders}
    rows: list[bytes] = []
    cursor = 0
    for num_ranks, num_steps in attempts:
        for rank in range(num_ranks):
            loader = Loader(dataset, batch_size=1, data_rank=rank, num_data_ranks=num_ranks, cursor=cursor, **common)
            rows += [next(loader).input_ids.numpy().tobytes() for _ in range(num_steps)]
            loader.close()
        cursor += num_ranks * num_steps
    whole = Loader(dataset, batch_size=cursor, data_rank=0, num_data_ranks=1, **common)
    undivided = [row.tobytes() for row in next(whole).input_ids.numpy()]
    whole.close()
    return np.array_equal(sorted(rows), sorted(undivided))


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_node_that_drains_leaves_after_a_checkpoint(tmp_path: Path, cluster: RayNodes) -> None:
    config = ray_config(tmp_path, "drained", cluster, "2:3", "train.steps=100000", "launch.wait_for_nodes_s=5")
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for("nodes   3")
    driver.wait_for_step(5)
    spare = next(node for node in cluster.nodes if node not in in_use(cluster, driver))
    cluster.lose(spare)  # so that there is no other
    leaver = in_use(cluster, driver)[1]
    cluster.drain(leaver)
    driver.wait_for("has left")
    nodes.wait_until(lambda: len(recoveries(config)) == 1, "a recovery")
    (recovered,) = recoveries(config)
    (left,) = runs.events(config, "leaving")
    assert recovered["step"] == left["step"], "no step was lost"
    driver.wait_for_step(recovered["step"] + 3)
    nodes.wait_until(lambda: not leaver.left(), "the node to be empty")
    driver.interrupt()
    assert driver.join() == 75, driver.output
    cluster.wait_until_left()


def recovery_after(killed_at: float, victim: RayletNode, driver: Driver, num_before: int) -> Recovery:
    config = driver.config
    driver.wait_for(f"({victim.id[:8]}) is lost")
    detected_at = next(at for at, line in driver.lines if f"({victim.id[:8]}) is lost" in line)
    driver.wait_until(lambda: len(recoveries(config)) > num_before, "a recovery")
    event = recoveries(config)[num_before]
    driver.wait_until(lambda: bool(steps_after(config, event["time"])), "a step")
    finished_at = steps_after(config, event["time"])[0]
    load = event["seconds"] - event["decode_s"]
    restart = event["time"] - event["seconds"] - detected_at
    return Recovery(detected_at - killed_at, restart, event["decode_s"], load, finished_at - event["time"])


def steps_after(config: runs.Config, moment: float) -> list[float]:
    """When steps were finished since."""
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["time"] for record in records if "train/loss" in record and record["time"] > moment]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_in_one_run_end_with_the_same_bits(tmp_path: Path) -> None:
    """Each time any node of the job is lost and a spare takes its place, and a new spare comes."""
    num_steps, randomness = 600, random.Random(10)
    calm = nodes.undisturbed(NUM_NODES, f"train.steps={num_steps}")
    found: list[Recovery] = []
    with ray_nodes(NUM_NODES + 1) as cluster:
        config = ray_config(tmp_path, "stormy", cluster, str(NUM_NODES), f"train.steps={num_steps}")
        driver = Driver(config, tmp_path / "scratch")
        for number in range(10):
            driver.wait_for_step(8 if number == 0 else recoveries(config)[-1]["step"] + 5)
            victim = randomness.choice([node for node in cluster.nodes if node.processes_of_job()])
            killed_at = time.time()
            cluster.lose(victim)
            found.append(recovery_after(killed_at, victim, driver, num_before=number))
            print(found[-1].row, flush=True)
            cluster.add()
        assert driver.join(300) == EXIT_DONE, driver.output
        cluster.wait_until_left()
    assert [event["source"] for event in recoveries(config)] == ["parity"] * 10
    runs.assert_same_training(config, calm)
    print(beside_the_bar(found))
