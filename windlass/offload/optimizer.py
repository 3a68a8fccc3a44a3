"""The out-of-core step: any torch optimizer's state lies elsewhere, and comes in a bucket at a time to be updated.

While one bucket is updated, in the buffer that it was read into, the next ones are read and the last ones are written.
The optimizer itself steps as ever; it only sees the gradients of one bucket at a time. So there is no code here that
knows an algorithm, and none that a new algorithm needs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from windlass.offload.arena import Arena
from windlass.offload.buckets import RESIDENT_NUMEL, Layout, divide, is_elsewhere, is_stowed, on_meta, spread
from windlass.offload.config import BUFFER_BYTES, OffloadKind
from windlass.offload.conveyor import Conveyor, Load
from windlass.offload.direct_io import Engine
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFolder
from windlass.offload.trial import trial_state
from windlass.parallel.fragment import Tier, local_tensor
from windlass.parallel.out_of_core import StateAtRest, StatePlace

if TYPE_CHECKING:
    from windlass.offload.weights import Weights


def offload_optimizer(
    optimizer: torch.optim.Optimizer,
    tier: OffloadKind | str = OffloadKind.ssd,
    dir: Path | str | None = None,
    *,
    max_device_bytes: int = 0,
    max_host_bytes: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> OffloadedOptimizer:
    """Keeps the state of `optimizer`, which may be any torch optimizer that treats each parameter by itself, elsewhere.

        optimizer = offload_optimizer(torch.optim.AdamW(model.parameters()), tier="ssd", dir="/nvme")

    The result is used in place of `optimizer`: step, zero_grad, param_groups, learning-rate schedulers, state_dict.
    Weights are the same, to the bit, as without. Parameters may be plain or DTensors, on the CPU or a GPU.

    Args:
        tier: `ssd`, or `cpu` for host memory (of use where the parameters are on a GPU).
        dir: for `ssd`, a folder on a local disk. Files of this process go into a folder of their own there, which is
            removed at the end (`close`), or by the next that uses `dir` if this process is killed.
        max_device_bytes: of the state that stays where the parameters are.
        max_host_bytes: for `ssd`, of the state that stays in host memory; the rest is on the disk. None: nothing.
        buffer_bytes: host memory for state on its way; raised to the state of the largest bucket (64 MiB with AdamW, or
            that of a larger parameter) if that is more.

    Raises:
        ValueError: the arguments do not fit together, or the optimizer cannot step on some parameters at a time.
        DoesNotFit: the disk or the memory is too small. OffloadError: the folder cannot be used.
    """
    kind = OffloadKind(tier)
    if kind == OffloadKind.none or (kind == OffloadKind.ssd) != (dir is not None):
        raise ValueError(f'tier="{kind}" with dir={dir}: give tier="ssd" and the folder, or tier="cpu" and no folder')
    if max_host_bytes is not None and kind == OffloadKind.cpu:
        raise ValueError(
            f'max_host_bytes={max_host_bytes} with tier="cpu": the rest would have no place; use tier="ssd"'
        )
    if kind == OffloadKind.ssd:
        max_host_bytes = max_host_bytes or 0
    folder = None if dir is None else TierFolder(Path(dir), Engine(), "optimizer")
    offloaded = OffloadedOptimizer(
        optimizer,
        folder,
        max_device_bytes=max_device_bytes,
        max_host_bytes=max_host_bytes,
        buffer_bytes=buffer_bytes,
    )
    offloaded.owns_folder = True
    return offloaded


class _Bucket:
    """Parameters that step together, and where their state is."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.layout = Layout(())
        self.load: Load | None = None
        """None while the state is where the optimizer puts it: before `reserve`, and if there is none worth moving."""


