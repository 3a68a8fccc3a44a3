"""The snapshot agents of this node, as `windlass ckpt agents` and launchers see them. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from windlass.checkpoint.agent.client import AgentClient
from windlass.checkpoint.agent.folder import AgentFolder, folders, uptime
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.net.handshake import TransportError
from windlass.text import printable

END_S = 90.0
"""How long a launcher waits for an agent to write what it has, and leave."""


def job_name(location: Location, identity: str) -> str:
    """The name of a job among agents: where its checkpoints go, and what tells that place from an earlier one."""
    return f"{location}#{identity}"


@dataclass(frozen=True)
class ListedAgent:
    """An agent, or what one has left behind."""

    path: str
    job: str
    """Where the job's checkpoints go."""
    pid: int | None
    """None: there is no agent, and the next one of this user removes the folder when its lease is over."""
    num_trainers: int
    generation: int
    step: int | None
    """The step of the newest snapshot that is committed."""
    num_bytes: int
    lease_left_s: float
    """Until the folder goes, unless trainers come."""


def list_agents(shm_dir: Path | None = None) -> list[ListedAgent]:
    """Lists the agents of this user on this node."""
    found = []
    for folder in folders(shm_dir):
        with contextlib.suppress(FileNotFoundError):  # it has left meanwhile
            found.append(_describe(folder))
    return found


def _describe(folder: AgentFolder) -> ListedAgent:
    lease = folder.lease()
    job = "?" if lease is None else lease.job.rpartition("#")[0]
    left = 0.0 if lease is None else max(0.0, lease.touched + lease.seconds - uptime())
    try:
        client = AgentClient(folder.connect())
        status = client.ask("status")
        client.close()
    except TransportError:
        num_bytes = sum(path.stat().st_size for path in folder.path.iterdir() if path.is_file())
        return ListedAgent(str(folder.path), job, None, 0, 0, None, num_bytes, left)
    committed = [slot["step"] for slot in status["slots"] if slot["phase"] == "committed"]
    return ListedAgent(
        path=str(folder.path),
        job=job,
        pid=status["pid"],
        num_trainers=status["num_trainers"] - 1,  # without who asks
        generation=status["generation"],
        step=max(committed, default=None),
        num_bytes=status["bytes"],
        lease_left_s=left,
    )


def render_agents(rows: list[ListedAgent], as_json: bool) -> str:
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=2)
    if not rows:
        return "no snapshot agents of yours on this node"
    lines = [f"{'pid':>8}  {'trainers':>8}  {'step':>8}  {'memory':>10}  {'lease':>7}  job"]
    for row in rows:
        pid = "gone" if row.pid is None else str(row.pid)
        step = "-" if row.step is None else str(row.step)
        size, lease = f"{row.num_bytes / 2**20:.1f} MiB", f"{row.lease_left_s:.0f} s"
        lines.append(f"{pid:>8}  {row.num_trainers:>8}  {step:>8}  {size:>10}  {lease:>7}  {row.job}  ({row.path})")
    return "\n".join(map(printable, lines))


def users_of(location: Location, shm_dir: Path | None = None) -> set[int]:
    """The other processes that use a job's agents on this node."""
    pids: set[int] = set()
    for folder in _folders_of(location, shm_dir):
        with contextlib.suppress(TransportError):
            client = AgentClient(folder.connect())
            pids |= set(client.ask("status")["trainer_pids"])
            client.close()
    return pids - {os.getpid()}


def end_agents(location: Location, shm_dir: Path | None = None) -> list[Path]:
    """Has the agents of a job on this node write what is not durable yet, and leave.

    Args:
        location: where the job's checkpoints go, resolved.

    Returns:
        The folders of those that did not leave in time.
    """
    own = _folders_of(location, shm_dir)
    with ThreadPoolExecutor(len(own) or 1) as pool:  # all at once: each has a part of what is written
        has_left = list(pool.map(_end_agent, own))
    return [folder.path for folder, is_gone in zip(own, has_left, strict=True) if not is_gone]


def _folders_of(location: Location, shm_dir: Path | None) -> list[AgentFolder]:
    leases = [(folder, folder.lease()) for folder in folders(shm_dir)]
    return [folder for folder, lease in leases if lease and lease.job.rpartition("#")[0] == str(location)]


def _end_agent(folder: AgentFolder) -> bool:
    """Ends an agent; True if it has left in time."""
    try:
        client = AgentClient(folder.connect())
        client.ask("end", rank=-1, num_local_ranks=1, persist=True)
        client.close()
    except TransportError:
        if not folder.has_agent():
            folder.remove()  # its agent died, and what it held is of no attempt that goes on
    deadline = time.monotonic() + END_S
    while folder.path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not folder.path.exists()
