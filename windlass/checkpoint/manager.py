"""`Checkpointer`: what a training loop talks to."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.agent.listing import job_name
from windlass.checkpoint.config import CheckpointConfig, CheckpointKind, FailureDomain
from windlass.checkpoint.durable.manifest import step_folder
from windlass.checkpoint.durable.reader import CheckpointReader, open_checkpoint
from windlass.checkpoint.durable.storage import Location, is_same_place, join, resolved, split
from windlass.checkpoint.durable.store import KEEP_ALL, DurableStore, WrittenChunk
from windlass.checkpoint.objects import CheckpointedObjects, Stateful
from windlass.checkpoint.pieces import put_groups
from windlass.checkpoint.pinned_saver import PinnedSaver
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.checkpoint.snapshot.coordinator import SnapshotCoordinator
from windlass.checkpoint.snapshot.plan import RecoveryPlan
from windlass.checkpoint.snapshot.restore import open_snapshot, plan_restore
from windlass.checkpoint.snapshot.saver import SnapshotSaver
from windlass.errors import ConfigError, CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    step: int
    origin: Location
    """The checkpoint's folder, or in words what memory it was in."""
    set_aside: list[Location] = field(default_factory=list)
    """Newer checkpoints that were moved aside, damaged or superseded, where they are now."""
    source: str = "durable"
    """`local_ram`: every node had its own; `parity`: some were made again; `durable`."""
    lost_nodes: int = 0
    decode_s: float = 0.0
    """Seconds to make the parts of lost nodes again."""


