"""Bad input and bad luck of snapshots in memory: one clear message, or training that goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support import runs
from support.agents import LATE_S, Cluster, cluster, shared_memory, small_tmpfs, wait_until
from support.ranks import run_ranks
from support.stored import are_sound
from torch import nn

from windlass.checkpoint.agent.listing import list_agents
from windlass.checkpoint.durable.manifest import committed_steps
from windlass.checkpoint.manager import Checkpointer
from windlass.checkpoint.net.handshake import RefusedPeer
from windlass.checkpoint.net.transport import connect
from windlass.errors import EXIT_DONE, ConfigError
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.mesh import Mesh


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder
        try:
            wait_until(lambda: not list_agents(folder), "the agents' leaving", late_s=10.0)
        finally:
            for agent in list_agents(folder):
                if agent.pid is not None:
                    os.kill(agent.pid, signal.SIGKILL)


def one_rank() -> Mesh:
    return ParallelConfig(name=Sharding.none).build(torch.device("cpu"))


def opened(model: nn.Module, directory: Path, shm: Path, **settings: object) -> Checkpointer:
    more = {"kind": "erasure", "snapshot_every": 1, "persist_every": 1000, "shm_dir": shm} | settings
    return Checkpointer({"model": model}, directory, one_rank(), **more)  # type: ignore[arg-type]


def wait_for(checkpointer: Checkpointer, kind: str, step: int) -> dict:
    def look() -> dict | None:
        events = checkpointer.poll()
        return next((event for event in events if (event["kind"], event["step"]) == (kind, step)), None)

    return wait_until(look, f"{kind} of step {step}")


def refused(config: runs.Config, num_ranks: int, ends_process: bool = False) -> str:
    """The message of a run that must refuse, before its first step."""
    message = runs.refused(config, num_ranks, ends_process=ends_process)
    assert not runs.losses(config)
    return message


# --- What cannot work is refused before the first step. ---


def test_too_little_shared_memory(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, 1 << 20) as small:
        config = runs.run_config(
            tmp_path, "run", "checkpoint=erasure", "checkpoint.num_parity_shards=0", f"checkpoint.shm_dir={small}"
        )
        message = refused(config, 1)
        assert "checkpoint.shm_dir" in message and "2 snapshots need" in message and "MiB are free" in message
        pid = [agent.pid for agent in list_agents(small)]
        for each in pid:
            if each is not None:
                os.kill(each, signal.SIGKILL)


def test_parity_for_more_nodes_than_there_are(tmp_path: Path, shm: Path) -> None:
    config = runs.run_config(
        tmp_path, "run", "checkpoint=erasure", "checkpoint.num_parity_shards=1", f"checkpoint.shm_dir={shm}"
    )
    message = refused(config, 2, ends_process=True)
    assert "checkpoint.num_parity_shards=1" in message and "checkpoint.failure_domain=rank" in message


def open_on_this_rank(directory: str, shm: str, settings: dict) -> str:
    """The message with which `Checkpointer.open` refuses, or nothing."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    checkpointer = Checkpointer({"model": nn.Linear(2, 2)}, directory, mesh, kind="erasure", shm_dir=shm, **settings)
    try:
        checkpointer.open()
        return ""
    except ConfigError as error:
        return str(error)
    finally:
        for agent in list_agents(Path(shm)):
            if mesh.rank == 0 and agent.pid is not None:
                os.kill(agent.pid, signal.SIGKILL)
        mesh.stop()


def test_nodes_that_share_their_memory(tmp_path: Path) -> None:
    with shared_memory() as shm:
        arguments = (str(tmp_path / "checkpoints"), str(shm), {"num_parity_shards": 1})
        messages = run_ranks(open_on_this_rank, 2, *arguments, local_world_size=1)
    assert len(set(messages)) == 1, "the same on all ranks"
    assert "checkpoint.shm_dir" in messages[0] and "is the same for several nodes" in messages[0]


def test_nodes_of_different_sizes(tmp_path: Path) -> None:
    with shared_memory() as shm:
        arguments = (str(tmp_path / "checkpoints"), str(shm), {})
        messages = run_ranks(open_on_this_rank, 3, *arguments, local_world_size=2)
    assert all("launch.nproc_per_node=2" in message and "3 ranks" in message for message in messages)


