"""The folder of a snapshot agent: shared memory that only its user can open, one a job and node.

Slots, lock, socket and log lie in it. It outlives the agent, so that the next one adopts what is there, but not its
lease: agents remove what dead jobs have left. Times are of the clock that runs since boot, which nobody sets.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from windlass.checkpoint.agent.slots import write_shared
from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import TransportError
from windlass.errors import ConfigError, RunFolderError
from windlass.os_errors import remedy, said
from windlass.untrusted import Malformed, convert, read_json

SHM_DIR = "WINDLASS_SHM_DIR"
"""Environment variable that stands in for `checkpoint.shm_dir` on one node: nodes may differ, and share a machine."""
START_S = 30.0
"""The time that an agent has to come up."""
MAX_LEASE_BYTES = 1 << 16
UNLEASED_S = 10 * START_S
"""How old a folder without a lease is for which no agent has come up."""
GONE_S = 2.0
"""The time that a process that was killed has to be gone."""
_POLL_S = 0.01


@dataclass(frozen=True)
class Lease:
    """A lease, which keeps a folder alive, and who asked for it."""

    job: str
    """The folder of the job's checkpoints."""
    seconds: float
    """How long a folder without trainers is kept."""
    touched: float
    """`uptime()` of the last sign of a trainer."""

    @property
    def is_over(self) -> bool:
        return uptime() > self.touched + self.seconds


@dataclass(frozen=True)
class AgentSettings:
    """The settings of a process that is to be the agent of a folder: not on its command line, which others see."""

    job: str
    num_slots: int
    host: str
    lease_s: float


class AgentFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def of(job: str, shm_dir: Path | None = None, member: str = "") -> AgentFolder:
        """The folder of a job on this node.

        Args:
            job: what names it, alike on all nodes: where its checkpoints go.
            shm_dir: a folder of shared memory; None: the system's.
            member: tells several agents of the job on one node apart.
        """
        name = hashlib.sha256(job.encode()).hexdigest()[:16] + (f"-{member}" if member else "")
        return AgentFolder(root(shm_dir) / name)

    def make(self) -> None:
        """Raises RunFolderError if the folder cannot be made, or belongs to somebody else."""
        try:
            for folder in (self.path.parent, self.path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                status = folder.lstat()
                if status.st_uid != os.getuid() or status.st_mode & 0o077:
                    raise PermissionError(f"{folder} is open to others")
        except OSError as error:
            raise RunFolderError(
                "checkpoint.shm_dir",
                self.path,
                f"cannot be used for snapshots: {said(error)}",
                remedy(error, "set checkpoint.shm_dir to a folder of shared memory that you own"),
            ) from error

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Yields True if this process is the folder's agent now: there is one at a time."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def has_agent(self) -> bool:
        with contextlib.suppress(FileNotFoundError), self.locked() as is_free:
            return not is_free
        return False

    def touch(self, job: str, seconds: float) -> None:
        """Raises OSError where the memory is full."""
        write_shared(self.path / "lease", json.dumps(asdict(Lease(job, seconds, uptime()))).encode())

    def lease(self) -> Lease | None:
        try:
            return convert(read_json(self.path / "lease", MAX_LEASE_BYTES), Lease)
        except (OSError, Malformed):
            return None

    @property
    def is_over(self) -> bool:
        """True if nobody comes back for the folder. Without a lease: an agent's first act is to write one."""
        lease = self.lease()
        if lease is not None:
            return lease.is_over
        if (self.path / "lease").exists() or re.fullmatch(r"[0-9a-f]{16}(-.+)?", self.path.name) is None:
            return False  # another version's, or not an agent's
        try:
            return time.time() - self.path.stat().st_ctime > UNLEASED_S
        except OSError:
            return False

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # if no other job has a folder there

    def remove_if_left(self) -> None:
        """Removes what an agent that is gone has left. The lock of a killed one goes a moment after its connections."""
        deadline = time.monotonic() + GONE_S
        while self.has_agent() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not self.has_agent():
            self.remove()

    def listen(self) -> socket.socket:
        """A socket that only processes of this user reach."""
        with _socket_path(self.path) as path:
            (self.path / "agent.sock").unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(64)
        return listener

    def connect(self) -> Connection:
        """A connection with the folder's agent. Raises TransportError if there is none."""
        try:
            with _socket_path(self.path) as path:
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.connect(path)
                except OSError:
                    sock.close()
                    raise
        except OSError as error:
            raise TransportError(f"there is no snapshot agent in {self.path}: {error.strerror}") from error
        return Connection(sock, f"the snapshot agent in {self.path}")

    def start_agent(self, job: str, num_slots: int, host: str, lease_s: float) -> Connection:
        """Starts an agent, in a session of its own so that it outlives this process, unless there is one.

        Raises:
            RunFolderError: it does not come up; the message has the end of its log.
        """
        self.make()
        log = self.path / "agent.log"
        settings = json.dumps(asdict(AgentSettings(job, num_slots, host, lease_s))).encode() + b"\n"
        deadline = time.monotonic() + START_S
        process: subprocess.Popen[bytes] | None = None
        while time.monotonic() < deadline:
            with contextlib.suppress(TransportError):
                return self.connect()
            if process is None and not self.has_agent():
                with contextlib.suppress(FileNotFoundError):  # then in the next round
                    process = self._start_process(settings)
            if process is not None and process.poll() is not None:
                if process.returncode != 0 and self.path.exists():
                    break
                process = None  # another was faster, which may be ending by now
            time.sleep(_POLL_S)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        raise RunFolderError(
            "checkpoint.agent_host",
            host,
            f"the snapshot agent of this node did not start: {lines[-1] if lines else 'it said nothing'}",
            "name an address of this node, leave checkpoint.agent_host null, or set checkpoint=durable",
        )

    def _start_process(self, settings: bytes) -> subprocess.Popen[bytes]:
        self.make()  # another agent may have taken it for one that was left
        with (self.path / "agent.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "windlass.checkpoint.agent", str(self.path)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # The C library keeps memory a thread; an agent has many threads, each with little to do.
                env={"MALLOC_ARENA_MAX": "1", **os.environ},
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it failed at once, and its log says why
            process.stdin.write(settings)
        return process


def root(shm_dir: Path | None = None) -> Path:
    """The folder that holds the folders of this user's agents.

    Args:
        shm_dir: shared memory of this node; None: what `WINDLASS_SHM_DIR` names here, or the system's.
    """
    own = os.environ.get(SHM_DIR)
    if shm_dir is None and own:
        if not Path(own).is_dir():
            raise ConfigError(SHM_DIR, own, "is not a folder on this node", "make it, or unset it for /dev/shm")
        shm_dir = Path(own)
    elif shm_dir is None:
        system = Path("/dev/shm")
        shm_dir = system if system.is_dir() else Path(tempfile.gettempdir())
    elif not shm_dir.is_dir():
        raise ConfigError("checkpoint.shm_dir", shm_dir, "is not a folder", "make it, or leave it null for /dev/shm")
    return shm_dir / f"windlass-{os.getuid()}"


def folders(shm_dir: Path | None = None) -> list[AgentFolder]:
    """The folders of all jobs of this user on this node."""
    place = root(shm_dir)
    return [AgentFolder(path) for path in sorted(place.iterdir()) if path.is_dir()] if place.is_dir() else []


def remove_expired(shm_dir: Path) -> list[Path]:
    """Removes the folders of jobs that have no agent and whose lease is over, or that have never had one."""
    removed = []
    for folder in folders(shm_dir):
        if folder.is_over:
            with contextlib.suppress(FileNotFoundError), folder.locked() as is_free:  # another may be faster
                if is_free and folder.is_over:
                    folder.remove()
                    removed.append(folder.path)
    return removed


def peer_pid(sock: socket.socket) -> int | None:
    """The process at the other end of a socket of this node; None where the system does not tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))[0]


def uptime() -> float:
    """Seconds since boot, alike in all processes, and untouched by whoever sets the clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def _socket_path(folder: Path) -> Iterator[str]:
    """A short name of the socket in `folder`: the system takes about 100 characters."""
    path = folder / "agent.sock"
    if len(os.fsencode(path)) < 100 or sys.platform != "linux":
        yield str(path)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/agent.sock"
    finally:
        os.close(descriptor)
