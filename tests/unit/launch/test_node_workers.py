"""The workers of one node, without any launcher above: real processes that train, die, and are never left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from support import nodes, runs
from support.ranks import end_ranks

from windlass.conf.store import to_yaml
from windlass.errors import EXIT_DONE, EXIT_RESTART, EXIT_STOPPED
from windlass.launch.attempt import Attempt
from windlass.launch.node_workers import Ended, NodeWorkers
from windlass.outcome import Outcome

NUM_RANKS = 2
LONG = ("train.steps=4000", "checkpoint.persist_every=100000")
SECRET = bytes(32)


@pytest.fixture(autouse=True)
def fork_server() -> Iterator[None]:
    """Of these tests alone: a process has one, and that of other tests lets signals through to workers that start."""
    end_ranks()  # the server waits for them
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    yield
    end_ranks()  # of a run to compare with
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that is left to the workers' keeper; it is gone at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield folder
    nodes.wait_until(lambda: not folder.exists(), "the scratch folder to go")


def start(workers: NodeWorkers, number: int = 0) -> None:
    workers.start(Attempt(number, 0, 1, NUM_RANKS, "127.0.0.1", workers.serve_store("127.0.0.1", SECRET), SECRET))


def ends_of(workers: NodeWorkers, timeout_s: float = 90) -> list[Ended]:
    """Waits for all workers of this attempt; returns how they ended, in the order of ranks."""
    deadline = time.monotonic() + timeout_s
    ended: tuple[Ended, ...] = ()
    while len(ended) < NUM_RANKS:
        assert time.monotonic() < deadline, "workers are still running"
        ended = workers.watch(len(ended), 0, True, 1.0).ended
    return sorted(ended, key=lambda end: end.rank)


def outcomes(ends: list[Ended]) -> list[Outcome | None]:
    return [end.outcome for end in ends]


def wait_for_step(config: runs.Config, step: int) -> None:
    path = Path(config.run_dir) / "metrics.jsonl"
    nodes.wait_until(lambda: path.exists() and max(runs.losses(config), default=0) >= step, f"step {step}")


@pytest.mark.slow
def test_an_attempt_trains_as_any_other_start_of_the_ranks_and_is_heard(tmp_path: Path, scratch: Path) -> None:
    calm = runs.undisturbed(NUM_RANKS)
    config = runs.run_config(tmp_path, "kept")
    workers = NodeWorkers(to_yaml(config), scratch)
    start(workers)
    ends = ends_of(workers)
    lines = workers.watch(0, 0, True, 0.0).lines
    assert workers.close() == []

    assert outcomes(ends) == [Outcome(EXIT_DONE, None, rank) for rank in range(NUM_RANKS)]
    assert [line.number for line in lines] == list(range(len(lines)))
    assert any(line.text.startswith("done    step 12") for line in lines)
    runs.assert_same_training(config, calm)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_next_attempt_goes_on(tmp_path: Path, scratch: Path) -> None:
    config = runs.run_config(tmp_path, "killed", "train.steps=40")
    workers = NodeWorkers(to_yaml(config), scratch)
    start(workers)
    wait_for_step(config, 5)
    ranks = {child.name(): child for child in psutil.Process().children(recursive=True)}
    ranks["windlass-1"].kill()
    nodes.wait_until(lambda: len(workers.watch(0, 0, True, 0.1).ended) > 0, "the end of a worker")
    first, second = ends_of(workers)  # it fails by itself
    assert (second.exit_code, second.outcome) == (-signal.SIGKILL, None)
    assert first.exit_code not in (0, EXIT_RESTART) and first.outcome is None
    workers.kill()

    start(workers, number=1)
    assert outcomes(ends_of(workers)) == [Outcome(EXIT_DONE, None, rank) for rank in range(NUM_RANKS)]
    workers.close()
    assert [event["count"] for event in runs.events(config, "restart")] == [1]
    assert not any(nodes.is_running(ranks[f"windlass-{rank}"]) for rank in range(NUM_RANKS))


@pytest.mark.slow
@pytest.mark.full
def test_what_is_asked_by_signal_reaches_the_workers(tmp_path: Path, scratch: Path) -> None:
    config = runs.run_config(tmp_path, "asked", *LONG)
    workers = NodeWorkers(to_yaml(config), scratch)
    start(workers)
    wait_for_step(config, 3)
    workers.signal(signal.SIGTERM)
    assert [end.exit_code for end in ends_of(workers)] == [EXIT_RESTART] * NUM_RANKS

    workers.stop()  # nobody is there to hear it; one that is stopped while others are heard would leave them waiting
    start(workers, number=1)
    assert outcomes(ends_of(workers)) == [
        Outcome(EXIT_STOPPED, None, rank, has_begun=False) for rank in range(NUM_RANKS)
    ]
    workers.close()


@pytest.mark.slow
def test_a_worker_that_cannot_begin_has_its_last_words_kept(tmp_path: Path, scratch: Path) -> None:
    config = runs.run_config(tmp_path, "refused", f"data.path={tmp_path / 'nothing'}")
    workers = NodeWorkers(to_yaml(config), scratch)
    start(workers)
    ends = ends_of(workers)
    lines = workers.watch(0, 0, True, 0.0).lines
    workers.close()
    assert all(end.outcome is not None and end.outcome.exit_code == 2 for end in ends)
    assert any("data.path" in line.text and line.is_error for line in lines)


KEEPER = """
import sys, tempfile, time
from pathlib import Path
from windlass.launch.attempt import Attempt
from windlass.launch.node_workers import NodeWorkers
scratch = tempfile.tempdir = sys.argv[2]
workers = NodeWorkers(Path(sys.argv[1]).read_text(), Path(scratch))
workers.start(Attempt(0, 0, 1, 2, "127.0.0.1", workers.serve_store("127.0.0.1", bytes(32)), bytes(32)))
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.full
def test_nothing_outlives_a_keeper_that_is_killed(tmp_path: Path, scratch: Path) -> None:
    """Workers end without a checkpoint, at once; then the fork server, the store, and the temporary folder go."""
    config = runs.run_config(tmp_path, "orphaned", *LONG)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(tmp_path / "config.yaml"), str(scratch)])
    wait_for_step(config, 3)
    children = psutil.Process(keeper.pid).children(recursive=True)
    assert sum(process.name().startswith("windlass-") for process in children) == NUM_RANKS
    keeper.kill()
    keeper.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not runs.is_committed(config, max(runs.losses(config)))
    assert runs.events(config, "preempted") == []
