"""What each rank of `recovery.py` runs: an attempt from its start, over the restore and its parts, to the kill."""

from __future__ import annotations

import functools
import math
import mmap
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from checkpoint_variants import local_tensors
from common import die_with_parent, llama_config
from loop_variants import Tokens, synthetic_batches

from windlass.checkpoint import Checkpointer, manager
from windlass.checkpoint.agent.slots import SharedFile
from windlass.checkpoint.agent.stripes import Stripes
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.conf.schema import Config
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.fragment import local_tensor
from windlass.parallel.mesh import Mesh
from windlass.train.build import build_parts
from windlass.train.objectives.cross_entropy import cross_entropy_sum

PARTS = ("processes", "model", "agents", "plan", "fence", "rebuild", "open", "read", "first step")
"""In their order. `processes`: from the kill to a process group of new ones; `agents`: found, or started, and asked;
`plan`: chosen, and what is left verified if something is lost; `open`: slots mapped and described; `read`: into
tensors, each byte checked."""
COPIES = 5
LOOPBACK_BYTES = 4 << 20
"""Of a send; as much as agents send in one frame."""


@dataclass(frozen=True)
class Settings:
    num_ranks: int
    num_parity_shards: int
    shape: dict[str, int]
    every: int
    """Steps between snapshots in memory."""
    persist_every: int
    batch_size: int
    seq_len: int
    directory: Path
    shm_dir: Path

    def config(self) -> Config:
        return llama_config(self.shape, self.batch_size, self.seq_len, self.directory)


@dataclass
class Recovery:
    """How one rank of a new attempt went on."""

    source: str | None
    """None: there was nothing to go on from."""
    lost_nodes: int
    step: int
    up_at: float
    """`time.monotonic()`, alike in all processes, when the process group was there."""
    seconds: dict[str, float]
    """A part -> what it took, but for `processes`."""
    end_at: float
    """When the first step was done."""
    state_bytes: int = 0
    num_parameters: int = 0
    copy_s: float = 0.0
    """A copy of this rank's state from memory to memory, while the other ranks copy theirs."""
    new_copy_s: float = 0.0
    """The same copy, of optimizer state into memory that the kernel has yet to give: a new process has no other."""
    received_bytes: int = 0
    """Over loopback, to rebuild what was lost."""
    loopback_s: float = 0.0
    """What as many bytes take over a plain connection."""
    new_slot_s: float = 0.0
    """What it takes to get the shared memory of a slot from the kernel."""


@dataclass
class Stopwatch:
    """Adds up what calls take."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS[1:], 0.0))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begin

        return call


class Trainer:
    """windlass's model and cut, on random tokens."""

    def __init__(self, settings: Settings, mesh: Mesh) -> None:
        config = settings.config()
        self.mesh, self.max_norm = mesh, config.train.max_norm
        self.parts = build_parts(config, mesh, None)
        self.model, self.optimizer = self.parts.model, self.parts.optimizer
        self.batches: Iterator[Tokens] = synthetic_batches(config, mesh.rank)
        self.num_tokens = settings.num_ranks * settings.batch_size * settings.seq_len

    def step(self, checkpointer: Checkpointer) -> None:
        input_ids, labels = next(self.batches)
        self.parts.engine.begin_micro_step(is_last=True)
        loss_sum = self.model(input_ids, None, lambda hidden, head: cross_entropy_sum(hidden, head, labels))
        (loss_sum / self.num_tokens).backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm, self.mesh)
        checkpointer.wait_staged()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def live(settings: Settings, rank: int, variables: dict[str, str], parent: Connection) -> None:
    """Goes on, says how, and trains until it is killed. The kill may come at any moment after `Recovery` is sent."""
    die_with_parent()
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    watch = Stopwatch()
    mesh = settings.config().parallel.build(torch.device("cpu"))
    mesh.barrier()
    up_at = time.monotonic()
    trainer = watch.timed("model", Trainer)(settings, mesh)
    checkpointer = Checkpointer(
        {"model": trainer.model, "optimizer": trainer.optimizer},
        settings.directory,
        mesh,
        num_parity_shards=settings.num_parity_shards,
        failure_domain="rank",
        snapshot_every=settings.every,
        persist_every=settings.persist_every,
        shm_dir=settings.shm_dir,
        lease_s=60.0,  # the agents of a benchmark that was killed end soon
    )
    watch.timed("agents", checkpointer.open)()
    assert checkpointer.snapshots is not None
    _watch_restore(watch, checkpointer, checkpointer.snapshots.coordinator.agents)
    restored = checkpointer.restore_latest()
    step = 0 if restored is None else restored.step
    watch.timed("first step", trainer.step)(checkpointer)
    mesh.barrier()
    recovery = Recovery(
        None if restored is None else restored.source,
        0 if restored is None else restored.lost_nodes,
        step,
        up_at,
        watch.seconds,
        time.monotonic(),
        num_parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
    )
    _measure_limits(recovery, trainer, mesh, checkpointer.snapshots.coordinator.agents)
    parent.send(recovery)
    _train_on(trainer, checkpointer, step + 1, parent)


