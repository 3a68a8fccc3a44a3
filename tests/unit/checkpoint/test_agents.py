"""Listing the agents of a node, and ending those of a job."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agents import Cluster, shared_memory, wait_until

from windlass.checkpoint import inspect
from windlass.checkpoint.agent.folder import AgentFolder
from windlass.checkpoint.agent.listing import end_agents, job_name, list_agents, render_agents, users_of
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.cli import main
from windlass.errors import EXIT_DONE, EXIT_USER_ERROR


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Cluster]:
    """One node with an agent; its shared memory is `node.root / "node0"`."""
    with shared_memory() as root:
        nodes = Cluster(root, 1, 0, tmp_path / "checkpoints")
        try:
            nodes.open()
            yield nodes
        finally:
            nodes.close()


def shm_of(node: Cluster) -> Path:
    return node.root / "node0"


def test_a_job_is_a_place_and_what_tells_it_from_an_earlier_one_there(tmp_path: Path) -> None:
    assert job_name(tmp_path, "abc") == f"{tmp_path}#abc"
    assert job_name("s3://bucket/run#1", "abc").rpartition("#")[0] == "s3://bucket/run#1"


def test_an_agent_is_listed_with_what_it_holds(node: Cluster) -> None:
    node.take(7)
    (row,) = list_agents(shm_of(node))
    assert row.path == str(node.folder(0).path)
    assert row.job == str(node.store)
    assert (row.pid, row.num_trainers, row.generation, row.step) == (node.pids[0], 1, 1, 7)
    held = [path.stat().st_size for path in node.folder(0).path.glob("*.data")]
    assert row.num_bytes == sum(held) > 0
    assert 0 < row.lease_left_s <= node.lease_s


def test_what_a_killed_agent_has_left_is_listed(node: Cluster) -> None:
    node.take(7)
    node.kill(0)
    (row,) = list_agents(shm_of(node))
    assert (row.pid, row.step) == (None, None)
    assert row.num_bytes >= sum(path.stat().st_size for path in node.folder(0).path.glob("*.data")) > 0
    assert row.job == str(node.store)


def test_a_folder_without_a_lease_is_listed(tmp_path: Path) -> None:
    AgentFolder.of("a job", tmp_path).make()
    (row,) = list_agents(tmp_path)
    assert (row.job, row.pid, row.num_bytes, row.lease_left_s) == ("?", None, 0, 0.0)


def test_where_there_are_none_that_is_said(tmp_path: Path) -> None:
    assert list_agents(tmp_path) == []
    assert render_agents([], as_json=False) == "no snapshot agents of yours on this node"
    assert json.loads(render_agents([], as_json=True)) == []


def test_the_command_prints_a_table_and_json(node: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    node.take(7)
    assert main(["ckpt", "agents", "--shm-dir", str(shm_of(node))]) == EXIT_DONE
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["pid", "trainers", "step", "memory", "lease", "job"]
    assert row.split()[:3] == [str(node.pids[0]), "1", "7"]
    assert str(node.store) in row and str(node.folder(0).path) in row
    assert main(["ckpt", "agents", "--json", "--shm-dir", str(shm_of(node))]) == EXIT_DONE
    (document,) = json.loads(capsys.readouterr().out)
    assert (document["pid"], document["step"]) == (node.pids[0], 7)
    node.kill(0)
    assert main(["ckpt", "agents", "--shm-dir", str(shm_of(node))]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["gone", "0", "-"]


def test_the_command_refuses_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "agents", "--shm-dir", str(tmp_path / "missing")]) == EXIT_USER_ERROR
    assert "checkpoint.shm_dir" in capsys.readouterr().err


def test_ending_writes_what_only_memory_has(node: Cluster) -> None:
    node.take(7)
    assert end_agents(node.store, shm_of(node)) == []
    assert not node.folder(0).path.exists()
    assert committed_steps(Path(node.store)) == [7]
    assert all(result.is_sound for result in inspect.verify(node.store))


class OneMachine(Cluster):
    """Its nodes are ranks of one machine, which have agents of their own in the same shared memory."""

    def folder(self, node: int) -> AgentFolder:
        return AgentFolder.of("a job", self.root, f"r{node}")


@pytest.mark.slow
def test_ending_all_agents_of_a_machine_writes_what_they_have_together(tmp_path: Path) -> None:
    with shared_memory() as root:
        nodes = OneMachine(root, 3, 1, tmp_path / "checkpoints")
        try:
            nodes.open()
            nodes.take(7)
            assert end_agents(nodes.store, root) == []
        finally:
            nodes.close()
        assert committed_steps(tmp_path / "checkpoints") == [7]
        assert all(result.is_sound for result in inspect.verify(nodes.store))


def test_ending_leaves_other_jobs_alone(node: Cluster, tmp_path: Path) -> None:
    assert end_agents(tmp_path / "other", shm_of(node)) == []
    assert node.status(0)["pid"] == node.pids[0]


def test_ending_removes_what_a_killed_agent_has_left(node: Cluster) -> None:
    node.take(7)
    node.kill(0)
    assert end_agents(node.store, shm_of(node)) == []
    assert not node.folder(0).path.exists()


def test_an_agent_that_does_not_leave_is_named(node: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.checkpoint.agent.listing.END_S", 0.2)
    monkeypatch.setattr("windlass.checkpoint.agent.client.ANSWER_S", 0.2)
    node.signal(0, signal.SIGSTOP)
    try:
        assert end_agents(node.store, shm_of(node)) == [node.folder(0).path]
    finally:
        node.signal(0, signal.SIGCONT)


def test_who_uses_the_agents_of_a_job_is_known(node: Cluster, tmp_path: Path) -> None:
    """A launcher whose run was refused must not end those of the run that has the folder."""
    assert users_of(node.store, shm_of(node)) == set(), "this process does not count"
    code = (
        "import sys; from pathlib import Path; from windlass.checkpoint.agent.folder import AgentFolder\n"
        "connection = AgentFolder(Path(sys.argv[1])).connect(); print('there', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(node.folder(0).path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"there\n"
        wait_until(lambda: users_of(node.store, shm_of(node)) == {other.pid}, "the agent to see it")
        assert users_of(tmp_path / "other", shm_of(node)) == set()
        other.communicate()
    wait_until(lambda: users_of(node.store, shm_of(node)) == set(), "the agent to see that it has gone")
