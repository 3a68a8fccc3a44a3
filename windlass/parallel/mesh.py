"""The ranks of a run and how they are laid out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from windlass.errors import WindlassError
from windlass.parallel.collectives import all_gather_object, all_reduce
from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.environment import RankEnvironment

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """`num_replicas` x `num_shards` ranks: the model is cut over the shards of a replica and repeated over replicas.

    A run of one rank has no process group: `group` and `device_mesh` are None and every collective is a no-op.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    num_replicas: int
    num_shards: int
    device: torch.device
    group: dist.ProcessGroup | None
    device_mesh: DeviceMesh | None
    """What FSDP2 cuts over: `(shard,)`, or `(replicate, shard)` where there are replicas."""
    store: dist.Store | None = None
    """The launcher's, on which the ranks have met, held for as long as torch uses it; None where it is torch's own."""
    connect: Callable[[float], dist.Store] | None = None
    """Gives another connection with it, of which what waits does so for as many seconds."""

    @staticmethod
    def start(
        config: ParallelConfig, device: torch.device, connect: Callable[[float], dist.Store] | None = None
    ) -> Mesh:
        """Joins the ranks that torchrun's environment names; call `stop` at the end.

        Args:
            connect: gives a connection with the launcher's store; None: torch's store is where the environment says.
        """
        mine = RankEnvironment.read()
        rank, world_size, local_rank, local_world_size = astuple(mine)
        num_replicas, num_shards = config.mesh_shape(world_size, local_world_size)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            if connect is not None:
                # NCCL's monitor would ask the store every second, from a thread that must not enter Python at its end.
                os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        group = device_mesh = store = None
        if world_size > 1:
            timeout = timedelta(seconds=config.timeout_s)
            store = None if connect is None else connect(config.timeout_s)
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
                **_store_of_this_attempt(rank, world_size, timeout, store),
            )
            group = dist.group.WORLD
            if config.name in (Sharding.ddp, Sharding.hsdp):
                shape, names = (num_replicas, num_shards), ("replicate", "shard")
            else:
                shape, names = (num_shards,), ("shard",)
            device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        return Mesh(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            num_replicas=num_replicas,
            num_shards=num_shards,
            device=device,
            group=group,
            device_mesh=device_mesh,
            store=store,
            connect=connect,
        )

    @staticmethod
    def of_process_group() -> Mesh:
        """The ranks of torch's default process group, for loops that made it themselves; one rank without it."""
        has_group = dist.is_initialized() and dist.get_world_size() > 1
        world_size = dist.get_world_size() if has_group else 1
        on_gpu = torch.cuda.is_available() and (not has_group or "cuda" in str(dist.get_backend_config()))
        return Mesh(
            rank=dist.get_rank() if has_group else 0,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
            num_replicas=1,
            num_shards=world_size,
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
            group=dist.group.WORLD if has_group else None,
            device_mesh=None,
        )

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        """All ranks, for tensors on the CPU: the group's backend for those is gloo."""
        return self.group

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that together hold one model."""
        return None if self.device_mesh is None else self.device_mesh.get_group("shard")

    @property
    def node(self) -> int:
        """The node of this rank, from 0; launchers give each node consecutive ranks."""
        return self.rank // self.local_world_size

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)

    def barrier(self) -> None:
        """Returns when every rank is here; on the host, so that it holds whatever the devices are doing."""
        all_reduce(torch.zeros(1), self.host_group)

    def agree(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on every rank and returns its result, unless it failed on any rank: then all ranks raise.

        A rank that raised alone would leave the others waiting in their next collective. Every rank raises the
        error of the lowest rank that failed, so a user's mistake is one message and one exit code. `action` must
        not communicate.
        """
        if self.group is None:
            return action()
        result: Result | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        # Another rank may lack the class of an error, or what it takes to build one; ours travel as they are.
        described = error if error is None or isinstance(error, WindlassError) else RuntimeError(repr(error))
        first = next((other for other in all_gather_object(described, self.group) if other is not None), None)
        if first is None:
            return result  # type: ignore[return-value]  # no rank failed, so `action` returned on this one
        raised = error if error is not None and repr(described) == repr(first) else first
        if isinstance(raised, WindlassError):
            raised.on_all_ranks = True
        raise raised from (None if raised is error else error)

    def decide(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on rank 0 and returns its result, or raises its error, on every rank.

        For what must be the same everywhere, such as which files a shared folder holds: ranks may see it change at
        different moments.
        """
        mine = self.agree(lambda: action() if self.rank == 0 else None)
        return all_gather_object(mine, self.group)[0]

    def stop(self) -> None:
        """Leaves the group, all ranks together: a peer that closed its sockets early would look like a dead one."""
        if self.group is not None:
            self.barrier()
            dist.destroy_process_group()


def end_groups() -> None:
    """Ends the threads of this process's groups, which must not be left when the interpreter ends.

    torch has no call for gloo's: they end with the last reference to their group. So this is for where no object of the
    run is left but garbage and what torch caches, and where no rank waits for this one in a collective.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        with suppress(ImportError):  # another torch may not have it: see `windlass.process.end`
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()  # of device meshes, and so of groups
    gc.collect()


def _store_of_this_attempt(rank: int, world_size: int, timeout: timedelta, store: dist.Store | None) -> dict[str, Any]:
    """Arguments that keep a restarted group of ranks apart from the one before it.

    torchrun's agent keeps one key-value store through all restarts of its workers, and workers that meet there find
    the addresses of their dead predecessors: ranks then wait for each other for ever, or fail once more (pytorch
    #135712; docs/LOG.md has what was seen). So each attempt gets names of its own in the store, and so does each
    job, as several may meet at one address.
    """
    if store is None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return {}
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, False, timeout)
    job, attempt = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = f"windlass/{job}/attempt-{attempt}"
    return {"store": dist.PrefixStore(names, store), "rank": rank, "world_size": world_size}


def all_ranks_finite(norm: torch.Tensor, mesh: Mesh) -> bool:
    """Whether the gradient norm of `clip_grad_norm_` is finite on every rank: one host sync.

    Where the ranks hold one model together, the norm is already of all of them. Replicas vote.
    """
    vote = torch.isfinite(norm).to(torch.float32)
    if mesh.num_shards < mesh.world_size:
        all_reduce(vote, mesh.group, dist.ReduceOp.MIN)
    return bool(vote.item())
