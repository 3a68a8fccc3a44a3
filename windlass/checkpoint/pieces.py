"""Pieces: the fragments that a rank saves in a checkpoint, in memory or elsewhere, in groups to be read together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from windlass.checkpoint.durable.stage import StageBuffer, stage_chunks
from windlass.checkpoint.durable.store import DurableStore, WrittenChunk
from windlass.checkpoint.optimizer_state import OptimizerState
from windlass.out_of_core import OutOfCore, PinnableFile, StateAtRest
from windlass.parallel.fragment import Fragment, ReplicaShare, fragment_of, local_tensor


@dataclass(frozen=True)
class Piece:
    """A fragment that this rank saves, and the local tensor that holds it when it is in memory."""

    fragment: Fragment
    tensor: torch.Tensor
    owner: nn.Parameter | torch.Tensor | None
    """The parameter that it is, or whose state it is: only the optimizer's step changes it. None: anything may."""


@dataclass(frozen=True)
class InFile:
    """A file whose data are the pieces of a group, and what means nothing between them."""

    file: PinnableFile
    begins: list[int]
    """The begin of each piece in the data."""


@dataclass(frozen=True)
class PieceGroup:
    """Pieces that are read together."""

    pieces: list[Piece]
    load: Callable[[], AbstractContextManager[Sequence[torch.Tensor]]] | None = None
    """Holds the pieces' tensors in memory while it lasts; None: they are there."""
    in_file: InFile | None = None
    """The file that has just these; None where there is none."""

    def loaded(self) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """The local tensors of the pieces, which hold them while it lasts."""
        tensors = [piece.tensor for piece in self.pieces]
        return contextlib.nullcontext(tensors) if self.load is None else self.load()


def put_groups(store: DurableStore, groups: Iterable[PieceGroup]) -> list[WrittenChunk]:
    """Writes groups of pieces, a chunk at a time."""
    memory = StageBuffer()
    written = []
    for group in groups:
        with group.loaded() as tensors:
            held = zip((piece.fragment for piece in group.pieces), tensors, strict=True)
            written += [store.put_chunk(chunk, data) for chunk, data in stage_chunks(held, memory)]
    return written


class WeightGroups:
    """Collects weights that are elsewhere, in the runs in which their optimizers bring them."""

    def __init__(self, optimizers: Sequence[OutOfCore]) -> None:
        self._optimizers = optimizers
        self._pieces: dict[torch.Tensor, list[Piece]] = {}

    def takes(self, piece: Piece) -> bool:
        """True, and takes it, if its weights are elsewhere."""
        if piece.owner is None or not any(other.has_weights_elsewhere(piece.owner) for other in self._optimizers):
            return False
        self._pieces.setdefault(piece.owner, []).append(piece)
        return True

    def groups(self, write: bool = False) -> Iterator[PieceGroup]:
        """Yields what was taken; with `write`, what the tensors hold at the end of `loaded` is kept."""
        for optimizer in self._optimizers:
            mine = [parameter for parameter in self._pieces if optimizer.has_weights_elsewhere(parameter)]
            runs = [[p for p in run if p in self._pieces] for run in optimizer.bucket_parameters()]
            in_runs = {parameter for run in runs for parameter in run}
            for run in [*runs, *([parameter] for parameter in mine if parameter not in in_runs)]:
                pieces = [piece for parameter in run for piece in self._pieces.pop(parameter)]
                if pieces:
                    yield PieceGroup(pieces, functools.partial(_weights, optimizer, run, pieces, write))


@contextlib.contextmanager
def _weights(
    optimizer: OutOfCore, run: Sequence[torch.Tensor], pieces: Sequence[Piece], write: bool
) -> Iterator[list[torch.Tensor]]:
    with optimizer.weights_loaded(run, write=write):
        yield [piece.tensor for piece in pieces]


@dataclass
class _Found:
    """Pieces of what lies together, and where they begin there."""

    pieces: list[Piece] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)


def state_groups(state: OptimizerState, share: ReplicaShare) -> tuple[list[Piece], list[PieceGroup]]:
    """Returns what this rank saves of an optimizer's state: pieces in memory, and groups of those that are not."""
    optimizer = state.out_of_core
    at_rest = [] if optimizer is None else optimizer.state_at_rest()
    homes = {(place.parameter, place.key): (rest, place) for rest in at_rest for place in rest.places}
    entries = list(state.tensors())
    tensors = [tensor for _, parameter, key, tensor in entries if (parameter, key) in homes]
    speaks_for = _shares(share, at_rest, [*tensors, *state.parameters])
    in_memory: list[Piece] = []
    found = {id(rest): _Found() for rest in at_rest}
    for name, parameter, key, tensor in entries:
        rest, place = homes.get((parameter, key), (None, None))
        if rest is None or place is None:
            if share.includes(tensor):
                in_memory.append(Piece(fragment_of(name, tensor), local_tensor(tensor), parameter))
            continue
        if not (share.includes(tensor) if speaks_for is None else speaks_for[id(rest)]):
            continue
        local = local_tensor(tensor)
        if isinstance(rest.home, torch.Tensor):
            held = rest.home[place.begin : place.end].view(local.dtype).view(local.shape)
            in_memory.append(Piece(fragment_of(name, tensor), held, parameter))
        else:
            group = found[id(rest)]
            group.pieces.append(Piece(fragment_of(name, tensor), local, parameter))
            group.keys.append(key)
            group.begins.append(place.begin)
    groups = []
    for rest in at_rest:
        group = found[id(rest)]
        if group.pieces and optimizer is not None and not isinstance(rest.home, torch.Tensor):
            is_whole = len(group.pieces) == len(rest.places)
            in_file = InFile(rest.home, group.begins) if is_whole else None
            groups.append(PieceGroup(group.pieces, _loader(optimizer, group), in_file))
    return in_memory, groups


def _shares(
    share: ReplicaShare, at_rest: Sequence[StateAtRest], tensors: Sequence[torch.Tensor]
) -> dict[int, bool] | None:
    """Decides for what lies together, by `id`, if this rank saves it; None where that is decided a tensor at a time.

    Ranks that hold the same parts of all `tensors`, parameters and their state, have the same in each file. Where some
    parts are held by some ranks, and others by others, that is not so.
    """
    if len({share.replicas(tensor) for tensor in tensors}) != 1:
        return None
    return {id(rest): share.includes(tensors[0], sum(p.end - p.begin for p in rest.places)) for rest in at_rest}


def _loader(optimizer: OutOfCore, group: _Found) -> Callable[[], AbstractContextManager[Sequence[torch.Tensor]]]:
    @contextlib.contextmanager
    def load() -> Iterator[list[torch.Tensor]]:
        with contextlib.ExitStack() as stack:
            tensors = []
            for piece, key in zip(group.pieces, group.keys, strict=True):
                assert piece.owner is not None
                tensors.append(local_tensor(stack.enter_context(optimizer.state_loaded(piece.owner))[key]))
            yield tensors

    return load
