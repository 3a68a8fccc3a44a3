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

from windlass.offload.buckets import RESIDENT_NUMEL, SlotTable, divide, is_stowed, on_meta
from windlass.offload.config import BUFFER_BYTES, OffloadKind
from windlass.offload.direct_io import Engine
from windlass.offload.malloc import give_back_free_memory
from windlass.offload.state_shapes import state_shapes
from windlass.offload.state_store import Bucket, StateStore
from windlass.offload.tier_file import TierFolder
from windlass.out_of_core import StateAtRest
from windlass.parallel.fragment import Tier, local_tensor

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
        """True if `close` removes the folder; else another does."""
        self._order = order
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state
        self.max_device_bytes, self.max_host_bytes, self.buffer_bytes = max_device_bytes, max_host_bytes, buffer_bytes
        self._num_versions = num_versions
        self._is_reserved = False
        self.before_step: list[Callable[[], None]] = []
        """Called before a step changes anything, but after the updates that the one before has put off."""
        self.is_deferring = False
        """True if `step` only takes the gradients, and `update` updates each bucket."""
        self.give_back_free_memory: Callable[[], None] = give_back_free_memory
        """A plan notes only when it would be called."""
        self._pending: dict[Bucket, dict[Tensor, Tensor]] = {}
        self._pending_settings: list[dict[str, Any]] = []
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
        self._resident = Bucket(resident)
        self._buckets = [Bucket(parameters) for run in (*runs, list(others)) for parameters in divide(run)]
        self._bucket_of = {p: bucket for bucket in (self._resident, *self._buckets) for p in bucket.parameters}
        self.store = StateStore(self.inner, self._buckets)
        self._sequence = list(self._buckets)  # as they were updated last time
        self._updated: list[Bucket] = []  # in this step, so far

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
                bucket.slot_table = SlotTable(state)
            self.store.place(
                self.folder, self.max_device_bytes, self.max_host_bytes, self.buffer_bytes, self._num_versions
            )
            self._is_reserved = True
            for bucket, state in states.items():
                if any(parameter in self.state for parameter, _ in state):
                    self.store.stow(bucket)
            self.give_back_free_memory()
        return sum(bucket.slot_table.num_bytes for bucket in self._buckets)

    def _first_state(self, bucket: Bucket) -> list[tuple[Tensor, dict[str, Any]]]:
        """The state of the bucket, or one like that which it will have."""
        self.give_back_free_memory()  # the trials before have left holes, and the largest needs more than a step
        with self.weights_loaded(bucket.parameters):
            states = state_shapes(self.inner, bucket.parameters)
        # Only the shapes are wanted: as they come, they would add up to all of the state.
        return [
            (parameter, self.state.get(parameter) or {key: _shape_of(value) for key, value in state.items()})
            for parameter, state in zip(bucket.parameters, states, strict=True)
        ]

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
        gradients: dict[Bucket, dict[Tensor, Tensor]] = {}
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
    def _update_pending(self, buckets: Sequence[Bucket]) -> None:
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

    def _bucket_with(self, parameter: Tensor) -> Bucket:
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            raise ValueError(
                f"a parameter of shape {list(parameter.shape)} was frozen when its optimizer was offloaded, and has a "
                "gradient now: space is reserved for those that were not; unfreeze it before"
            )
        return bucket

    def _in_sequence(self, buckets: Mapping[Bucket, Any]) -> list[Bucket]:
        return [bucket for bucket in self._sequence if bucket in buckets]

    def _update(self, bucket: Bucket, gradients: dict[Tensor, Tensor]) -> None:
        """One bucket's step. `gradients` is emptied, so that they are freed before the next comes."""
        self._note(bucket)
        with self.weights_loaded(bucket.parameters, write=True):
            if bucket.load is None:
                self._step_on(gradients)
            else:
                is_first = not any(parameter in self.state for parameter in bucket.parameters)
                data = self.store.bring(bucket)
                self._step_on(gradients)
                self.store.leave(bucket, data)
                if is_first:  # what the optimizer made anew has left holes that the next bucket's may not fit into
                    self.give_back_free_memory()
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

    def _note(self, bucket: Bucket) -> None:
        """Learns the order of updates, to read ahead in it."""
        if bucket in self._updated:  # another step has begun
            missing = [other for other in self._sequence if other not in self._updated]
            self._sequence, self._updated = [*self._updated, *missing], []
        self._updated.append(bucket)

    def look_ahead(self) -> None:
        """Begins to read what will be updated next. Costs little; to be called now and then."""
        if self._updated:
            place = self._sequence.index(self._updated[-1]) + 1
            self.store.look_ahead(self._sequence[place:] + self._sequence[:place])

    @property
    def has_pending(self) -> bool:
        """True if updates are put off."""
        return bool(self._pending)

    # --- State in and out. ---

    @property
    def uses_disk(self) -> bool:
        """True if some of the state or the weights may be on a disk."""
        return self.folder is not None

    def has_weights_elsewhere(self, parameter: Tensor) -> bool:
        """True if the parameter's memory does not hold its weights now."""
        return self.weights is not None and self.weights.is_elsewhere(parameter)

    def weights_loaded(
        self, parameters: Sequence[Tensor], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """While it lasts the parameters' weights are in their memory; with `write`, what they are then is kept."""
        return contextlib.nullcontext() if self.weights is None else self.weights.loaded(parameters, write=write)

    def state_at_rest(self) -> list[StateAtRest]:
        """The state that is elsewhere, of the last step. Valid until the next one.

        Raises:
            OffloadError: an earlier write failed.
        """
        return self.store.at_rest()

    @contextlib.contextmanager
    def state_loaded(self, parameter: Tensor) -> Iterator[dict[str, Any]]:
        """While it lasts the parameter's state is in memory, as returned. Not to be changed."""
        yield self.store.loaded(self._bucket_of.get(parameter), parameter)

    @torch.no_grad()
    def put_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Replaces the parameter's state; an empty one removes it."""
        self.reserve()
        bucket = self._bucket_of[parameter]
        if not state:
            self.state.pop(parameter, None)
            return
        self.store.put(bucket, parameter, state)

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
                self.store.stow(bucket)

    # --- What it costs. ---

    @property
    def stall_s(self) -> float:
        """Seconds that training has waited for state so far."""
        return self.store.stall_s

    def state_bytes(self) -> dict[Tier, int]:
        """Bytes of this rank's state in host memory and on the disk; what is too small to move is not counted."""
        return self.store.num_bytes()

    def close(self) -> None:
        """Gives the memory and the disk space back; the optimizer is not to be used any more."""
        self.store.close()
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
