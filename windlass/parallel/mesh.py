"""The ranks of a run, laid out along named axes."""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from windlass.errors import WindlassError
from windlass.parallel.collectives import all_gather_object, all_reduce
from windlass.parallel.config import DATA_AXES, Axis, ParallelConfig
from windlass.parallel.environment import RankEnvironment

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run along named axes. Ranks are numbered along the last axis first.

    Collectives of training go over the axes that they name (`group_over`), those of set-up over the `world`.
    A run of one rank has no process group: `world` and `device_mesh` are None and every collective is a no-op.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    axes: Mapping[Axis, int]
    """The number of ranks along each, the outermost first."""
    device: torch.device
    world: dist.ProcessGroup | None
    """All ranks. Its backend for tensors on the CPU is gloo."""
    device_mesh: DeviceMesh | None
    """torch's, of the same axes; None also where torch's process group was made by others."""
    groups: Mapping[frozenset[Axis], dist.ProcessGroup] = field(default_factory=dict)
    """The groups over several axes, but not over all."""
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
        ranks = RankEnvironment.read()
        axes = config.mesh_axes(ranks.world_size, ranks.local_world_size)
        if device.type == "cuda":
            device = torch.device("cuda", ranks.local_rank)
            torch.cuda.set_device(device)
            if connect is not None:
                # NCCL's monitor would ask the store every second, from a thread that must not enter Python at its end.
                os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        store = None
        if ranks.world_size > 1:
            timeout = timedelta(seconds=config.timeout_s)
            store = None if connect is None else connect(config.timeout_s)
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
                **_store_of_this_attempt(ranks.rank, ranks.world_size, timeout, store),
            )
        return replace(Mesh.lay_out(ranks, axes, device), store=store, connect=connect)

    @staticmethod
    def lay_out(ranks: RankEnvironment, axes: Mapping[Axis, int], device: torch.device) -> Mesh:
        """The mesh of the ranks of torch's default process group, which they have joined. Collective.

        Args:
            axes: the number of ranks along each axis, the outermost first.
        """
        assert math.prod(axes.values()) == ranks.world_size, f"{axes} are not {ranks.world_size} ranks"
        world = device_mesh = None
        groups: dict[frozenset[Axis], dist.ProcessGroup] = {}
        if ranks.world_size > 1:
            _forget_meshes()
            world = dist.group.WORLD
            names = tuple(axis.value for axis in axes)
            device_mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=names)
            groups = _groups_over_several(axes, ranks.rank)
        return Mesh(
            rank=ranks.rank,
            local_rank=ranks.local_rank,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            axes=dict(axes),
            device=device,
            world=world,
            device_mesh=device_mesh,
            groups=groups,
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
            axes={Axis.shard: world_size},
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
            world=dist.group.WORLD if has_group else None,
            device_mesh=None,
        )

    def size(self, *axes: Axis) -> int:
        """The number of ranks along `axes` together; along one that the mesh does not have there is one."""
        return math.prod(self.axes.get(axis, 1) for axis in axes)

    def coordinate(self, *axes: Axis) -> int:
        """This rank's number among those along `axes`, from 0."""
        place, stride = 0, 1
        rank = self.rank
        for axis in reversed(list(self.axes)):
            rank, coordinate = divmod(rank, self.axes[axis])
            if axis in axes:
                place, stride = place + stride * coordinate, stride * self.axes[axis]
        return place

    def group_over(self, *axes: Axis) -> dist.ProcessGroup | None:
        """The ranks along `axes` that have this rank's coordinates along the others; None where it is this rank alone.

        They are in the order of their coordinates.
        """
        longer = frozenset(axis for axis in axes if self.size(axis) > 1)
        if not longer:
            return None
        if self.size(*longer) == self.world_size:
            return self.world
        if len(longer) > 1:
            return self.groups[longer]
        assert self.device_mesh is not None
        return self.device_mesh.get_group(next(iter(longer)).value)

    @property
    def data_rank(self) -> int:
        """The data position of this rank: those that share one have the same samples."""
        return self.coordinate(*DATA_AXES)

    @property
    def num_data_ranks(self) -> int:
        return self.size(*DATA_AXES)

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks of which each has other samples than this one, and it."""
        return self.group_over(*DATA_AXES)

    @property
    def counts_samples(self) -> bool:
        """True on the one rank of each data position whose samples count, where all ranks are asked."""
        return self.coordinate(*(axis for axis in self.axes if axis not in DATA_AXES)) == 0

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """The axes that FSDP2 shards over, `(shard,)` or `(replicate, shard)`, for the ranks that share the others."""
        if self.device_mesh is None:
            return None
        return self.device_mesh[tuple(axis.value for axis in self.axes if axis in DATA_AXES)]

    @property
    def node(self) -> int:
        """The node of this rank, from 0; launchers give each node consecutive ranks."""
        return self.rank // self.local_world_size

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)

    def barrier(self) -> None:
        """Returns when every rank is here; on the host, so that it holds whatever the devices are doing."""
        all_reduce(torch.zeros(1), self.world)

    def agree(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on every rank and returns its result, unless it failed on any rank: then all ranks raise.

        A rank that raised alone would leave the others waiting in their next collective. Every rank raises the
        error of the lowest rank that failed, so a user's mistake is one message and one exit code. `action` must
        not communicate.
        """
        if self.world is None:
            return action()
        result: Result | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        # Another rank may lack the class of an error, or what it takes to build one; ours travel as they are.
        described = error if error is None or isinstance(error, WindlassError) else RuntimeError(repr(error))
        first = next((other for other in all_gather_object(described, self.world) if other is not None), None)
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
        return all_gather_object(mine, self.world)[0]

    def stop(self) -> None:
        """Leaves the group, all ranks together: a peer that closed its sockets early would look like a dead one."""
        if self.world is not None:
            self.barrier()
            dist.destroy_process_group()


