"""Stands in for a tensor that may move: autograd keeps it, and the tensor is made of it again."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef

from windlass.offload.arena import Buffer
from windlass.offload.direct_io import Transfer
from windlass.offload.tier_file import TierFile

_VIEWS = ("TBackward0", "ViewBackward0", "AliasBackward0", "TransposeBackward0")
_CAST = "ToCopyBackward0"


class SavedStorage:
    """A storage that autograd saved, and where its bytes are: in one or several places, which hold the same.

    Args:
        index: rises with each storage.
        tensor: of the storage, detached.
        address: of the storage.
    """

    def __init__(self, index: int, tensor: Tensor, address: int) -> None:
        self.index, self.address = index, address
        self.num_bytes = tensor.untyped_storage().nbytes()
        self.tensor: Tensor | None = tensor
        """Any tensor of the storage, or of a copy that was brought back."""
        self.buffer: Buffer | None = None
        self.file: TierFile | None = None
        self.copying: torch.cuda.Event | None = None
        """The end of the last copy to or from the buffer."""
        self.arriving: torch.cuda.Event | None = None
        """The end of the copy to the device that made `tensor`."""
        self.moving: Transfer | None = None
        """The last writing or reading of the file."""
        self.is_reading = False
        """True if `moving` fills the buffer."""
        self._version = tensor._version

    @property
    def is_elsewhere(self) -> bool:
        """True if the bytes are in the arena or on the disk."""
        return self.buffer is not None or self.file is not None

    @property
    def is_settled(self) -> bool:
        """True if nothing is under way."""
        return (self.moving is None or self.moving.is_done) and (self.copying is None or self.copying.query())

    def settle(self) -> None:
        """Returns when nothing is under way, whether it went well or not."""
        if self.moving is not None:
            self.moving.settle()
        if self.copying is not None:
            self.copying.synchronize()

    def set_copy(self, tensor: Tensor, arriving: torch.cuda.Event | None) -> None:
        self.tensor, self.arriving, self._version = tensor, arriving, tensor._version
        self.copying = arriving

    def check_unchanged(self, tensor: Tensor) -> None:
        """Raises RuntimeError where somebody has written to `self.tensor`, as autograd would."""
        _check_version(tensor, self._version)


class Saved:
    """The handle that all views of a storage share: when autograd lets go of the last view, the storage ends."""

    def __init__(self, storage: SavedStorage, dead: deque[SavedStorage]) -> None:
        self.storage, self._dead = storage, dead

    def __del__(self) -> None:
        # In whichever thread; the rest is for its owner to do.
        self.storage.tensor = None
        self._dead.append(self.storage)


@dataclass(frozen=True)
class ViewSpec:
    """The view of a tensor on its storage."""

    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> ViewSpec:
        return ViewSpec(tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())


@dataclass(frozen=True)
class View:
    """A tensor of a storage that may move."""

    saved: Saved
    spec: ViewSpec

    def of(self, base: Tensor) -> Tensor:
        """The tensor, of the storage of `base`."""
        spec = self.spec
        empty = torch.empty(0, dtype=spec.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), spec.offset, spec.size, spec.stride)


@dataclass(frozen=True)
class Cast:
    """A parameter in another dtype: made again when it is needed, and not kept."""

    parameter: Tensor
    version: int
    spec: ViewSpec

    def make(self) -> Tensor:
        _check_version(self.parameter, self.version)
        spec = self.spec
        return self.parameter.detach().to(spec.dtype).as_strided(spec.size, spec.stride, spec.offset)


Pack: TypeAlias = Tensor | View | Cast


class Packer:
    """Decides what may move, and finds what is saved already.

    Args:
        device: tensors of others stay.
        min_bytes: smaller storages stay.
    """

    def __init__(self, device: torch.device, min_bytes: int) -> None:
        self._device, self._min_bytes = device, min_bytes
        self.num_storages = 0
        """So far; the next storage's index."""
        self.dead: deque[SavedStorage] = deque()
        """Storages that nobody needs any more. Finalizers append to it, in any thread."""
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[Saved]]] = {}
        """By the address of a storage, which no other storage gets while there is a weak reference."""

    def pack(self, tensor: Tensor) -> tuple[Pack, SavedStorage | None]:
        """Returns what autograd keeps in place of `tensor`, and the storage that is new by it."""
        if not self._is_worth(tensor):
            return tensor.detach(), None  # what still had its history would keep itself alive
        parameter = _parameter_of_cast(tensor)
        if parameter is not None:
            return Cast(parameter, parameter._version, ViewSpec.of(tensor)), None
        reference = StorageWeakRef(tensor.untyped_storage())
        known = self._known.get(reference.cdata)
        if known is not None and known[1] == tensor._version and (saved := known[2]()) is not None:
            return View(saved, ViewSpec.of(tensor)), None
        storage = SavedStorage(self.num_storages, tensor.detach(), reference.cdata)
        saved = Saved(storage, self.dead)
        self._known[reference.cdata] = (reference, tensor._version, weakref.ref(saved))
        self.num_storages += 1
        return View(saved, ViewSpec.of(tensor)), storage

    def forget(self, storage: SavedStorage) -> None:
        """Forgets a storage of `dead`; to be called with each."""
        known = self._known.get(storage.address)
        if known is not None and known[2]() is None:
            del self._known[storage.address]

    def _is_worth(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and not isinstance(tensor._base, nn.Parameter)
            and tensor.device == self._device
            and tensor.layout == torch.strided
            and not (tensor.is_conj() or tensor.is_neg())
            and tensor.untyped_storage().nbytes() >= self._min_bytes
        )


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, uint8, without a copy."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _parameter_of_cast(tensor: Tensor) -> Tensor | None:
    """The parameter that `tensor` is a copy of in another dtype, with the same strides; None for any other tensor."""
    cast = _skip_views(tensor.grad_fn)
    if cast is None or cast.name() != _CAST:
        return None
    leaf = _skip_views(cast.next_functions[0][0])
    parameter = getattr(leaf, "variable", None)  # which only the node of a leaf has
    if not isinstance(parameter, nn.Parameter) or type(parameter.data) is not Tensor:
        return None
    is_whole = tensor.untyped_storage().nbytes() == parameter.numel() * tensor.element_size()
    return parameter if is_whole and parameter.is_contiguous() else None


def _skip_views(node: Node | None) -> Node | None:
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that is needed for the gradient has been written to since it was "
            "saved; write to a copy instead"
        )
