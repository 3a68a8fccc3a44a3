"""Shared memory that others fill while a run goes on: an agent lives on, and at worst the run goes on without."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.agents import Cluster, shared_memory, small_tmpfs, wait_until
from support.checkpoints import Training

from windlass.checkpoint import inspect
from windlass.checkpoint.agent import slots
from windlass.checkpoint.agent.client import NoMemory
from windlass.checkpoint.agent.listing import list_agents
from windlass.checkpoint.agent.slots import write_shared
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.config import CheckpointKind
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.checkpoint.manager import Checkpointer
from windlass.errors import RunFolderError
from windlass.parallel.mesh import Mesh


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_what_fits_into_the_old_page_is_written_where_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head"
    write_shared(path, b"old, and longer")
    real = slots._write

    def full(target: Path, data: bytes, flags: int) -> None:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, data, flags)

    monkeypatch.setattr(slots, "_write", full)
    write_shared(path, b"new")
    assert path.read_bytes() == b"new"
    for target, data in ((tmp_path / "other", b"x"), (path, bytes(5000))):
        with pytest.raises(OSError, match="No space"):
            write_shared(target, data)
    assert [entry.name for entry in tmp_path.iterdir()] == ["head"]
    assert path.read_bytes() == b"new"


@pytest.mark.slow
def test_an_agent_lives_on_where_others_fill_its_memory(tmp_path: Path) -> None:
    nodes = Cluster(tmp_path, 1, 0, tmp_path / "checkpoints")
    with small_tmpfs(tmp_path, 12 * BLOCK_BYTES) as small:
        nodes.root = small
        try:
            nodes.open()
            pid = nodes.status(0)["pid"]
            nodes.clients[0].ask("reserve", node_bytes=3 * BLOCK_BYTES)
            nodes.take(1)
            fill(small)
            for step in (2, 3, 4):
                try:
                    nodes.take(step)  # what was reserved is there
                except NoMemory:
                    continue
            time.sleep(1.5)  # a tick, in which it renews its lease
            assert nodes.status(0)["pid"] == pid
            with pytest.raises(NoMemory):
                nodes.clients[0].ask("reserve", node_bytes=6 * BLOCK_BYTES)
                nodes.begin(5)
            (small / "filler").unlink()
            assert nodes.read(nodes.take(6)) == nodes.expected(6)
        finally:
            nodes.close()


def no_memory(checkpointer: Checkpointer) -> None:
    """Its agent refuses each snapshot."""
    agents = checkpointer.agents
    assert agents is not None and agents.client is not None
    ask = agents.client.ask

    def refuse(do: str, *arguments: object, **fields: object) -> dict:
        if do == "begin":
            raise NoMemory(2, 1)
        return ask(do, *arguments, **fields)  # type: ignore[arg-type]

    agents.client.ask = refuse  # type: ignore[method-assign]


def no_agent(checkpointer: Checkpointer) -> None:
    """It is gone, and none comes up."""
    agents = checkpointer.agents
    assert agents is not None and agents.client is not None
    agents.client.close()

    def fail() -> None:
        raise RunFolderError("checkpoint.shm_dir", "/dev/shm/x", "cannot be used", "make room")

    agents.open = fail  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("lazy", no_memory), ("erasure", no_agent)])
def test_without_memory_a_run_goes_on_as_durable(
    kind: str, how: Callable[[Checkpointer], None], tmp_path: Path, mesh: Mesh
) -> None:
    training, events = Training(), []
    with shared_memory() as shm:
        settings = {"kind": kind, "shm_dir": shm, "snapshot_every": 1, "persist_every": 2, "keep": 0}
        checkpointer = training.checkpointer(tmp_path, mesh, **settings)
        training.run(1)
        checkpointer.snapshot(1)
        checkpointer.wait_staged()
        wait_until(lambda: any(e["kind"] == "snapshot_committed" for e in checkpointer.poll()), "the first")
        how(checkpointer)
        for step in range(2, 14):
            training.run(1)
            if checkpointer.due(step):
                checkpointer.snapshot(step)
            checkpointer.wait_staged()
            events += checkpointer.poll()
        assert checkpointer.kind == CheckpointKind.durable
        (given_up,) = [event for event in events if event["kind"] == "memory_given_up"]
        steps = committed_steps(tmp_path)
        assert given_up["reason"] and steps[0] == given_up["step"] and steps[-1] == 12
        assert all(result.is_sound for result in inspect.verify(tmp_path))
        checkpointer.save(13)
        checkpointer.close()
        for agent in list_agents(shm):  # which nobody could tell that the job is over
            if agent.pid is not None:
                os.kill(agent.pid, signal.SIGKILL)
    attempt = Training(5)
    restored = attempt.checkpointer(tmp_path, mesh).restore_latest()
    assert restored is not None and restored.step == 13
    assert attempt.bits() == training.bits()