# --- What works. ---


def test_lazy_on_one_rank(tmp_path: Path, shm: Path) -> None:
    config = runs.run_config(tmp_path, "run", "checkpoint=lazy", f"checkpoint.shm_dir={shm}", "checkpoint.keep=0")
    assert runs.run(config, 1) == [EXIT_DONE], runs.output(config)
    assert committed_steps(runs.checkpoints(config))[-1] == 12
    assert are_sound(runs.checkpoints(config))
    assert [event["step"] for event in runs.events(config, "persisted")][-1] == 12
    wait_until(lambda: not list(shm.iterdir()), "the agent's leaving")


def test_two_jobs_on_one_node_do_not_meet(tmp_path: Path, shm: Path) -> None:
    models = [nn.Linear(300, 300), nn.Linear(200, 200)]
    jobs = [opened(model, tmp_path / f"job{i}", shm) for i, model in enumerate(models)]
    for step in (1, 2, 3):
        for job in jobs:
            assert job.snapshot(step)
        for job in jobs:
            wait_for(job, "snapshot_committed", step)
    assert len({agent.pid for agent in list_agents(shm)}) == 2
    jobs[0].close()
    expected = {name: value.clone() for name, value in models[1].state_dict().items()}
    nn.init.zeros_(models[1].weight)
    restored = jobs[1].restore_latest()
    assert restored is not None and (restored.step, restored.source) == (3, "local_ram")
    assert all(torch.equal(value, expected[name]) for name, value in models[1].state_dict().items())
    jobs[1].close()
    wait_until(lambda: not list(shm.iterdir()), "the agents' leaving")


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, shm: Path) -> None:
    model = nn.Linear(600, 600)  # 1.4 MB
    with small_tmpfs(tmp_path, 3 << 20) as disk:
        checkpointer = opened(model, disk / "checkpoints", shm, kind="lazy", persist_every=1, keep=1)
        assert checkpointer.snapshot(1)
        wait_for(checkpointer, "persisted", 1)
        (disk / "filler").write_bytes(b"x" * (1 << 20))
        nn.init.ones_(model.weight)
        assert checkpointer.snapshot(2)
        assert "No space left" in wait_for(checkpointer, "persist_failed", 2)["reason"]
        assert committed_steps(disk / "checkpoints") == [1] and are_sound(disk / "checkpoints")
        (disk / "filler").unlink()
        wait_until(lambda: checkpointer.snapshot(3), "a free slot")
        wait_for(checkpointer, "persisted", 3)
        assert committed_steps(disk / "checkpoints") == [3] and are_sound(disk / "checkpoints")
        checkpointer.close()


@pytest.mark.parametrize("kind", ["lazy", "erasure"])
def test_an_agent_that_is_killed_right_before_the_end(kind: str, tmp_path: Path, shm: Path) -> None:
    model = nn.Linear(300, 300)
    checkpointer = opened(model, tmp_path / "checkpoints", shm, kind=kind, persist_every=1)
    assert checkpointer.snapshot(1)
    wait_for(checkpointer, "persisted", 1)
    (agent,) = list_agents(shm)
    assert agent.pid is not None
    os.kill(agent.pid, signal.SIGKILL)
    checkpointer.close()
    assert committed_steps(tmp_path / "checkpoints") == [1] and are_sound(tmp_path / "checkpoints")


def test_a_save_after_the_agent_was_killed(tmp_path: Path, shm: Path) -> None:
    model = nn.Linear(300, 300)
    checkpointer = opened(model, tmp_path / "checkpoints", shm)
    assert checkpointer.snapshot(1)
    wait_for(checkpointer, "snapshot_committed", 1)
    (agent,) = list_agents(shm)
    assert agent.pid is not None
    os.kill(agent.pid, signal.SIGKILL)
    checkpointer.save(2)
    assert committed_steps(tmp_path / "checkpoints") == [2] and are_sound(tmp_path / "checkpoints")
    checkpointer.close()


# --- Strangers. ---

HTTP = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"


def garbage(seed: int, num_bytes: int = 100_000) -> bytes:
    return torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, 1, tmp_path / "checkpoints") as found:
        found.take(1)
        yield found


