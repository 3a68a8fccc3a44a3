"""Launchers of several nodes on loopback: they train as one process group does, and end alike, whatever ends them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import launched, nodes, runs

import windlass
from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR

NUM_NODES = 2


def config_of(tmp_path: Path, name: str, *overrides: str) -> runs.Config:
    return runs.run_config(tmp_path, name, *launched.on_nodes(NUM_NODES), *overrides)


def endless(tmp_path: Path, name: str, *overrides: str) -> runs.Config:
    return config_of(tmp_path, name, "train.steps=100000", "checkpoint.persist_every=100000", *overrides)


@pytest.mark.parametrize("is_static", [False, pytest.param(True, marks=pytest.mark.full)])
def test_two_nodes_train_the_bits_of_two_ranks(tmp_path: Path, is_static: bool) -> None:
    """A static job gives each node its rank, and may restart as any other: one of its workers is killed."""
    steps = "train.steps=40" if is_static else "train.steps=8"
    calm = runs.undisturbed(NUM_NODES, steps)
    config = config_of(tmp_path, "launched", steps)
    with launched.machines() as machines:
        ranks = (1, 0) if is_static else (None, None)  # the second to come is the first in rank
        started = [machines.start(config, node_rank=rank) for rank in ranks]
        if is_static:
            launched.wait_for_step(config, 4)
            launched.workers(started[0].launcher)[0].kill()
        assert [machine.join() for machine in started] == [EXIT_DONE] * NUM_NODES, machines.outputs()
        for machine in started:
            assert not any(machine.scratch.glob("windlass-*")) and not any(machine.scratch.glob("pymp-*"))
        if is_static:
            assert [event["count"] for event in runs.events(config, "restart")] == [1]
            assert "done    step 40" in started[1].output and "done" not in started[0].output
    runs.assert_same_training(config, calm)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.full), signal.SIGTERM])
def test_a_signal_to_one_launcher_stops_all_and_the_same_commands_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """Nodes are fixed, so the job cannot do without the one that is told to go. The port is free again at once."""
    config = endless(tmp_path, "stopped")
    with launched.machines() as machines:
        for _ in range(2):
            num_before = len(runs.losses(config)) if (Path(config.run_dir) / "metrics.jsonl").exists() else 0
            started = [machines.start(config) for _ in range(NUM_NODES)]
            launched.wait_for_step(config, num_before + 3)
            launched.send(started[1], number)
            assert [machine.join() for machine in started] == [EXIT_STOPPED] * NUM_NODES, machines.outputs()
    stops = [event["step"] for event in runs.events(config, "preempted")]
    assert len(stops) == 2 and [event["step"] for event in runs.events(config, "recovered")] == stops[:1]


def test_a_node_that_cannot_prepare_its_data_ends_the_job_with_its_message(tmp_path: Path) -> None:
    """The other waits for its rank in the meantime, and is told, by the launcher that all meet at."""
    config = endless(tmp_path, "refused")
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    usable, config.data.cache_dir = config.data.cache_dir, str(in_the_way / "cache")
    with launched.machines() as machines:
        first = machines.start(config)
        launched.wait_for_listener(config.launch.address)
        config.data.cache_dir = usable
        second = machines.start(config)
        assert [first.join(60), second.join(60)] == [EXIT_USER_ERROR] * NUM_NODES, machines.outputs()
        for machine in (first, second):
            assert str(in_the_way) in machine.output and "Traceback" not in machine.output


@pytest.mark.full
def test_a_job_that_has_died_too_often_ends_on_all_nodes(tmp_path: Path) -> None:
    config = endless(tmp_path, "dying", "launch.max_restarts=1")
    with launched.machines() as machines:
        started = [machines.start(config) for _ in range(NUM_NODES)]
        for attempt in range(2):
            nodes.wait_until(
                lambda attempt=attempt: machines.outputs().count("nodes have met") == 2 * (attempt + 1), "an attempt"
            )
            nodes.wait_until(lambda: all(launched.workers(machine.launcher) for machine in started), "workers")
            launched.workers(started[attempt].launcher)[0].kill()
        assert [machine.join(60) for machine in started] == [EXIT_FAILURE] * NUM_NODES, machines.outputs()
        for machine in started:
            assert "died (SIGKILL) and launch.max_restarts=1 is used up; see" in machine.output


def test_without_the_launcher_that_all_meet_at_the_others_end_and_say_so(tmp_path: Path) -> None:
    config = endless(tmp_path, "headless")
    with launched.machines() as machines:
        host = machines.start(config)
        launched.wait_for_listener(config.launch.address)
        other = machines.start(config)
        launched.wait_for_step(config, 3)
        host.lose()
        assert other.join(60) == EXIT_FAILURE, other.output
        assert f"the launcher at launch.address={config.launch.address} is lost" in other.output


def test_nodes_that_differ_do_not_train(tmp_path: Path) -> None:
    config = endless(tmp_path, "differing")
    other = endless(tmp_path, "differing", "optim.lr=0.5", f"launch.address={config.launch.address}")
    with launched.machines() as machines:
        started = [machines.start(config), machines.start(other)]
        assert [machine.join(60) for machine in started] == [EXIT_USER_ERROR] * NUM_NODES, machines.outputs()
        for machine in started:
            assert "windlass: error: optim.lr=" in machine.output and "Traceback" not in machine.output


def be_older() -> None:
    windlass.__version__ = "0.0.1"


def test_another_version_of_windlass_is_named(tmp_path: Path) -> None:
    config = endless(tmp_path, "versions")
    with launched.machines() as machines:
        first = machines.start(config)
        launched.wait_for_listener(config.launch.address)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        second = launched.start_launcher(config, scratch, before=be_older)
        assert [first.join(60), second.wait(60)] == [EXIT_USER_ERROR] * NUM_NODES, first.output + second.output
        for text in (second.output, first.output):
            assert "windlass=0.0.1: on node" in text and "install the same windlass on all nodes" in text


def test_nodes_that_do_not_come_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    config = endless(tmp_path, "lonely", "launch.join_timeout_s=4")
    with launched.machines() as machines:
        lonely = machines.start(config)
        assert lonely.join(60) == EXIT_USER_ERROR
        assert "launch.nnodes=2: 2 nodes are needed, and fewer have come in 4 s" in lonely.output
        assert "waiting for the job's nodes to meet (launch.nnodes=2)" in lonely.output
        assert "Traceback" not in lonely.output
