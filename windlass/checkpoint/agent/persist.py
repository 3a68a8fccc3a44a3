"""Writes snapshots to the durable tier, from the slots, behind the training: the thread that does what `PersistQueue`
decides."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

from windlass.checkpoint.agent.effects import Group, Json, WriteCheckpoint, WritePart
from windlass.checkpoint.agent.header import Region
from windlass.checkpoint.agent.persist_queue import Outcome
from windlass.checkpoint.agent.slots import SlotMemory
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checkpoint.durable.store import KEEP_ALL, DurableStore, WrittenChunk
from windlass.checkpoint.image import Description
from windlass.checksum import crc32c
from windlass.errors import RunFolderError, WindlassError

if TYPE_CHECKING:
    from windlass.checkpoint.agent.process import Agent
    from windlass.checkpoint.durable.storage import Location

logger = logging.getLogger(__name__)


class Persister(threading.Thread):
    """Does one piece of work at a time, and tells the core how it went."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(name="persist", daemon=True)
        self.agent = agent
        self.target: tuple[Location, int] | None = None
        """The place of the checkpoints, and how many are kept."""
        self.work: queue.SimpleQueue[WritePart | WriteCheckpoint] = queue.SimpleQueue()
        self._began = 0.0

    def run(self) -> None:
        agent = self.agent
        while True:
            work = self.work.get()
            assert self.target is not None
            location, num_kept = self.target
            if isinstance(work, WritePart):
                agent.tell(agent.core.part_written, self._write_part(work, location))
            else:
                agent.tell(agent.core.checkpoint_written, self._write_checkpoint(work, location, num_kept))

    def _write_part(self, work: WritePart, location: Location) -> Json:
        """The part as the writer is told of it."""
        self._began = time.monotonic()
        part: Json = {"type": "written", "snapshot": work.snapshot, "position": work.group.position}
        try:
            return part | self._put_chunks(work, location)
        except WindlassError as error:
            return part | {"error": str(error)}
        except (ValueError, OSError) as error:
            logger.exception("step %d could not be written", work.step)
            return part | {"error": f"{type(error).__name__}: {error}"}

    def _put_chunks(self, work: WritePart, location: Location) -> Json:
        """Puts the chunks of this node's ranks."""
        memory = self.agent.whole_part(work.snapshot, work.group.position)
        if memory is None:
            raise ValueError("the snapshot is gone")
        store, written, objects = DurableStore(location), [], {}
        for region in memory.header.own_regions:
            _check_region(memory, region)
            view = memory.data[region.offset : region.offset + region.nbytes]
            description, image = Description.from_region(view)
            objects |= description.objects
            for chunk in description.chunks:
                if self.agent.core.group is not work.group:
                    raise ValueError("the generation is over")
                written.append(store.put_chunk(chunk, view[image + chunk.begin : image + chunk.end]).to_json())
        return {"error": None, "written": written, "objects": objects, "world_size": memory.header.world_size}

    def _write_checkpoint(self, work: WriteCheckpoint, location: Location, num_kept: int) -> Outcome:
        """Makes a checkpoint of all nodes' parts, unless one of them failed."""
        error = next((part["error"] for part in work.parts if part["error"]), None)
        written = [WrittenChunk.from_json(chunk) for part in work.parts for chunk in part.get("written", [])]
        store = DurableStore(location)
        try:
            if error is None:
                objects = {key: value for part in work.parts for key, value in part["objects"].items()}
                store.commit(work.step, work.group.generation, work.parts[0]["world_size"], objects, written)
                if not objects.get("info", {}).get(KEEP_ALL):
                    store.retain(num_kept)
        except WindlassError as failure:
            error = str(failure)
        if error is not None:
            self._clean(store, work.group)
        return Outcome(
            error,
            work.step,
            time.monotonic() - self._began,
            sum(chunk.size for chunk in written),
            sum(chunk.size for chunk in written if chunk.written),
        )

    def _clean(self, store: DurableStore, group: Group) -> None:
        """Removes what was written for nothing: it may be what fills the disk."""
        try:
            if self.agent.core.group is group:
                store.remove_leftovers()
        except RunFolderError as error:
            logger.warning("%s", error)


def _check_region(memory: SlotMemory, region: Region) -> None:
    """Raises ValueError if memory has changed since trainers wrote it: what is damaged is not made durable."""
    first = region.offset // BLOCK_BYTES
    for number in range(first, first + -(-region.nbytes // BLOCK_BYTES)):
        if crc32c(memory.blocks(number)) != int(memory.table[number]):
            raise ValueError(f"block {number} of the snapshot has changed in memory")
