"""Keeps the optimizer state of buckets, and gets it into the optimizer and out of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from windlass.offload.arena import Arena
from windlass.offload.buckets import SlotTable, is_elsewhere, spread
from windlass.offload.conveyor import Conveyor, Load
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFolder
from windlass.out_of_core import StateAtRest, StatePlace
from windlass.parallel.fragment import Tier, local_tensor


class Bucket:
    """Parameters that step together, and where their state is."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.slot_table = SlotTable(())
        self.load: Load | None = None
        """None while the state is where the optimizer puts it: before `place`, and if there is none worth moving."""


class StateStore:
    """The state of the optimizer `inner`, of which what is elsewhere is a tensor on the meta device there."""

    def __init__(self, inner: torch.optim.Optimizer, buckets: Sequence[Bucket]) -> None:
        self._inner, self._buckets = inner, buckets
        self.conveyor: Conveyor | None = None
        """Once the buckets have their places."""
        self._viewed: tuple[Bucket, Tensor] | None = None
        self._is_viewed_new = False
        """True if the viewed state has to be written home before anything else is done with it."""

    def place(
        self,
        folder: TierFolder | None,
        max_device_bytes: int,
        max_host_bytes: int | None,
        buffer_bytes: int,
        num_versions: int,
    ) -> None:
        """Decides which buckets stay on the device and which go to host memory, and makes the homes of all others.

        Args: as `OffloadedOptimizer` has them. The buckets have their slot tables.

        Raises:
            DoesNotFit: there is not enough room.
        """
        device = next((p.device for bucket in self._buckets for p in bucket.parameters), torch.device("cpu"))
        budgets = [max_device_bytes, None if folder is None else max_host_bytes]
        places = spread([bucket.slot_table.num_bytes for bucket in self._buckets], budgets)
        on_disk: list[Bucket] = []
        for bucket, place in zip(self._buckets, places, strict=True):
            if place == 1:
                memory = torch.empty(bucket.slot_table.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
                bucket.load = Load(memory)
            elif place == 2:
                on_disk.append(bucket)
        largest = max((bucket.slot_table.num_bytes for bucket in on_disk), default=1)
        arena = Arena(max(buffer_bytes if on_disk else 1, largest), pin=device.type == "cuda")
        self.conveyor = Conveyor(arena, Staging(device))
        if on_disk:
            assert folder is not None
            folder.reserve(num_versions * sum(bucket.slot_table.num_bytes for bucket in on_disk))
            for bucket in on_disk:
                bucket.load = Load(folder.create(bucket.slot_table.num_bytes))

    # --- For updates. ---

    def bring(self, bucket: Bucket) -> Tensor:
        """Brings the bucket's state into the optimizer; returns the bytes that it lies in."""
        self.look_away()
        data = self._bytes_of(bucket)
        for slot in bucket.slot_table.slots:
            state = self._inner.state.get(slot.parameter)
            if state and slot.key in state and is_elsewhere(state[slot.key]):
                state[slot.key] = slot.tensor_for_update(data)
        return data

    def leave(self, bucket: Bucket, data: Tensor) -> None:
        """Takes the bucket's state out of the optimizer and sends it home, from the bytes that `bring` returned.

        Raises:
            ValueError: the optimizer keeps something else than at first.
        """
        assert self.conveyor is not None and bucket.load is not None
        state = [(parameter, self._inner.state.get(parameter, {})) for parameter in bucket.parameters]
        self._check_slots(bucket, state)
        self._pack(bucket, data, bucket.parameters)
        self.conveyor.take_back(bucket.load)

    def stow(self, bucket: Bucket) -> None:
        """Sends home state that is in the optimizer's memory."""
        if bucket.load is not None:
            self.look_away()
            self.leave(bucket, self._bytes_of(bucket))

    def look_ahead(self, buckets: Iterable[Bucket]) -> None:
        """Begins to read the state of `buckets`, the first first."""
        if self.conveyor is not None:
            self.conveyor.look_ahead(bucket.load for bucket in buckets if bucket.load is not None)

    # --- For those who look at it. ---

    def at_rest(self) -> list[StateAtRest]:
        """See `windlass.out_of_core.OutOfCore.state_at_rest`."""
        self.look_away()
        if self.conveyor is not None:
            self.conveyor.begin_writes()
        found = []
        for bucket in self._buckets:
            places = [
                StatePlace(slot.parameter, slot.key, slot.begin, slot.end)
                for slot in bucket.slot_table.slots
                if is_elsewhere(self._inner.state.get(slot.parameter, {}).get(slot.key))
            ]
            if bucket.load is not None and places:
                found.append(StateAtRest(places, bucket.load.home))
        return found

    def loaded(self, bucket: Bucket | None, parameter: Tensor) -> dict[str, Any]:
        """The state of the bucket's `parameter` in memory, until another bucket is used; not to be changed."""
        state = dict(self._inner.state.get(parameter, {}))
        if bucket is not None and any(is_elsewhere(value) for value in state.values()):
            data = self._look_at(bucket)
            for key in state:
                slot = bucket.slot_table.slot(parameter, key)
                if slot is not None:
                    state[key] = slot.tensor(data)
        return state

    def put(self, bucket: Bucket, parameter: Tensor, state: dict[str, Any]) -> None:
        """Replaces the state of the bucket's `parameter`. Its other parameters had better come next."""
        if bucket.load is not None:
            self._check_slots(bucket, [(parameter, state)])
        self._inner.state[parameter] = dict(state)
        if bucket.load is not None:
            data = self._look_at(bucket)  # and its other parameters come next: it goes home once
            self._is_viewed_new = True
            self._pack(bucket, data, [parameter])

    def look_away(self) -> None:
        """Lets go of what was looked at."""
        if self._viewed is not None:
            assert self.conveyor is not None and self._viewed[0].load is not None
            load, self._viewed = self._viewed[0].load, None
            if self._is_viewed_new:
                self.conveyor.take_back(load)
            else:
                self.conveyor.drop(load)

    @property
    def stall_s(self) -> float:
        """Seconds that training has waited for state so far."""
        return 0.0 if self.conveyor is None else self.conveyor.stall_s

    def num_bytes(self) -> dict[Tier, int]:
        """The bytes of this rank's state in host memory and on the disk, without tensors that are too small to move."""
        found = {Tier.host: 0, Tier.ssd: 0}
        for bucket in self._buckets:
            if bucket.load is not None:
                found[Tier.host if isinstance(bucket.load.home, Tensor) else Tier.ssd] += bucket.load.num_bytes
        return found

    def close(self) -> None:
        self._viewed = None
        if self.conveyor is not None:
            self.conveyor.abandon()

    def _bytes_of(self, bucket: Bucket) -> Tensor:
        assert self.conveyor is not None and bucket.load is not None
        return self.conveyor.bring(bucket.load)

    def _look_at(self, bucket: Bucket) -> Tensor:
        """The bytes of the bucket, unchanged until another is looked at or updated: its parameters come in a row."""
        if self._viewed is None or self._viewed[0] is not bucket:
            self.look_away()
            self._viewed, self._is_viewed_new = (bucket, self._bytes_of(bucket)), False
        return self._viewed[1]

    def _check_slots(self, bucket: Bucket, state: list[tuple[Tensor, dict[str, Any]]]) -> None:
        if not bucket.slot_table.holds(state):
            raise ValueError(
                f"{type(self._inner).__name__} keeps {SlotTable(state)} where its first step kept "
                f"{bucket.slot_table}: state "
                "that changes its shape cannot be offloaded"
            )

    def _pack(self, bucket: Bucket, data: Tensor, parameters: Sequence[Tensor]) -> None:
        """Leaves shapes in the optimizer's state of `parameters`, and the tensors' bytes in `data`."""
        members = set(parameters)
        for slot in bucket.slot_table.slots:
            state = self._inner.state.get(slot.parameter, {})
            if slot.parameter not in members or slot.key not in state:
                continue
            value, place = local_tensor(state[slot.key]), slot.local(data)
            if value.data_ptr() != place.data_ptr() or value.stride() != place.stride():
                place.copy_(value)  # the optimizer has made a new tensor
            state[slot.key] = slot.like
