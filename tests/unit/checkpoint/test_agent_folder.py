"""The folder of an agent: one agent at a time, nobody else's, and kept for as long as its lease says."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agents import shared_memory, wait_until
from support.ranks import CONTEXT

from windlass.checkpoint.agent import folder as agent_folder
from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.folder import (
    UNLEASED_S,
    AgentFolder,
    Lease,
    folders,
    remove_expired,
    root,
    uptime,
)
from windlass.checkpoint.net.handshake import TransportError
from windlass.errors import ConfigError, RunFolderError


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


@pytest.fixture
def folder(shm: Path) -> AgentFolder:
    made = AgentFolder.of("a job", shm)
    made.make()
    return made


def test_jobs_nodes_and_members_have_folders_of_their_own(shm: Path) -> None:
    paths = {AgentFolder.of(job, shm, member).path for job in ("a", "b") for member in ("", "r0", "r1")}
    assert len(paths) == 6
    assert {path.parent for path in paths} == {root(shm)}
    assert AgentFolder.of("a", shm).path == AgentFolder.of("a", shm).path


def test_only_its_owner_can_open_a_folder(folder: AgentFolder) -> None:
    for path in (folder.path, folder.path.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    folder.make()  # again: it is there


@pytest.mark.parametrize("which", ["the job's", "the user's"])
@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_that_is_open_to_others_is_refused(which: str, mode: int, folder: AgentFolder) -> None:
    path = folder.path if which == "the job's" else folder.path.parent
    path.chmod(mode)
    with pytest.raises(RunFolderError, match="is open to others") as raised:
        folder.make()
    assert "checkpoint.shm_dir" in str(raised.value) and "Fix: " in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_owner_is_refused(folder: AgentFolder) -> None:
    """Whoever made it first, at a name that anybody can compute, could read what is put there."""
    os.chown(folder.path, 54321, -1)
    with pytest.raises(RunFolderError, match="is open to others"):
        folder.make()


def test_a_link_in_its_place_is_refused(shm: Path) -> None:
    (shm / "elsewhere").mkdir(mode=0o700)
    root(shm).symlink_to(shm / "elsewhere")
    with pytest.raises(RunFolderError, match=r"checkpoint\.shm_dir"):
        AgentFolder.of("a job", shm).make()


def test_a_file_in_its_place_is_the_users_to_mend(shm: Path) -> None:
    root(shm).write_text("")
    with pytest.raises(RunFolderError, match="Fix: "):
        AgentFolder.of("a job", shm).make()


def test_shared_memory_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.shm_dir=.*missing: is not a folder"):
        root(tmp_path / "missing")


# --- The lock. ---


def hold(path: Path, ready: threading.Event, done: threading.Event) -> None:
    with AgentFolder(path).locked() as is_ours:
        assert is_ours
        ready.set()
        done.wait()


def test_there_is_one_agent_at_a_time(folder: AgentFolder) -> None:
    assert not folder.has_agent()
    with folder.locked() as is_ours:
        assert is_ours
        with folder.locked() as is_second:
            assert not is_second
        assert folder.has_agent()
    assert not folder.has_agent()


def test_the_lock_goes_with_its_process(folder: AgentFolder) -> None:
    ready, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(folder.path, ready, done))
    process.start()
    assert ready.wait(30)
    assert folder.has_agent()
    process.kill()
    process.join()
    assert not folder.has_agent()


def test_a_folder_that_is_gone_has_no_agent(folder: AgentFolder) -> None:
    folder.remove()
    assert not folder.has_agent()
    assert not folder.path.parent.exists(), "the last job's folder takes the user's with it"


def test_the_users_folder_stays_while_another_job_is_there(folder: AgentFolder, shm: Path) -> None:
    other = AgentFolder.of("another job", shm)
    other.make()
    folder.remove()
    assert [found.path for found in folders(shm)] == [other.path]


def test_only_what_an_agent_has_left_is_removed(folder: AgentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_folder, "GONE_S", 0.05)
    with folder.locked():
        folder.remove_if_left()
        assert folder.path.exists()
    folder.remove_if_left()
    assert not folder.path.exists()


# --- The lease. ---


def expire(folder: AgentFolder) -> None:
    folder.touch("a job", -1.0)


def test_a_lease_says_whose_it_is_and_how_long(folder: AgentFolder) -> None:
    before = uptime()
    folder.touch("a job", 60.0)
    lease = folder.lease()
    assert lease is not None
    assert (lease.job, lease.seconds) == ("a job", 60.0)
    assert before <= lease.touched <= uptime()
    assert not lease.is_over
    assert Lease("a job", 60.0, uptime() - 61).is_over


@pytest.mark.parametrize("shift", [-1e9, -3600.0, 3600.0, 1e9])
def test_setting_the_clock_changes_no_lease(shift: float, folder: AgentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch("a job", 60.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    lease = folder.lease()
    assert lease is not None and not lease.is_over
    assert remove_expired(folder.path.parent.parent) == []
    folder.touch("a job", 60.0)
    monkeypatch.undo()
    lease = folder.lease()
    assert lease is not None and not lease.is_over
    expire(folder)
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    assert remove_expired(folder.path.parent.parent) == [folder.path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"job": "a job"}', '{"job": "x", "seconds": 1, "touched": 2, "z": 3}']
)
def test_a_lease_that_says_nothing_keeps_the_folder(text: str, folder: AgentFolder, shm: Path) -> None:
    """Another version may have written it, or its agent is about to."""
    (folder.path / "lease").write_text(text)
    assert folder.lease() is None
    assert remove_expired(shm) == []
    assert folder.path.exists()


def test_what_is_over_goes_and_what_lives_stays(shm: Path) -> None:
    over, living, leased, new = (AgentFolder.of(name, shm) for name in ("over", "living", "leased", "new"))
    for each in (over, living, leased, new):
        each.make()
    expire(over)
    expire(living)
    leased.touch("leased", 60.0)
    with living.locked():
        assert remove_expired(shm) == [over.path]
    assert [each.path.exists() for each in (over, living, leased, new)] == [False, True, True, True]
    assert remove_expired(shm) == [living.path]


def test_what_no_agent_came_up_for_goes(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, starting = (AgentFolder.of(name, shm) for name in ("left", "starting"))
    left.make()
    others = left.path.parent / "mine"
    others.mkdir()
    assert remove_expired(shm) == [], "an agent may be about to come up"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + UNLEASED_S + 1)
    with left.locked():
        assert remove_expired(shm) == [], "one has come up, and is about to write its lease"
    starting.make()
    assert set(remove_expired(shm)) == {left.path, starting.path}
    assert others.exists()


# --- Agents of it. ---


@pytest.mark.slow
def test_an_agent_is_found_or_started_and_outlives_who_started_it(
    folder: AgentFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("json", "logging", "windlass"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('a module of the working directory')")
    monkeypatch.chdir(tmp_path)
    make, removed = AgentFolder.make, []

    def make_and_lose(self: AgentFolder) -> None:
        """Another agent takes the new folder for one that was left."""
        make(self)
        if len(removed) < 2:
            removed.append(shutil.rmtree(self.path))

    monkeypatch.setattr(AgentFolder, "make", make_and_lose)
    client = AgentClient(folder.start_agent("/nowhere#1", 2, "127.0.0.1", 60.0))
    status = client.ask("status")
    assert os.getsid(status["pid"]) == status["pid"], "a session of its own: no signal to a group reaches it"
    again = AgentClient(folder.start_agent("/nowhere#1", 2, "127.0.0.1", 60.0))
    assert again.ask("status")["incarnation"] == status["incarnation"]
    assert folder.has_agent()
    again.close()
    client.ask("end", rank=0, num_local_ranks=1, persist=False)
    client.close()
    wait_until(lambda: not folder.path.exists(), "the agent's leaving")


@pytest.mark.slow
def test_threads_that_start_an_agent_at_once_get_the_same(folder: AgentFolder) -> None:
    found: list[str] = []

    def start() -> None:
        client = AgentClient(folder.start_agent("/nowhere#1", 2, "127.0.0.1", 60.0))
        found.append(client.ask("status")["incarnation"])
        client.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    client = AgentClient(folder.connect())
    client.ask("end", rank=0, num_local_ranks=1, persist=False)
    client.close()
    wait_until(lambda: not folder.path.exists(), "the agent's leaving")


@pytest.mark.slow
def test_a_long_path_has_an_agent_too(shm: Path) -> None:
    """The system takes about 100 characters for the name of a socket."""
    deep = shm / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    folder = AgentFolder.of("a job", deep)
    client = AgentClient(folder.start_agent("/nowhere#1", 2, "127.0.0.1", 60.0))
    assert client.ask("status")["num_trainers"] == 1
    client.ask("end", rank=0, num_local_ranks=1, persist=False)
    client.close()
    wait_until(lambda: not folder.path.exists(), "the agent's leaving")


def test_without_an_agent_there_is_nothing_to_connect_to(folder: AgentFolder) -> None:
    with pytest.raises(TransportError, match="there is no snapshot agent"):
        folder.connect()
    (folder.path / "agent.sock").write_text("left by a killed one")
    with pytest.raises(TransportError, match="there is no snapshot agent"):
        folder.connect()


def test_an_agent_that_cannot_start_says_why(folder: AgentFolder) -> None:
    with pytest.raises(RunFolderError, match="did not start") as raised:
        folder.start_agent("/nowhere#1", 2, "192.0.2.1", 60.0)  # not an address of this machine
    assert "Cannot assign requested address" in str(raised.value)


@pytest.mark.slow
def test_an_agent_removes_what_dead_jobs_have_left(folder: AgentFolder, shm: Path) -> None:
    expire(folder)
    (folder.path / "0.data").write_bytes(b"x" * 100)
    other = AgentFolder.of("another job", shm)
    client = AgentClient(other.start_agent("/nowhere#2", 2, "127.0.0.1", 60.0))
    assert not folder.path.exists()
    assert f"removed {folder.path}" in (other.path / "agent.log").read_text()
    client.ask("end", rank=0, num_local_ranks=1, persist=False)
    client.close()
    wait_until(lambda: not root(shm).exists(), "the agent's leaving")


@pytest.mark.slow
def test_the_lease_of_a_living_agent_is_renewed(folder: AgentFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    client = AgentClient(folder.start_agent("/nowhere#1", 2, "127.0.0.1", 60.0))
    first = json.loads((folder.path / "lease").read_text())
    assert first["job"] == "/nowhere#1"
    wait_until(lambda: json.loads((folder.path / "lease").read_text())["touched"] > first["touched"], "a new lease")
    client.ask("end", rank=0, num_local_ranks=1, persist=False)
    client.close()
    wait_until(lambda: not folder.path.exists(), "the agent's leaving")
    assert agent_folder.folders(folder.path.parent.parent) == []