class Checkpointer:
    """Saves and restores a set of named objects, sharded or not, to the bit.

        checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, dir, num_parity_shards=1)
        checkpointer.restore_latest()
        for step in ...:
            loss(batch).backward()
            checkpointer.wait_staged()      # the copy of the last snapshot ends before weights change
            optimizer.step()
            if checkpointer.due(step):
                checkpointer.snapshot(step) # returns at once; copy, parity and disk come behind
        checkpointer.close()

    Args:
        objects: name -> `nn.Module`, `torch.optim.Optimizer` (of parameters of those modules), or `Stateful`.
        dir: the folder of the checkpoints, the same one for all ranks, made if it is missing; or a URL of fsspec's.
        mesh: the ranks that save together; None is torch's process group, or this process where there is none.
        kind: `durable` writes while training waits; `lazy` copies behind the training into the memory of a snapshot
            agent, which writes; `erasure` keeps snapshots there, with parity on other nodes. None: `erasure` with
            parity shards, `durable` without. Where an optimizer's state is on a disk its files are pinned, and
            committed behind the training, with `durable` and `lazy`; `lazy` then writes weights behind it, too.
        snapshot_every: steps between snapshots in memory, for `due`; of `erasure` only.
        persist_every: steps between durable checkpoints, for `due`.
        keep: newest durable checkpoints to keep; 0 keeps all.
        num_parity_shards: how many nodes may be lost at once without going back to a durable checkpoint.
        failure_domain: `node`, or `rank` to protect the ranks of one machine from each other.
        shm_dir: shared memory for snapshots, a folder of its own on each node; None: /dev/shm.
        agent_host: the address that this node's agent listens on; None: that from which the job's first is reached.
        lease_s: how long agents wait for trainers to come back.
        max_send_bytes_per_s: what a node sends at most to protect snapshots; None: no limit.
        info: JSON to write beside the state, e.g. the configuration.
        restore_hyperparameters: whether a restored optimizer takes its learning rate, betas and so on from the
            checkpoint, or keeps those that it was made with.
    """

    def __init__(
        self,
        objects: Mapping[str, nn.Module | torch.optim.Optimizer | Stateful],
        dir: Location,
        mesh: Mesh | None = None,
        *,
        kind: CheckpointKind | str | None = None,
        snapshot_every: int = 10,
        persist_every: int = 100,
        keep: int = 2,
        num_parity_shards: int = 0,
        failure_domain: FailureDomain | str = FailureDomain.node,
        shm_dir: Path | str | None = None,
        agent_host: str | None = None,
        lease_s: float = 600.0,
        max_send_bytes_per_s: float | None = None,
        info: dict[str, Any] | None = None,
        restore_hyperparameters: bool = True,
    ) -> None:
        self.mesh = mesh = mesh or Mesh.of_process_group()
        self.kind = CheckpointKind(kind or ("erasure" if num_parity_shards else "durable"))
        if num_parity_shards and self.kind != CheckpointKind.erasure:
            raise ValueError(f"num_parity_shards={num_parity_shards} with kind={self.kind}: only erasure keeps parity")
        self.store = DurableStore(dir)
        self.objects = CheckpointedObjects(objects, mesh, info or {}, restore_hyperparameters)
        self.settings = CheckpointConfig(
            name=self.kind,
            snapshot_every=snapshot_every,
            persist_every=persist_every,
            keep=keep,
            num_parity_shards=num_parity_shards,
            failure_domain=FailureDomain(failure_domain),
            shm_dir=None if shm_dir is None else str(shm_dir),
            agent_host=agent_host,
            lease_s=lease_s,
            max_send_bytes_per_s=max_send_bytes_per_s,
        )
        uses_disk = any(optimizer.uses_disk for optimizer in self.objects.out_of_core)
        if uses_disk and self.kind == CheckpointKind.erasure:
            raise ConfigError(
                "checkpoint",
                self.kind,
                "keeps snapshots in memory, and state that is offloaded to a disk does not fit there",
                "set checkpoint=durable or lazy: they pin the files that the state is in instead of copying them",
            )
        self.pinned_saver: PinnedSaver | None = None
        """Saves where state is on a disk, with `durable` and with `lazy`; None elsewhere."""
        if uses_disk:
            is_lazy = self.kind == CheckpointKind.lazy
            self.pinned_saver = PinnedSaver(self.store, self.objects, mesh, is_lazy)
        self.snapshots: SnapshotSaver | None = None
        """Takes snapshots in memory, once `open` was called; None without them."""
        self.agents: AgentClients | None = None
        self._last_events: list[dict[str, Any]] = []
        """The last events of snapshots in memory that were given up."""
        self._resumed: SnapshotId | None = None
        self._steps_since = 0
        self._is_put_off = self._is_persist_put_off = False
        self.current_step: int | None = None
        """The step that was saved or restored last: what is durable of it is what is in memory."""
        self.generation = 0
        """The number under which this attempt writes: those of older attempts are refused."""

    @property
    def is_durable_only(self) -> bool:
        """True if a checkpoint is committed when `snapshot` returns."""
        return self.kind == CheckpointKind.durable and self.pinned_saver is None

    @property
    def _keeps_snapshots(self) -> bool:
        return self.kind != CheckpointKind.durable and self.pinned_saver is None

    def open(self) -> None:
        """Makes the folder, and finds or starts the snapshot agents. Collective; others call it when they need it.

        Raises:
            RunFolderError: the folder cannot be used, or an agent does not start.
            ConfigError: the ranks cannot keep so much parity.
        """
        if not self._keeps_snapshots or self.snapshots is not None:
            return
        self.mesh.decide(self.store.open_for_writing)
        location = resolved(self.store.location)
        job = job_name(location, self.mesh.decide(self.store.job_id))
        self.agents = AgentClients(self.mesh, job, self.settings, location)
        self.agents.open()
        self.snapshots = SnapshotSaver(SnapshotCoordinator(self.agents), self.objects)

    def due(self, step: int) -> bool:
        is_snapshot_due = self.kind == CheckpointKind.erasure and step % self.settings.snapshot_every == 0
        return is_snapshot_due or step % self.settings.persist_every == 0 or self._is_put_off

    def put_off(self, step: int) -> None:
        """Instead of `snapshot`: what is due at `step` is due at the next step, too."""
        self._is_put_off = self.due(step)
        self._is_persist_put_off |= step % self.settings.persist_every == 0

    def reserve(self, num_more_bytes: int = 0) -> None:
        """Takes the shared memory that snapshots will need now, not in the middle of a run. Collective.

        Args:
            num_more_bytes: of this rank's state that does not exist yet, such as an optimizer's before its first step.

        Raises:
            DoesNotFit: there is not enough on some node.
        """
        if self._keeps_snapshots:
            self._begin_if_new()
            assert self.snapshots is not None
            self.snapshots.reserve(num_more_bytes)

    def snapshot(self, step: int) -> bool:
        """Takes a snapshot of `step`; what `persist_every` says is made durable as well. Collective.

        Returns:
            Whether it was begun. It is not, and counted, while the one before is not committed: training never waits
            for it.

        Raises:
            RunFolderError: as `save`, for `kind="durable"`, which does the same here. Where state is on a disk that
                returns before the commit: what fails after it is raised by the next call of `snapshot`, `save` or
                `close`.
        """
        if self.is_durable_only:
            self.save(step)
            return True
        self._begin_if_new()
        persist = step % self.settings.persist_every == 0 or self._is_persist_put_off
        self._is_put_off = self._is_persist_put_off = False
        self.objects.info.pop(KEEP_ALL, None)
        if self.pinned_saver is not None:
            return self.pinned_saver.take(step, self.generation, self.settings.keep)
        assert self.snapshots is not None
        return self.snapshots.take(step, persist) or self._go_on_without_memory(step)

    def _go_on_without_memory(self, step: int) -> bool:
        """Goes on as `durable`, from this step, if snapshots in memory are of no use any more. Collective."""
        assert self.snapshots is not None
        why = self.snapshots.coordinator.why_given_up
        if why is None:
            return False
        self._last_events = [*self.snapshots.poll(), {"kind": "memory_given_up", "step": step, "reason": why}]
        self.snapshots.coordinator.end()
        self.snapshots = self.agents = self._resumed = None
        self.kind = CheckpointKind.durable
        self.save(step)
        return True

    def wait_staged(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Returns when the weights may change: the copy of the last snapshot has ended. Not collective, but for state
        on a disk whose updates are put off: the snapshot, put off with them, is then taken here.

        Args:
            parameters: those that are about to change; None: all.
        """
        if self.pinned_saver is not None:
            self.pinned_saver.wait_staged()
        if self.snapshots is not None:
            self.snapshots.wait_staged(parameters)
        if parameters is None and self._resumed is not None and self.agents is not None:
            self._steps_since += 1
            if self._steps_since == 2:  # so one step was made in between
                self.agents.confirm_resume(self._resumed)
                self._resumed = None

    def poll(self) -> list[dict[str, Any]]:
        """Returns what has come of snapshots since the last call, as dicts with a `kind`. Not collective; costs little.

        Kinds: `snapshot_committed` (step; seconds, of which copy_s and encode_s; ended, in unix seconds),
        `persisted` (step, seconds, bytes, written_bytes, ended), `persist_failed` (step, reason),
        `snapshot_given_up` (reason), `snapshot_skipped` (step), `memory_given_up` (step, reason): from here on
        checkpoints are written while training waits.
        """
        events, self._last_events = self._last_events, []
        source = self.snapshots or self.pinned_saver
        return events + ([] if source is None else source.poll())

    def save(self, step: int, *, keep_all: bool = False) -> Location:
        """Writes a durable checkpoint and returns when it is committed. Collective.

        Args:
            keep_all: delete no older one for it, whatever `keep` says.

        The step that was saved or restored last is not written again. An older timeline's checkpoint of this step is
        renamed to `.superseded`.

        Raises:
            RunFolderError: the disk is full or refuses; earlier checkpoints are intact.
            OffloadError: so does the disk that state is on.
        """
        self._begin_if_new()
        self._is_put_off = self._is_persist_put_off = False
        self.objects.info.pop(KEEP_ALL, None)
        if keep_all:
            self.objects.info[KEEP_ALL] = True  # for the agents, which delete by what the checkpoint says
        exists = self.mesh.decide(lambda: step in self.store.steps())
        is_done = exists and step == self.current_step
        keep = 0 if keep_all else self.settings.keep
        if self.pinned_saver is not None:
            if not is_done:
                self.pinned_saver.save(step, self.generation, keep)
        elif not is_done and (self.snapshots is None or not self.snapshots.persist(step)):
            self._save_now(step, keep)
        self.current_step = step
        return step_folder(self.store.location, step)

    def _save_now(self, step: int, keep: int) -> None:
        """Writes a checkpoint from the tensors themselves, while training waits."""
        self.objects.settle()
        objects = self.objects.json_state()
        try:
            of_ranks = all_gather_object(self.mesh.agree(self._put_chunks), self.mesh.world)
            written = [chunk for rank in of_ranks for chunk in rank]
            self.mesh.decide(lambda: self._commit(step, objects, written))
        except Exception:
            if self.mesh.rank == 0:
                with contextlib.suppress(RunFolderError):  # the first error says more
                    self.store.remove_leftovers()
            raise
        self.mesh.decide(lambda: self.store.retain(keep))

    def _put_chunks(self) -> list[WrittenChunk]:
        return put_groups(self.store, self.objects.groups())

    def _commit(self, step: int, objects: dict[str, Any], written: list[WrittenChunk]) -> None:
        self.store.commit(step, self.generation, self.mesh.world_size, objects, written)

    def finish(self) -> None:
        """Waits for what this process is writing; agents keep what they have, and go on. Collective."""
        self._finish_saves()

    def close(self) -> None:
        """Waits for what is being written, and ends the agents, which leave nothing behind. Collective."""
        if self.pinned_saver is not None:
            self.pinned_saver.close()
        if self.snapshots is not None:
            self.snapshots.close()
            self.snapshots = self.agents = None

    # --- Attempts. ---

    def _begin_if_new(self) -> None:
        if self.generation == 0:
            self.open()
            self._begin(None)

    def _begin(self, plan: RecoveryPlan | None) -> None:
        """Takes a new generation: whoever writes with an older one is refused from now on."""
        in_memory = 0 if self.agents is None else self.agents.newest_generation()
        self.generation = 1 + max(in_memory, self.mesh.decide(self.store.generation))
        self.mesh.decide(lambda: self.store.fence(self.generation))
        if self.agents is not None:
            self.agents.begin_generation(self.generation, plan)

    # --- Restoring. ---

    def restore_latest(self) -> Restored | None:
        """Restores the newest state that is sound, from memory or else from disk; None where there is none. Collective.

        A damaged checkpoint is moved aside (`.damaged`) and the one before it is used.

        Raises:
            CorruptCheckpoint: there are checkpoints and none is sound.
            IncompatibleCheckpoint: as `restore`.
        """
        self._finish_saves()
        self.open()
        restored = self._restore_from_memory()
        return self._restore_from_store() if restored is None else restored

    def _restore_from_memory(self) -> Restored | None:
        agents = self.agents
        if agents is None or self.snapshots is None:
            return None
        self.snapshots.wait_staged()
        agents.refresh()  # this attempt may have taken snapshots, too
        durable_step = self.mesh.decide(self.store.latest_step)
        while (plan := plan_restore(agents)) is not None and plan.step >= (durable_step or 0):
            self._begin(plan)
            agents.refresh()
            if not agents.hold(plan):
                continue  # one that was in flight was given up, just before the fence
            begin = time.perf_counter()
            try:
                whole = agents.rebuild(plan) if plan.lost else plan
                decode_s = time.perf_counter() - begin
                agents.count_resume(plan.snapshot)
                self._restore_all(open_snapshot(agents, whole))
            except CorruptCheckpoint as error:
                logger.warning("%s", error)
                agents.distrust(plan.snapshot)
                continue
            self.current_step = plan.step if plan.step == durable_step else None
            self._resumed, self._steps_since = plan.snapshot, 0
            if agents.needs_protection(plan):
                self.snapshots.take(plan.step, persist=False)
            num_parts = len(whole.holders)
            origin = f"the memory of {num_parts} {self.settings.failure_domain}{'s' * (num_parts > 1)}"
            source = "parity" if plan.lost else "local_ram"
            return Restored(plan.step, origin, source=source, lost_nodes=len(plan.lost), decode_s=decode_s)
        return None

    def _restore_from_store(self) -> Restored | None:
        steps = self.mesh.decide(self.store.restorable_steps)
        damaged: list[Location] = []
        for step in reversed(steps):
            folder = step_folder(self.store.location, step)
            try:
                return Restored(self.restore(folder), folder, damaged)
            except CorruptCheckpoint:
                if step == steps[0]:
                    raise
                self._set_damaged_chunks_aside(step)
                damaged.append(self._set_aside(step, "damaged"))
        return None

    def restore(self, folder: Location) -> int:
        """Restores every object from one checkpoint, of whatever world size and cut. Collective.

        The generators of random numbers are restored if the world size is the one that saved; a rank of another
        world size keeps those it has. So do the objects, other than modules, that an imported checkpoint lacks.

        Returns:
            The step that was saved.

        Raises:
            CorruptCheckpoint: its bytes are not those that were written; the objects are partly overwritten.
            IncompatibleCheckpoint: it is of another model or optimizer; the objects are as they were.
        """
        self._finish_saves()
        self.open()
        reader = self.mesh.agree(lambda: self._open(folder))
        self._restore_all(reader)
        self._begin(None)
        self.current_step = reader.manifest.step if self.owns(folder) else None
        return reader.manifest.step

    def _open(self, folder: Location) -> CheckpointReader:
        """A checkpoint; in this run's own folder another run's is refused, for nobody has named it."""
        reader = open_checkpoint(folder)
        other = self.store.other_run(reader.manifest) if self.owns(folder) else None
        if other is not None:
            raise IncompatibleCheckpoint(
                "resume",
                folder,
                other,
                "delete it, or begin a run of its own from it: run_dir=NEW_FOLDER with resume= that path",
            )
        return reader

    def _finish_saves(self) -> None:
        """Ends the saves that are under way, before something else is done to the folder or the objects."""
        if self.pinned_saver is not None:
            self.pinned_saver.finish()

    def _restore_all(self, reader: CheckpointReader) -> None:
        self.wait_staged()
        self.objects.settle()
        if self.pinned_saver is not None:
            self.pinned_saver.forget()
        try:
            self.mesh.agree(lambda: self.objects.check_compatible(reader))
            self.mesh.agree(lambda: self.objects.read(reader))
        finally:
            reader.close()

    def has_any(self) -> bool:
        """True if there is something to go on from, on disk or in memory. Collective."""
        self._finish_saves()
        self.open()
        in_memory = self.agents is not None and plan_restore(self.agents) is not None
        return in_memory or self.mesh.decide(lambda: bool(self.store.steps()))

    def owns(self, folder: Location) -> bool:
        """True if `folder` is a checkpoint of this run."""
        return is_same_place(split(resolved(folder))[0], self.store.location)

    def set_newer_aside(self, step: int) -> list[Location]:
        """Renames checkpoints after `step` to `.superseded`, for a run that goes on from `step`. Collective."""
        self._finish_saves()
        steps = self.mesh.decide(self.store.steps)
        return [self._set_aside(newer, "superseded") for newer in steps if newer > step]

    def _set_aside(self, step: int, why: str) -> Location:
        return join(self.store.location, self.mesh.decide(lambda: self.store.set_aside(step, why)))

    def _set_damaged_chunks_aside(self, step: int) -> None:
        """Sets damaged chunks aside; each rank reads its part of them."""
        rank, world_size = self.mesh.rank, self.mesh.world_size
        self.mesh.agree(lambda: self.store.set_damaged_chunks_aside(step, rank, world_size))
