"""The view of what is not in memory for those who must have it there: a checkpoint, an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch


class Pin(Protocol):
    """A version of a file that stays as it is until the release, or, where it is linked before, for good."""

    @property
    def path(self) -> Path: ...

    def read(self) -> Iterator[memoryview]:
        """The bytes of the file from its first to its last, checked, as soon as they are written. From any thread.

        The next part may replace the one before in memory. What was read is in the file at `path`, but on the disk
        only after an fsync.

        Raises:
            OffloadError: the disk failed, or gave back other bytes than were written.
        """
        ...

    def release(self) -> None:
        """Lets the file be written again. To be called once, from any thread."""
        ...


class PinnableFile(Protocol):
    """A file that is `header_bytes` for whoever pins it, data, and zeros up to `file_bytes`."""

    @property
    def header_bytes(self) -> int: ...

    @property
    def file_bytes(self) -> int: ...

    @property
    def more_bytes(self) -> int:
        """The bytes that the next write takes more of the disk while the present version is kept."""
        ...

    @property
    def folder(self) -> Path: ...

    def pin(self, header: bytes) -> Pin:
        """Keeps the present version, which gets `header` (of `header_bytes`): the next write goes to another file.

        Raises:
            ValueError: the version is kept with another header.
        """
        ...


@dataclass(frozen=True)
class StatePlace:
    """Where one state tensor of a parameter lies."""

    parameter: torch.Tensor
    key: str
    begin: int
    """The place of its first byte; its bytes are this rank's part of it, contiguous."""
    end: int


@dataclass(frozen=True)
class StateAtRest:
    """State tensors whose bytes lie together: in host memory, or in a file. Loading one makes the others cheap."""

    places: Sequence[StatePlace]
    """In order; there may be bytes between them that are nothing."""
    home: torch.Tensor | PinnableFile
    """Host memory (uint8), which only the optimizer's step changes, or the data of a file."""


@runtime_checkable
class OutOfCore(Protocol):
    """An optimizer that keeps state, and perhaps its parameters' weights, outside of memory.

    In its `state` what is elsewhere is a tensor on the meta device, of the right shape, dtype and sharding.
    """

    inner: torch.optim.Optimizer
    """The optimizer that computes the updates."""
    before_step: list[Callable[[], None]]
    """Called before a step changes anything, but after the updates that the one before has put off."""

    @property
    def uses_disk(self) -> bool:
        """True where some of it may be on a disk."""
        ...

    @property
    def has_pending(self) -> bool:
        """True while updates are put off. They are made before the next step, most of them in the next forward pass."""
        ...

    def settle(self) -> None:
        """Makes every update that was put off: weights and state are those of the last step."""
        ...

    def bucket_parameters(self) -> list[list[torch.Tensor]]:
        """Parameters in runs whose weights, and whose state, are best loaded together. Small ones are in none."""
        ...

    def has_weights_elsewhere(self, parameter: torch.Tensor) -> bool:
        """Tells if the parameter's memory does not hold its weights now."""
        ...

    def weights_loaded(
        self, parameters: Sequence[torch.Tensor], *, write: bool = False
    ) -> AbstractContextManager[None]:
        """While it lasts the parameters' weights are in their memory; with `write`, what they are then is kept."""
        ...

    def state_at_rest(self) -> list[StateAtRest]:
        """The state that is elsewhere, of the last step. Valid until the next one."""
        ...

    def state_loaded(self, parameter: torch.Tensor) -> AbstractContextManager[dict[str, Any]]:
        """While it lasts the parameter's state is in memory, as returned. Not to be changed."""
        ...

    def put_state(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Replaces the parameter's state; an empty one removes it."""
        ...