class OffloadedOptimizer(torch.optim.Optimizer):
    """See `offload_optimizer`.

    Args:
        folder: where files go; None keeps all state in host memory.
        num_versions: files of a bucket that there must be room for. A checkpoint pins one while steps write the other.
        order: parameters in the order in which they are updated, in runs that may share a bucket (e.g. those of a
            layer); those that it does not name come last. None: as the optimizer has them.
        weights: those of the parameters that are not in memory all the time.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        folder: TierFolder | None,
        *,
        max_device_bytes: int = 0,
        max_host_bytes: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        num_versions: int = 2,
        order: Sequence[Sequence[Tensor]] | None = None,
        weights: Weights | None = None,
    ) -> None:
        closure = inspect.signature(inner.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(inner).__name__} computes the loss itself, of all parameters at once, so it cannot step on "
                "some of them at a time, which offloading does; use an optimizer whose step needs no closure"
            )
        self.inner, self.folder, self.weights = inner, folder, weights
        self.owns_folder = False
        """Whether `close` removes the folder, or leaves that to another."""
        self._order = order
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state
        self.max_device_bytes, self.max_host_bytes, self.buffer_bytes = max_device_bytes, max_host_bytes, buffer_bytes
        self._num_versions = num_versions
        self._conveyor: Conveyor | None = None
        self._is_reserved = False
        self.before_step: list[Callable[[], None]] = []
        """Called before a step changes anything, but after the updates that the one before has put off."""
        self.is_deferring = False
        """Whether `step` only takes the gradients, and each bucket is updated when `update` asks for it."""
        self._pending: dict[_Bucket, dict[Tensor, Tensor]] = {}
        self._pending_settings: list[dict[str, Any]] = []
        self._viewed: tuple[_Bucket, Tensor] | None = None
        self._is_viewed_new = False
        """Whether what is viewed is to be sent home, before anything else is done with it."""
        self._divide()

    # --- Buckets. ---

    def _divide(self) -> None:
        members = [parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad]
        resident = [parameter for parameter in members if local_numel(parameter) <= RESIDENT_NUMEL]
        others = {parameter: None for parameter in members if local_numel(parameter) > RESIDENT_NUMEL}
        runs = [[p for p in run if p in others] for run in self._order or ()]
        for run in runs:
            for parameter in run:
                del others[parameter]
        self._resident = _Bucket(resident)
        self._buckets = [_Bucket(parameters) for run in (*runs, list(others)) for parameters in divide(run)]
        self._bucket_of = {p: bucket for bucket in (self._resident, *self._buckets) for p in bucket.parameters}
        self._sequence = list(self._buckets)  # as they were updated last time
        self._updated: list[_Bucket] = []  # in this step, so far

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after construction: add it to the optimizer before it is offloaded."""
        if hasattr(self, "_pending"):
            raise ValueError("add param groups before the optimizer is offloaded: space is reserved for those it has")
        super().add_param_group(param_group)

    def bucket_parameters(self) -> list[list[Tensor]]:
        """The parameters by bucket, in the order in which they are updated."""
        return [bucket.parameters for bucket in self._buckets]

    # --- Space. ---

    def reserve(self) -> int:
        """Takes the disk space and the memory that the state will need, before anything is trained.

        Returns:
            The bytes of all state of this rank.

        Raises:
            DoesNotFit: there is not enough.
            ValueError: the optimizer cannot step in parts.
        """
        if not self._is_reserved:
            states = {bucket: self._first_state(bucket) for bucket in self._buckets}
            for bucket, state in states.items():
                bucket.layout = Layout(state)
            self._place()
            self._is_reserved = True
            for bucket, state in states.items():
                if any(parameter in self.state for parameter, _ in state):
                    self._stow(bucket)
        return sum(bucket.layout.num_bytes for bucket in self._buckets)

    def _first_state(self, bucket: _Bucket) -> list[tuple[Tensor, dict[str, Any]]]:
        """The state of the bucket, or one like that which it will have."""
        with self._weights_in(bucket.parameters):
            states = trial_state(self.inner, bucket.parameters)
        # Only the shapes are wanted: as they come, they would add up to all of the state.
        return [
            (parameter, self.state.get(parameter) or {key: _shape_of(value) for key, value in state.items()})
            for parameter, state in zip(bucket.parameters, states, strict=True)
        ]

    def _place(self) -> None:
        """Decides which buckets stay on the device and which go to host memory, and makes the homes of all others."""
        device = next((p.device for bucket in self._buckets for p in bucket.parameters), torch.device("cpu"))
        max_host_bytes = None if self.folder is None else self.max_host_bytes
        places = spread([bucket.layout.num_bytes for bucket in self._buckets], [self.max_device_bytes, max_host_bytes])
        on_disk: list[_Bucket] = []
        for bucket, place in zip(self._buckets, places, strict=True):
            if place == 1:
                memory = torch.empty(bucket.layout.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
                bucket.load = Load(memory)
            elif place == 2:
                on_disk.append(bucket)
        largest = max((bucket.layout.num_bytes for bucket in on_disk), default=1)
        arena = Arena(max(self.buffer_bytes if on_disk else 1, largest), pin=device.type == "cuda")
        self._conveyor = Conveyor(arena, Staging(device))
        if on_disk:
            assert self.folder is not None
            self.folder.reserve(self._num_versions * sum(bucket.layout.num_bytes for bucket in on_disk))
            for bucket in on_disk:
                bucket.load = Load(self.folder.create(bucket.layout.num_bytes))

    # --- Steps. ---

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient; with `is_deferring`, takes the gradients of most for `update`.

        Raises:
            OffloadError: the disk failed, or gave back other bytes than were written.
            ValueError: the optimizer cannot step in parts, or a parameter was frozen when it was offloaded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reserve()
        self.settle()
        for callback in self.before_step:
            callback()
        gradients: dict[_Bucket, dict[Tensor, Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradients.setdefault(self._bucket_with(parameter), {})[parameter] = parameter.grad
                    parameter.grad = None
        resident = gradients.pop(self._resident, None)
        if resident:
            self._step_on(resident)
        if self.is_deferring:
            self._pending_settings = [_settings(group) for group in self.param_groups]
            self._pending = gradients
        for bucket in [] if self.is_deferring else self._in_sequence(gradients):
            self._update(bucket, gradients.pop(bucket))
        return loss

    def settle(self) -> None:
        """Makes every update that was put off."""
        self._update_pending(self._in_sequence(self._pending))

    def update(self, parameters: Iterable[Tensor]) -> None:
        """Makes the updates that were put off of the buckets that `parameters` are in."""
        if self._pending:
            buckets = dict.fromkeys(self._bucket_of[p] for p in parameters if p in self._bucket_of)
            self._update_pending([bucket for bucket in buckets if bucket in self._pending])

    @torch.no_grad()
    def _update_pending(self, buckets: Sequence[_Bucket]) -> None:
        if buckets:
            with self._gradients_aside(), self._settings_of_step():
                for bucket in buckets:
                    self._update(bucket, self._pending.pop(bucket))

    @contextlib.contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """The next step's gradients, as far as they are there, are not those of the step whose updates are made."""
        found = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        for parameter in found:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in found.items():
                parameter.grad = gradient

    @contextlib.contextmanager
    def _settings_of_step(self) -> Iterator[None]:
        """The learning rate and so on that the step had: a scheduler has changed them since."""
        now = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        try:
            for group, settings in zip(self.param_groups, self._pending_settings, strict=True):
                group.update(settings)
            yield
        finally:
            for group, settings in zip(self.param_groups, now, strict=True):
                group.update(settings)

    def _bucket_with(self, parameter: Tensor) -> _Bucket:
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            raise ValueError(
                f"a parameter of shape {list(parameter.shape)} was frozen when its optimizer was offloaded, and has a "
                "gradient now: space is reserved for those that were not; unfreeze it before"
            )
        return bucket

    def _in_sequence(self, buckets: Mapping[_Bucket, Any]) -> list[_Bucket]:
        return [bucket for bucket in self._sequence if bucket in buckets]

    def _update(self, bucket: _Bucket, gradients: dict[Tensor, Tensor]) -> None:
        """One bucket's step. `gradients` is emptied, so that they are freed before the next comes."""
        self._note(bucket)
        self._look_away()
        with self._weights_in(bucket.parameters, write=True):
            if bucket.load is None:
                self._step_on(gradients)
            else:
                data = self._bring(bucket)
                self._step_on(gradients)
                self._leave(bucket, data)
        gradients.clear()
        self.look_ahead()

    def _step_on(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """The inner optimizer's step on some parameters alone; others have no gradient now."""
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        try:
            self.inner.step()
        finally:
            for parameter in gradients:
                parameter.grad = None

    def _note(self, bucket: _Bucket) -> None:
        """Learns the order of updates, to read ahead in it."""
        if bucket in self._updated:  # another step has begun
            missing = [other for other in self._sequence if other not in self._updated]
            self._sequence, self._updated = [*self._updated, *missing], []
        self._updated.append(bucket)

    def look_ahead(self) -> None:
        """Begins to read what will be updated next. Costs little; to be called now and then."""
        if self._conveyor is not None and self._updated:
            place = self._sequence.index(self._updated[-1]) + 1
            following = self._sequence[place:] + self._sequence[:place]
            self._conveyor.look_ahead(bucket.load for bucket in following if bucket.load is not None)

    @property
    def has_pending(self) -> bool:
        """Whether updates are put off."""
        return bool(self._pending)

    # --- State in and out. ---

    def _bring(self, bucket: _Bucket) -> Tensor:
        """Brings the bucket's state into the inner optimizer; returns the bytes that it lies in."""
        assert self._conveyor is not None and bucket.load is not None
        data = self._conveyor.bring(bucket.load)
        for slot in bucket.layout.slots:
            state = self.state.get(slot.parameter)
            if state and slot.key in state and is_elsewhere(state[slot.key]):
                state[slot.key] = slot.tensor(data)
        return data

    def _leave(self, bucket: _Bucket, data: Tensor) -> None:
        """Takes the bucket's state out of the inner optimizer and sends it home."""
        assert self._conveyor is not None and bucket.load is not None
        self._check_layout(bucket, [(parameter, self.state.get(parameter, {})) for parameter in bucket.parameters])
        self._pack(bucket, data, bucket.parameters)
        self._conveyor.take_back(bucket.load)

    def _check_layout(self, bucket: _Bucket, state: list[tuple[Tensor, dict[str, Any]]]) -> None:
        if not bucket.layout.holds(state):
            raise ValueError(
                f"{type(self.inner).__name__} keeps {Layout(state)} where its first step kept {bucket.layout}: state "
                "that changes its shape cannot be offloaded"
            )

    def _pack(self, bucket: _Bucket, data: Tensor, parameters: Sequence[Tensor]) -> None:
        """Leaves shapes in the inner optimizer's state of `parameters`, and the tensors' bytes in `data`."""
        members = set(parameters)
        for slot in bucket.layout.slots:
            state = self.state.get(slot.parameter, {})
            if slot.parameter not in members or slot.key not in state:
                continue
            value, place = local_tensor(state[slot.key]), slot.local(data)
            if value.data_ptr() != place.data_ptr() or value.stride() != place.stride():
                place.copy_(value)  # the optimizer has made a new tensor
            state[slot.key] = slot.like

    def _stow(self, bucket: _Bucket) -> None:
        """Sends home state that is in the inner optimizer's memory."""
        if bucket.load is not None:
            assert self._conveyor is not None
            self._look_away()
            self._leave(bucket, self._conveyor.bring(bucket.load))

    @property
    def uses_disk(self) -> bool:
        """Whether some of the state or the weights may be on a disk."""
        return self.folder is not None

    def has_weights_elsewhere(self, parameter: Tensor) -> bool:
        """Whether the parameter's memory does not hold its weights now."""
        return self.weights is not None and self.weights.is_elsewhere(parameter)

    def weights_loaded(
        self, parameters: Sequence[Tensor], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """While it lasts the parameters' weights are in their memory; with `write`, what they are then is kept."""
        return self._weights_in(parameters, write=write)

    def state_at_rest(self) -> list[StateAtRest]:
        """The state that is elsewhere, of the last step. Valid until the next one.

        Raises:
            OffloadError: an earlier write failed.
        """
        self._look_away()
        if self._conveyor is not None:
            self._conveyor.begin_writes()
        found = []
        for bucket in self._buckets:
            places = [
                StatePlace(slot.parameter, slot.key, slot.begin, slot.end)
                for slot in bucket.layout.slots
                if is_elsewhere(self.state.get(slot.parameter, {}).get(slot.key))
            ]
            if bucket.load is not None and places:
                found.append(StateAtRest(places, bucket.load.home))
        return found

    def _weights_in(
        self, parameters: Sequence[Tensor], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.weights is None else self.weights.loaded(parameters, write=write)

    @contextlib.contextmanager
    def state_loaded(self, parameter: Tensor) -> Iterator[dict[str, Any]]:
        """While it lasts the parameter's state is in memory, as returned. Not to be changed."""
        bucket = self._bucket_of.get(parameter)
        state = dict(self.state.get(parameter, {}))
        if bucket is not None and any(is_elsewhere(value) for value in state.values()):
            data = self._look_at(bucket)
            for key in state:
                slot = bucket.layout.slot(parameter, key)
                if slot is not None:
                    state[key] = slot.tensor(data)
        yield state

    def _look_at(self, bucket: _Bucket) -> Tensor:
        """The bytes of the bucket, unchanged until another is looked at or updated: its parameters come in a row."""
        assert self._conveyor is not None and bucket.load is not None
        if self._viewed is None or self._viewed[0] is not bucket:
            self._look_away()
            self._viewed, self._is_viewed_new = (bucket, self._conveyor.bring(bucket.load)), False
        return self._viewed[1]

    def _look_away(self) -> None:
        if self._viewed is not None:
            assert self._conveyor is not None and self._viewed[0].load is not None
            load, self._viewed = self._viewed[0].load, None
            if self._is_viewed_new:
                self._conveyor.take_back(load)
            else:
                self._conveyor.drop(load)

    @torch.no_grad()
    def put_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Replaces the parameter's state; an empty one removes it."""
        self.reserve()
        bucket = self._bucket_of[parameter]
        if not state:
            self.state.pop(parameter, None)
            return
        if bucket.load is not None:
            self._check_layout(bucket, [(parameter, state)])
        self.state[parameter] = dict(state)
        if bucket.load is not None:
            data = self._look_at(bucket)  # and its other parameters come next: it goes home once
            self._is_viewed_new = True
            self._pack(bucket, data, [parameter])

    def state_dict(self) -> dict[str, Any]:
        """As the inner optimizer's, with all of the state in memory: for state that fits into it."""
        self.settle()
        state_dict = self.inner.state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            if index in state_dict["state"]:
                with self.state_loaded(parameter) as state:
                    loaded = {
                        key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
                    }
                state_dict["state"][index] = loaded
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, also of an optimizer that was not offloaded."""
        self.settle()
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        if not self._is_reserved:
            self.reserve()  # sends home what there is
            return
        for bucket in self._buckets:
            if any(self.state.get(parameter) for parameter in bucket.parameters):
                self._stow(bucket)

    # --- What it costs. ---

    @property
    def stall_s(self) -> float:
        """Seconds that training has waited for state so far."""
        return 0.0 if self._conveyor is None else self._conveyor.stall_s

    def state_bytes(self) -> dict[Tier, int]:
        """Bytes of this rank's state in host memory and on the disk; what is too small to move is not counted."""
        found = {Tier.host: 0, Tier.ssd: 0}
        for bucket in self._buckets:
            if bucket.load is not None:
                found[Tier.host if isinstance(bucket.load.home, Tensor) else Tier.ssd] += bucket.load.num_bytes
        return found

    def close(self) -> None:
        """Gives the memory and the disk space back; the optimizer is not to be used any more."""
        self._viewed = None
        if self._conveyor is not None:
            self._conveyor.abandon()
        if self.folder is not None and self.owns_folder:
            self.folder.close()
            self.folder.engine.close()


def local_numel(parameter: Tensor) -> int:
    return local_tensor(parameter).numel()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of what a param group says beside its parameters: schedulers write to a learning rate that is a tensor."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"
    }


def _shape_of(value: Any) -> Any:
    return on_meta(value) if is_stowed(value) else value
