"""`launch=ray` on a real cluster: the bits of any other launcher, what it says if it cannot, and that nothing stays."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import nodes, runs
from support.ray_cluster import Driver, RayNodes, is_of_a_job, marked, ray_config, ray_nodes

import windlass
from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from windlass.train.signals import SECOND_PRESS_S

NUM_NODES = 2
LONG = ("train.steps=100000",)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes(NUM_NODES) as cluster:
        yield cluster


def assert_nothing_is_left(cluster: RayNodes, tmp_path: Path, timeout_s: float = 30) -> None:
    cluster.wait_until_left(timeout_s)
    assert left_in(tmp_path / "scratch") == []


def messages(driver: Driver) -> list[str]:
    return [line for _, line in driver.lines if line.startswith("windlass: error: ")]


@pytest.mark.timeout(200)
def test_two_nodes_train_the_bits_of_two_ranks_and_the_driver_shows_them(tmp_path: Path, cluster: RayNodes) -> None:
    calm = runs.undisturbed(NUM_NODES)
    for module in ("hashlib", "selectors", "torch", "windlass"):  # beside the driver: no module of anybody's
        (tmp_path / f"{module}.py").write_text("raise SystemExit('a module of the working directory')")
    variables = tmp_path / "environment.yaml"
    variables.write_text("env_vars: {WINDLASS_TEST_MARK: here}\n")
    config = runs.run_config(
        tmp_path, "ray", "launch=ray", "launch.address=auto", "launch.nnodes=2", f"launch.runtime_env={variables}"
    )
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for("step  1/12")
    workers = [process for node in cluster.nodes for process in marked(node.scratch) if "windlass-" in process.name()]
    assert all(process.environ()["WINDLASS_TEST_MARK"] == "here" for process in workers)

    assert driver.join() == EXIT_DONE, driver.output

    assert driver.said("nodes   2: ") and driver.said("done    step 12")
    runs.assert_same_training(config, calm)
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(200)
def test_ctrl_c_stops_after_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path, cluster: RayNodes) -> None:
    config = ray_config(tmp_path, "stopped", cluster, "2", *LONG)
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for_step(5)
    driver.interrupt()
    assert driver.join() == EXIT_STOPPED, driver.output
    (stopped,) = runs.events(config, "preempted")
    assert [event["step"] for event in runs.events(config, "persisted")] == [stopped["step"]]
    assert_nothing_is_left(cluster, tmp_path)

    config.train.steps = stopped["step"] + 2
    again = Driver(config, tmp_path / "scratch")
    assert again.join() == EXIT_DONE, again.output
    assert again.said(f"resumed at step {stopped['step']}")


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("delay_s", [0.0, *(pytest.param(n / 5, marks=pytest.mark.soak) for n in range(1, 10))])
def test_ctrl_c_while_workers_start_ends_the_job(tmp_path: Path, cluster: RayNodes, delay_s: float) -> None:
    """Whether none, some or all of them have begun."""
    driver = Driver(ray_config(tmp_path, "starting", cluster, "2", *LONG), tmp_path / "scratch")
    driver.wait_for("nodes   2: ")
    time.sleep(delay_s)
    driver.interrupt()
    assert driver.join(30) == EXIT_STOPPED, driver.output
    assert messages(driver) == []
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_second_ctrl_c_ends_a_job_that_cannot_stop(tmp_path: Path, cluster: RayNodes) -> None:
    driver = Driver(ray_config(tmp_path, "stuck", cluster, "2", *LONG), tmp_path / "scratch")
    driver.wait_for_step(5)
    processes = [process for node in cluster.nodes for process in marked(node.scratch)]
    next(process for process in processes if process.name() == "windlass-1").suspend()
    driver.interrupt()
    time.sleep(SECOND_PRESS_S + 0.5)
    assert driver.process.poll() is None, driver.output
    driver.interrupt()
    assert driver.join() == EXIT_FAILURE, driver.output  # agents may have to give up on each other
    assert messages(driver) == ["windlass: error: interrupted"]
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.soak
@pytest.mark.timeout(200)
def test_a_driver_that_is_killed_leaves_nothing_and_what_was_in_memory_is_written(
    tmp_path: Path, cluster: RayNodes
) -> None:
    config = ray_config(tmp_path, "orphaned", cluster, "2", *LONG)
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for_step(5)
    workers = [process for node in cluster.nodes for process in marked(node.scratch) if "windlass-" in process.name()]
    assert len(workers) >= NUM_NODES
    driver.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    cluster.wait_until_left(timeout_s=60)
    assert max(runs.losses(config)) - 3 <= newest_step(config) <= max(runs.losses(config))


def newest_step(config: runs.Config) -> int:
    return max(int(path.name.removeprefix("step-")) for path in runs.checkpoints(config).glob("step-????????"))


@pytest.mark.full
@pytest.mark.soak
@pytest.mark.timeout(200)
def test_a_worker_that_keeps_dying_ends_the_job_with_its_name(tmp_path: Path, cluster: RayNodes) -> None:
    config = ray_config(tmp_path, "dying", cluster, "2", *LONG, "launch.max_restarts=0")
    driver = Driver(config, tmp_path / "scratch")
    driver.wait_for_step(3)
    victim = next(
        process for node in cluster.nodes for process in marked(node.scratch) if process.name() == "windlass-1"
    )
    victim.kill()
    assert driver.join() == EXIT_FAILURE, driver.output
    assert messages(driver) == [
        f"windlass: error: rank 1 died (SIGKILL) and launch.max_restarts=0 is used up; see {config.run_dir}/logs/"
    ]
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.soak
@pytest.mark.timeout(200)
def test_what_one_rank_refuses_ends_the_job_with_its_words(tmp_path: Path, cluster: RayNodes) -> None:
    config = ray_config(tmp_path, "refused", cluster, "2", f"data.path={tmp_path / 'nothing'}")
    driver = Driver(config, tmp_path / "scratch")
    assert driver.join() == EXIT_USER_ERROR, driver.output
    (message,) = messages(driver)
    assert "data.path" in message and "Traceback" not in driver.output
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_cluster_that_is_too_small_says_what_it_has(tmp_path: Path, cluster: RayNodes) -> None:
    config = ray_config(tmp_path, "big", cluster, "3", "launch.wait_for_nodes_s=1")
    driver = Driver(config, tmp_path / "scratch")
    assert driver.join() == EXIT_USER_ERROR, driver.output
    assert driver.said("waiting for 3 of 3 nodes")
    (message,) = messages(driver)
    assert message.startswith("windlass: error: launch.nnodes=3: needs 3 nodes with 1 CPU free on each")
    assert message.count("with 1 CPU") == 1 + NUM_NODES and "Traceback" not in driver.output
    assert_nothing_is_left(cluster, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("package", ["windlass", pytest.param("torch", marks=pytest.mark.soak)])
def test_a_node_with_another_version_is_named(tmp_path: Path, cluster: RayNodes, package: str) -> None:
    other = tmp_path / "other"
    if package == "windlass":
        shutil.copytree(Path(windlass.__file__).parent, other / "windlass")
        init = other / "windlass" / "__init__.py"
        init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', init.read_text()))
    else:
        info = other / "torch-9.9.9.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    node = cluster.add(PYTHONPATH=str(other))
    cluster.cluster.wait_for_nodes()
    try:
        driver = Driver(ray_config(tmp_path, "mixed", cluster, "3"), tmp_path / "scratch")
        assert driver.join() == EXIT_USER_ERROR, driver.output
        (message,) = messages(driver)
        assert message.startswith(f"windlass: error: {package}=9.9.9: ") and node.id[:8] in message
        assert "Traceback" not in driver.output
        assert_nothing_is_left(cluster, tmp_path)
    finally:
        cluster.lose(node)


@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_cluster_of_its_own_on_this_machine_goes_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # which the cluster of other tests has set
    config = runs.run_config(tmp_path, "local", "launch=ray", "launch.address=local", *LONG)
    with nodes.shared_memory() as shm:
        driver = Driver(config, tmp_path / "scratch", WINDLASS_SHM_DIR=str(shm))
        driver.wait_for_step(3)
        driver.interrupt()
        assert driver.join() == EXIT_STOPPED, driver.output
    nodes.wait_until(lambda: not any(map(is_of_a_job, marked(tmp_path / "scratch"))), "the end of all processes")
    assert left_in(tmp_path / "scratch") == []


def left_in(scratch: Path) -> list[Path]:
    """But for what torch keeps."""
    return [path for path in scratch.iterdir() if not path.name.startswith("torchinductor")]