def is_cut_off(sock: socket.socket) -> bool:
    """Whether the other side closes, having said nothing that was not greeting."""
    sock.settimeout(20.0)
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(HTTP, id="HTTP"),
        pytest.param(b"", id="nothing"),
        pytest.param(garbage(1), id="noise", marks=pytest.mark.full),
        pytest.param(b"\0" * 100_000, id="zeros", marks=pytest.mark.full),
    ],
)
def test_a_stranger_on_the_port(said: bytes, nodes: Cluster) -> None:
    host, port = nodes.status(0)["address"]
    before = nodes.status(0)["num_refused"]
    with socket.create_connection((host, port)) as sock:
        with contextlib.suppress(ConnectionError):  # cut off already
            sock.sendall(said)
        assert is_cut_off(sock)
    wait_until(lambda: nodes.status(0)["num_refused"] == before + 1, "a refusal that is counted")
    assert nodes.read(nodes.take(2)) == nodes.expected(2)


def test_a_peer_with_another_secret(nodes: Cluster) -> None:
    host, port = nodes.status(0)["address"]
    before = nodes.status(0)["num_refused"]
    with pytest.raises(RefusedPeer):
        connect((host, port), b"the secret of another job")
    wait_until(lambda: nodes.status(0)["num_refused"] == before + 1, "a refusal that is counted")
    nodes.take(2)


@pytest.mark.parametrize("said", [HTTP, garbage(2), b"\0" * 100_000], ids=["HTTP", "noise", "zeros"])
def test_noise_on_the_unix_socket(said: bytes, nodes: Cluster) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(nodes.folder(0).path / "agent.sock"))
        with contextlib.suppress(ConnectionError):  # cut off already
            sock.sendall(said)
        assert is_cut_off(sock)
    assert nodes.read(nodes.take(2)) == nodes.expected(2)


# --- A peer that stops. ---


def train_beside_a_stopped_agent(directory: str, shm: str) -> dict:
    """Three ranks with an agent each; that of rank 1 stops for some steps. What this rank has seen."""
    mesh = ParallelConfig(name=Sharding.zero3).build(torch.device("cpu"))
    model = nn.Linear(300, 300)
    more = {"failure_domain": "rank", "num_parity_shards": 1, "shm_dir": shm, "snapshot_every": 1}
    checkpointer = Checkpointer({"model": model}, directory, mesh, persist_every=1000, **more)  # type: ignore[arg-type]
    seen: dict = {"skipped": 0, "committed": []}

    def step(number: int) -> None:
        checkpointer.wait_staged()
        seen["skipped"] += not checkpointer.snapshot(number)
        time.sleep(0.05)
        seen["committed"] += [event["step"] for event in checkpointer.poll() if event["kind"] == "snapshot_committed"]

    for number in range(1, 4):
        step(number)
    assert checkpointer.snapshots is not None
    pid = checkpointer.snapshots.coordinator.agents.statuses[1]["pid"]
    mesh.barrier()
    if mesh.rank == 0:
        os.kill(pid, signal.SIGSTOP)
        # Whatever happens, this test ends.
        waker = threading.Timer(LATE_S, os.kill, (pid, signal.SIGCONT))
        waker.start()
    mesh.barrier()
    seen["skipped_before"] = seen["skipped"]
    for number in range(4, 10):
        step(number)
    seen["is_still_stopped"] = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    seen["skipped_meanwhile"] = seen["skipped"] - seen["skipped_before"]
    mesh.barrier()
    if mesh.rank == 0:
        waker.cancel()
        os.kill(pid, signal.SIGCONT)
    for number in range(10, 200):
        step(number)
        if mesh.decide(lambda: any(committed >= 10 for committed in seen["committed"])):
            break
    checkpointer.close()
    mesh.stop()
    return seen


def test_training_goes_on_beside_an_agent_that_has_stopped(tmp_path: Path, shm: Path) -> None:
    results = run_ranks(train_beside_a_stopped_agent, 3, str(tmp_path / "checkpoints"), str(shm))
    for seen in results:
        assert seen["is_still_stopped"], "training stood still until the agent went on"
        assert seen["skipped_meanwhile"] >= 4, "snapshots are skipped, and counted"
    assert max(results[0]["committed"]) >= 10, "snapshots are taken again afterwards"