def end_groups() -> None:
    """Ends the threads of this process's groups, which must not be left when the interpreter ends.

    torch has no call for gloo's: they end with the last reference to their group. So this is for where no object of the
    run is left but garbage and what torch caches, and where no rank waits for this one in a collective.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_meshes()
    gc.collect()


def _forget_meshes() -> None:
    """Has torch forget the device meshes that it has cached with shardings.

    They keep their groups alive. And a mesh equals one of a group that came after, so that tensors get it from the
    cache: its groups have names that nothing answers to any more.
    """
    if "torch.distributed.tensor" in sys.modules:
        with suppress(ImportError):  # another torch may not have it: see `windlass.process.end`
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()


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
    """Asks all replicas if the gradient norm of `clip_grad_norm_` is finite: one host sync.

    Ranks that hold one model together have one norm. Replicas vote.
    """
    vote = torch.isfinite(norm).to(torch.float32)
    all_reduce(vote, mesh.group_over(Axis.replicate), dist.ReduceOp.MIN)
    return bool(vote.item())


def _groups_over_several(axes: Mapping[Axis, int], rank: int) -> dict[frozenset[Axis], dist.ProcessGroup]:
    """The group of `rank` over each set of two or more axes, but not of all. Collective."""
    longer = [axis for axis, size in axes.items() if size > 1]
    grid = torch.arange(math.prod(axes.values())).view(*axes.values())
    groups = {}
    for count in range(2, len(longer)):
        for chosen in itertools.combinations(longer, count):
            dims = [list(axes).index(axis) for axis in chosen]
            last = grid.movedim(dims, tuple(range(-count, 0)))
            for members in last.reshape(-1, math.prod(axes[axis] for axis in chosen)).tolist():
                group = dist.new_group(members)  # all ranks make all groups, in one order
                if rank in members:
                    assert isinstance(group, dist.ProcessGroup)
                    groups[frozenset(chosen)] = group
    return groups
