"""Machines of a torchrun job are lost, come back, and are taken back; the job recovers from memory by itself."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support import launched, nodes, runs
from support.launched import Recovery, beside_the_bar

from windlass.data.loader import Loader
from windlass.data.prepare import prepared_folder
from windlass.data.shards import TokenDataset
from windlass.errors import EXIT_DONE, EXIT_STOPPED

NUM_NODES = 4


def config_of(tmp_path: Path, name: str, *overrides: str) -> runs.Config:
    own = ("checkpoint.num_parity_shards=1", *launched.on_nodes(NUM_NODES), "launch.max_restarts=100")
    return nodes.erasure_config(tmp_path, name, *own, *overrides)


def replace(machines: launched.Machines, running: list[launched.Machine], victim: int, config: runs.Config) -> Recovery:
    """Loses a machine, starts another in its place, and waits until a step that was not there before."""
    num_met, num_recovered = running[victim - 1].output.count("nodes have met"), len(recoveries(config))
    newest = launched.newest_step(config)
    begin = time.time()
    running[victim].lose()
    running[victim] = machines.start(config)
    nodes.wait_until(lambda: running[victim - 1].output.count("nodes have met") > num_met, "the nodes to meet")
    met = time.time()
    nodes.wait_until(lambda: running[victim].node.committed() > 0, "the lost part")
    decoded = time.time()
    nodes.wait_until(lambda: len(recoveries(config)) > num_recovered, "a recovery")
    nodes.wait_until(lambda: launched.newest_step(config) > newest, "a step")
    end = time.time()
    event = recoveries(config)[-1]
    assert (event["source"], event["lost_nodes"]) == ("parity", 1), event
    asked = event["time"] - event["seconds"]
    return Recovery(met - begin, asked - met, decoded - asked, event["time"] - decoded, end - event["time"])


def recoveries(config: runs.Config) -> list[dict]:
    return runs.events(config, "recovered")


def survive(tmp_path: Path, num_steps: int, num_kills: int, seed: int) -> list[Recovery]:
    """Runs undisturbed, then with machines that are lost and replaced, and compares."""
    calm = nodes.undisturbed(NUM_NODES, f"train.steps={num_steps}")
    config = config_of(tmp_path, "stormy", f"train.steps={num_steps}")
    randomness = random.Random(seed)
    found = []
    with launched.machines() as machines:
        host = machines.start(config)
        launched.wait_for_listener(config.launch.address)
        running = [host] + [machines.start(config) for _ in range(NUM_NODES - 1)]
        try:
            launched.wait_for_step(config, 3)
            for _ in range(num_kills):
                time.sleep(randomness.uniform(0.0, 0.2))
                found.append(replace(machines, running, randomness.randrange(1, NUM_NODES), config))
            assert [machine.join(200) for machine in running] == [EXIT_DONE] * NUM_NODES
        except AssertionError as error:
            raise AssertionError(f"{error}\n{machines.stacks()}") from error
        for machine in running:
            machine.node.wait_until_left()

    runs.assert_same_training(config, calm)
    assert [event["step"] for event in runs.events(config, "persisted")] == [num_steps], "none was needed on the way"
    return found


@pytest.mark.timeout(300)
def test_a_machine_is_lost_and_replaced_and_the_bits_are_the_same(tmp_path: Path) -> None:
    for recovery in survive(tmp_path, num_steps=40, num_kills=1, seed=7):
        print(recovery.row)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_machines_are_lost_in_one_run(tmp_path: Path) -> None:
    found = survive(tmp_path, num_steps=500, num_kills=10, seed=11)
    print("from the kill to the next step = detect + restart processes + decode + load + first step")
    for recovery in found:
        print(recovery.row)
    print(beside_the_bar(found))


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_job_shrinks_grows_and_lets_a_machine_go_and_every_sample_is_seen_once(tmp_path: Path) -> None:
    """4 nodes, one is lost and none comes; another comes; one is told to go."""
    config = config_of(
        tmp_path,
        "elastic",
        "launch.nnodes=3:4",
        "launch.wait_for_nodes_s=1",
        "model.dropout=0.0",
        "data.borders=none",
        "train.steps=100000",
    )
    with launched.machines() as machines:
        running = [machines.start(config)]
        launched.wait_for_listener(config.launch.address)
        running += [machines.start(config) for _ in range(NUM_NODES - 1)]
        try:
            # The fourth may come after the first attempt began without it: that is one more restart.
            wait_for_attempt(config, 4)
            recovered_before, restarts_before = len(recoveries(config)), len(runs.events(config, "restart"))
            running.pop().lose()
            wait_for_attempt(config, 3)
            running.append(machines.start(config))
            wait_for_attempt(config, 4)
            leaving = running.pop()
            launched.send(leaving, signal.SIGTERM)
            assert leaving.join() == EXIT_STOPPED
            leaving.node.wait_until_left()
            wait_for_attempt(config, 3)
            launched.send(running[0], signal.SIGINT)
            assert [machine.join() for machine in running] == [EXIT_STOPPED] * 3
        except AssertionError as error:
            raise AssertionError(f"{error}\n{machines.outputs()}") from error
    recovered = recoveries(config)[recovered_before:]
    assert [event["source"] for event in recovered][:2] == ["parity", "local_ram"]
    assert len(runs.events(config, "restart")) == restarts_before + 3
    assert delivered_once(config)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_worker_that_dies_while_all_are_asked_to_end_is_not_waited_for(tmp_path: Path) -> None:
    """The launchers are ending the attempt by then, for a node that came, and would give workers 10 minutes to save."""
    config = config_of(
        tmp_path, "asked", "launch.nnodes=2:3", "launch.wait_for_nodes_s=1", "model.dropout=0.0", "train.steps=100000"
    )
    with launched.machines() as machines:
        running = [machines.start(config)]
        launched.wait_for_listener(config.launch.address)
        running.append(machines.start(config))
        try:
            wait_for_attempt(config, 2)
            (first,), (second,) = (launched.workers(machine.launcher) for machine in running)
            first.suspend()
            second.suspend()  # as one that waits for the first
            running.append(machines.start(config))
            nodes.wait_until(lambda: is_asked_to_end(first) and is_asked_to_end(second), "both to be asked to end")
            first.kill()
            wait_for_attempt(config, 3)
            launched.send(running[0], signal.SIGINT)
            assert [machine.join() for machine in running] == [EXIT_STOPPED] * 3
        except AssertionError as error:
            raise AssertionError(f"{error}\n{machines.stacks()}") from error


def is_asked_to_end(worker: psutil.Process) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def wait_for_attempt(config: runs.Config, num_nodes: int) -> None:
    """Until an attempt of so many nodes has made some steps since the last one began."""
    is_so = lambda: runs.events(config, "start")[-1]["world_size"] == num_nodes  # noqa: E731
    path = Path(config.run_dir) / "events.jsonl"
    nodes.wait_until(lambda: path.exists() and bool(runs.events(config, "start")) and is_so(), f"{num_nodes} nodes")
    launched.wait_for_step(config, runs.events(config, "start")[-1]["step"] + 8)


def delivered_once(config: runs.Config) -> bool:
    """Replays the loaders of every rank of every attempt over the steps it kept: no sample twice, none left out."""
    starts = [(event["step"], event["world_size"]) for event in runs.events(config, "start")]
    end = runs.events(config, "preempted")[-1]["step"]
    dataset = TokenDataset(prepared_folder(config.data, progress=False), "train")
    common = {"seq_len": config.train.seq_len, "seed": config.train.seed, "borders": config.data.borders}
    rows: list[bytes] = []
    for (first, num_ranks), (last, _) in zip(starts, [*starts[1:], (end, 0)], strict=True):
        cursor = len(rows)
        for rank in range(num_ranks):
            loader = Loader(dataset, batch_size=1, data_rank=rank, num_data_ranks=num_ranks, cursor=cursor, **common)
            rows += [next(loader).input_ids.numpy().tobytes() for _ in range(last - first)]
            loader.close()
    whole = Loader(dataset, batch_size=len(rows), data_rank=0, num_data_ranks=1, **common)
    undivided = [row.tobytes() for row in next(whole).input_ids.numpy()]
    whole.close()
    return np.array_equal(sorted(rows), sorted(undivided)) and samples_of(runs.checkpoints(config)) == len(rows)


def samples_of(directory: Path) -> int:
    """How far the loader of the newest checkpoint is."""
    newest = max(directory.glob("step-????????"))
    return json.loads((newest / "manifest.json").read_text())["body"]["objects"]["data"]["cursor"]