def _watch_restore(watch: Stopwatch, checkpointer: Checkpointer, memory: AgentClients) -> None:
    manager.plan_restore = watch.timed("plan", manager.plan_restore)
    manager.open_snapshot = watch.timed("open", manager.open_snapshot)
    for owner, name, part in (
        (checkpointer, "_begin", "fence"),
        (memory, "rebuild", "rebuild"),
        (checkpointer, "_restore_all", "read"),
    ):
        setattr(owner, name, watch.timed(part, getattr(owner, name)))


def _train_on(trainer: Trainer, checkpointer: Checkpointer, step: int, parent: Connection) -> None:
    """Says ("step" | kind of event, step) of all that happens."""
    while True:
        parent.send(("step", step))
        for event in checkpointer.poll():
            parent.send((event["kind"], event["step"]))
        if checkpointer.due(step):
            checkpointer.snapshot(step)
        trainer.step(checkpointer)
        step += 1


# --- Limits. ---


def _measure_limits(recovery: Recovery, trainer: Trainer, mesh: Mesh, memory: AgentClients) -> None:
    weights = [local_tensor(parameter) for parameter in trainer.model.parameters()]
    tensors = local_tensors(trainer.model, trainer.optimizer)
    state = tensors[len(weights) :]
    recovery.state_bytes = sum(tensor.nbytes for tensor in tensors)
    places = [torch.ones_like(tensor) for tensor in tensors]
    warm, new = [], []
    for _ in range(COPIES):
        warm.append(_slowest(mesh, lambda: _copy(tensors, places)))
        new.append(_slowest(mesh, lambda: (_copy(weights, places[: len(weights)]), _copy(state, _new_memory(state)))))
    recovery.copy_s, recovery.new_copy_s = statistics.median(warm), statistics.median(new)
    if recovery.lost_nodes:
        stripes = _stripes(memory)
        # For each shard of a lost slot, the k shards that are left of its stripe.
        recovery.received_bytes = stripes.num_data_shards * (stripes.data_bytes + stripes.parity_bytes)
        recovery.loopback_s = _loopback_seconds(recovery.received_bytes, mesh)
        place = memory.folder.path / f"limit-{mesh.rank}"
        begin = time.perf_counter()
        SharedFile(place, stripes.data_bytes + stripes.parity_bytes)
        recovery.new_slot_s = time.perf_counter() - begin
        place.unlink()


def _slowest(mesh: Mesh, action: Callable[[], object]) -> float:
    """Seconds of the slowest rank, all at the same time."""
    mesh.barrier()
    begin = time.perf_counter()
    action()
    return max(all_gather_object(time.perf_counter() - begin, mesh.world))


@torch.no_grad()
def _copy(tensors: list[torch.Tensor], places: list[torch.Tensor]) -> None:
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)


def _new_memory(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Room for `tensors` in pages that no process has yet, as an allocator gets it for the large ones."""
    pages = torch.frombuffer(mmap.mmap(-1, sum(tensor.nbytes for tensor in tensors)), dtype=torch.uint8)
    parts = pages.split([tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _stripes(memory: AgentClients) -> Stripes:
    memory.refresh()
    slot = memory.statuses[0]["slots"][0]
    return Stripes(slot["num_nodes"], slot["num_parity_shards"], slot["node_bytes"])


def _loopback_seconds(num_bytes: int, mesh: Mesh) -> float:
    """What it takes to receive `num_bytes` from another process; of the slowest of `COPIES` turns, the median."""
    listener = socket.create_server(("127.0.0.1", 0)) if mesh.rank == 0 else None
    port = mesh.decide(lambda: 0 if listener is None else listener.getsockname()[1])
    count, seconds = math.ceil(num_bytes / LOOPBACK_BYTES), 0.0
    buffer = memoryview(bytearray(LOOPBACK_BYTES))
    if listener is not None:
        receiver, _ = listener.accept()
        turns = []
        for _ in range(COPIES):
            receiver.sendall(b"!")
            begin = time.perf_counter()
            for _ in range(count):
                receiver.recv_into(buffer, LOOPBACK_BYTES, socket.MSG_WAITALL)
            turns.append(time.perf_counter() - begin)
        seconds = statistics.median(turns)
        receiver.close()
        listener.close()
    elif mesh.rank == 1:
        with socket.create_connection(("127.0.0.1", port)) as sender:
            for _ in range(COPIES):
                sender.recv(1)
                for _ in range(count):
                    sender.sendall(buffer)
    return all_gather_object(seconds, mesh.world)[0]
