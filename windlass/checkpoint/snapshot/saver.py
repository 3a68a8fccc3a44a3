"""Takes snapshots of a run's objects into memory, and hears what has come of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from windlass.checkpoint.agent.ledger import SnapshotId
from windlass.checkpoint.durable.stage import spec_of
from windlass.checkpoint.image import Chunk, chunks_to_json, describe, image_bytes, lay_out, round_up
from windlass.checkpoint.objects import CheckpointedObjects
from windlass.checkpoint.pieces import Piece
from windlass.checkpoint.snapshot.coordinator import SnapshotCoordinator
from windlass.checkpoint.snapshot.lazy_copy import Copy, copy_items
from windlass.errors import ConfigError

HEAD_BYTES = 64 << 10
"""Descriptions grow and shrink by digits; a region is laid out for whole multiples of this."""
FREE_S = 120.0
"""How long the end of a run waits for the snapshot before it to be done."""
POLL_S = 0.01
DECIDE_S = 5.0
"""The ranks wait together for what one of them looks at; at most so long in one collective."""


@dataclass(frozen=True)
class _ImageChunks:
    """The chunks of an image: the same from one snapshot to the next, until an optimizer makes its state."""

    shape: list[tuple[Any, ...]]
    chunks: list[Chunk]
    text: str
    """The chunks as JSON."""


class SnapshotSaver:
    """Copies what `objects` hold into the slots that `coordinator` gets, one snapshot at a time.

    Collective unless said otherwise.
    """

    def __init__(self, coordinator: SnapshotCoordinator, objects: CheckpointedObjects) -> None:
        self.coordinator, self.objects, self.mesh = coordinator, objects, coordinator.agents.mesh
        self._copy: Copy | None = None
        self._head_bytes = HEAD_BYTES
        self._image = _ImageChunks([], [], "[]")
        self._owes_persist = False
        self._taken: tuple[int, bool] | None = None  # the newest step, and whether it is to be made durable
        self._is_in_flight = False
        self._newest_step = -1  # the newest that was begun: what is heard later may be of one before it
        self._persisting: set[int] = set()
        self._outcomes: dict[int, str] = {}  # of those that were last to be made durable
        self._events: list[dict[str, Any]] = []
        before = coordinator.agents.statuses[coordinator.agents.node]["events"]  # told to trainers that are no more
        self._newest_event = before[-1]["number"] if before else 0

    def reserve(self, num_more_bytes: int) -> None:
        pieces, chunks, head = self._describe()
        del pieces
        more_bytes = round_up(num_more_bytes, HEAD_BYTES)
        self.coordinator.reserve(self._head_bytes + image_bytes(chunks) + more_bytes + len(head))

    def take(self, step: int, persist: bool) -> bool:
        """Begins a snapshot of `step`; False if the one before is not done.

        A snapshot that was to be made durable and was not taken, or was given up, leaves that to the next.
        """
        persist = persist or self._owes_persist
        if self._begin(step, persist):
            return True
        self._owes_persist = persist
        self._events.append({"kind": "snapshot_skipped", "step": step})
        return False

    def _begin(self, step: int, persist: bool) -> bool:
        self.wait_staged()
        self.objects.settle()
        pieces, chunks, head = self._describe()
        target = self.coordinator.begin(step, self._head_bytes + image_bytes(chunks), persist)
        if target is None:
            return False
        self._taken, self._is_in_flight, self._owes_persist = (step, target.persist), True, False
        self._newest_step = step
        if target.persist:
            self._persisting.add(step)
            self._outcomes = {}
        if target.region is None:
            return True
        image = self._head_bytes
        # What only the optimizer's step changes is copied behind the training, all else now.
        tensors = {
            piece.fragment.name: piece.tensor if piece.owner is not None else piece.tensor.clone() for piece in pieces
        }

        def finished(checksums: np.ndarray, error: Exception | None) -> None:
            self._copied(target.snapshot, checksums, error)

        owners = _ends(pieces, chunks, image)
        self._copy = Copy(target.region, head, copy_items(chunks, image, tensors), owners, finished)
        return True

    def _describe(self) -> tuple[list[Piece], list[Chunk], bytes]:
        pieces = self._pieces()
        fragments = [piece.fragment for piece in pieces]
        shape = [(part.name, part.dtype, part.offset, part.shape) for part in fragments]
        if self._image.shape != shape:
            chunks = lay_out(spec_of(part) for part in fragments)
            self._image = _ImageChunks(shape, chunks, json.dumps(chunks_to_json(chunks), separators=(",", ":")))
        rank = self.mesh.rank
        objects = self.objects.json_state() if rank == 0 else {}
        head = describe(rank, self._image.text, objects)
        while len(head) > self._head_bytes:
            self._head_bytes = round_up(len(head) + len(head) // 4, HEAD_BYTES)
        return pieces, self._image.chunks, head

    def _pieces(self) -> list[Piece]:
        groups = list(self.objects.groups())
        if any(group.load is not None for group in groups):
            raise ConfigError(
                "checkpoint",
                "lazy or erasure",
                "copies what is in memory behind the training, and weights are elsewhere",
                "set checkpoint=durable",
            )
        return [piece for group in groups for piece in group.pieces]

    def _copied(self, snapshot: SnapshotId, checksums: np.ndarray, error: Exception | None) -> None:
        """Tells the agent how the copy ended. Runs in the copying thread."""
        if error is None:
            self.coordinator.copied(snapshot, checksums)
        else:
            self.coordinator.give_up(snapshot, f"{type(error).__name__}: {error}")

    def wait_staged(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Returns when `parameters` and their state may change; all for None. Not collective."""
        if self._copy is not None:
            self._copy.wait(parameters)
            if parameters is None:
                self._copy = None

    def poll(self) -> list[dict[str, Any]]:
        """Returns what has come of snapshots since the last call. Not collective."""
        self._look()
        events, self._events = self._events, []
        return events

    def _look(self) -> None:
        """Asks the agent, if there is something to be heard."""
        if not (self._is_in_flight or self._persisting):
            return
        for event in self.coordinator.events(self._newest_event):
            self._newest_event = event.pop("number")
            kind = event["kind"]
            if kind in ("snapshot_committed", "snapshot_given_up"):
                self.coordinator.count(is_failure=kind == "snapshot_given_up")
                if event["step"] == self._newest_step:
                    self._is_in_flight = False
            if kind == "snapshot_given_up":
                if event["step"] in self._persisting:
                    self._outcomes[event["step"]] = kind
                    self._persisting.discard(event["step"])
                    self._owes_persist = True
            elif kind != "snapshot_committed":
                self._outcomes[event["step"]] = kind
                self._persisting.discard(event["step"])
            self._events.append(event)

    def persist(self, step: int) -> bool:
        """Makes `step` durable and returns when it is; False if that cannot be done from a snapshot."""
        self.wait_staged()
        if self._taken != (step, True):
            deadline = time.monotonic() + FREE_S
            while not self._begin(step, persist=True):
                if self.coordinator.why_given_up or self.mesh.decide(lambda: time.monotonic() > deadline):
                    return False
                time.sleep(POLL_S)
        while True:
            outcome = self.mesh.decide(lambda: self._wait_for(step))
            if outcome is not None or self.coordinator.reopen_if_lost():
                self._taken = None
                return outcome == "persisted"

    def _wait_for(self, step: int) -> str | None:
        """Waits for a while for `step` to be durable; returns how it went, None if that is still open. On one rank."""
        deadline = time.monotonic() + DECIDE_S
        while time.monotonic() < deadline:
            self._look()
            if step in self._outcomes:
                return self._outcomes[step]
            time.sleep(POLL_S)
        return None

    def close(self) -> None:
        """Waits for what is under way, and ends the agents."""
        self.wait_staged()
        deadline = time.monotonic() + FREE_S
        while not self.mesh.decide(lambda: self._is_idle() or time.monotonic() > deadline):
            self.coordinator.reopen_if_lost()
            if self.coordinator.why_given_up:
                break
        self.mesh.barrier()
        self.coordinator.end()

    def _is_idle(self) -> bool:
        deadline = time.monotonic() + DECIDE_S
        while time.monotonic() < deadline:
            if self.coordinator.is_idle():
                return True
            time.sleep(POLL_S)
        return False


def _ends(pieces: list[Piece], chunks: list[Chunk], image_begin: int) -> dict[int, int]:
    """The end in the region of each parameter and its state, by the parameter's `id`."""
    ends = {entry.spec.name: image_begin + entry.end for chunk in chunks for entry in chunk.entries}
    owners: dict[int, int] = {}
    for piece in pieces:
        if piece.owner is not None:
            owners[id(piece.owner)] = max(owners.get(id(piece.owner), 0), ends[piece.fragment.name])
    return owners
