"""What autograd is given to keep in place of a tensor that may move, and how the tensor is made of it again."""

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


class Block:
    """A storage that was saved, and where its bytes are: in one or several places, which hold the same.

    Args:
        index: rises with each block.
        tensor: of the storage, detached.
        storage: its address.
    """

    def __init__(self, index: int, tensor: Tensor, storage: int) -> None:
        self.index, self.storage = index, storage
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
        """Whether `moving` fills the buffer."""
        self._version = tensor._version

    @property
    def is_elsewhere(self) -> bool:
        """Whether the bytes are in the arena or on the disk."""
        return self.buffer is not None or self.file is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way."""
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
    """What views of a block share. Autograd's letting go of the last of them is the end of the block."""

    def __init__(self, block: Block, dead: deque[Block]) -> None:
        self.block, self._dead = block, dead

    def __del__(self) -> None:
        # In whichever thread; the rest is for its owner to do.
        self.block.tensor = None
        self._dead.append(self.block)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        return Layout(tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())


@dataclass(frozen=True)
class View:
    """A tensor of a block that may move."""

    saved: Saved
    layout: Layout

    def of(self, base: Tensor) -> Tensor:
        """The tensor, of the storage of `base`."""
        layout = self.layout
        empty = torch.empty(0, dtype=layout.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), layout.offset, layout.size, layout.stride)


@dataclass(frozen=True)
class Cast:
    """A parameter in another dtype: made again when it is needed, and not kept."""

    parameter: Tensor
    version: int
    layout: Layout

    def make(self) -> Tensor:
        _check_version(self.parameter, self.version)
        layout = self.layout
        return self.parameter.detach().to(layout.dtype).as_strided(layout.size, layout.stride, layout.offset)


Pack: TypeAlias = Tensor | View | Cast


class Packer:
    """Decides what may move, and finds what is saved already.

    Args:
        device: tensors of others stay.
        min_bytes: smaller storages stay.
    """

    def __init__(self, device: torch.device, min_bytes: int) -> None:
        self._device, self._min_bytes = device, min_bytes
        self.num_blocks = 0
        """So far; the next block's index."""
        self.dead: deque[Block] = deque()
        """Blocks that nobody needs any more. Finalizers append to it, in any thread."""
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[Saved]]] = {}
        """By the address of a storage, which no other storage gets while there is a weak reference."""

    def pack(self, tensor: Tensor) -> tuple[Pack, Block | None]:
        """What to keep in place of `tensor`, and the block that is new by it."""
        if not self._is_worth(tensor):
            return tensor.detach(), None  # what still had its history would keep itself alive
        parameter = _parameter_of_cast(tensor)
        if parameter is not None:
            return Cast(parameter, parameter._version, Layout.of(tensor)), None
        reference = StorageWeakRef(tensor.untyped_storage())
        known = self._known.get(reference.cdata)
        if known is not None and known[1] == tensor._version and (saved := known[2]()) is not None:
            return View(saved, Layout.of(tensor)), None
        block = Block(self.num_blocks, tensor.detach(), reference.cdata)
        saved = Saved(block, self.dead)
        self._known[reference.cdata] = (reference, tensor._version, weakref.ref(saved))
        self.num_blocks += 1
        return View(saved, Layout.of(tensor)), block

    def forget(self, block: Block) -> None:
        """To be called with each block of `dead`."""
        known = self._known.get(block.storage)
        if known is not None and known[2]() is None:
            del self._known[block.storage]

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
