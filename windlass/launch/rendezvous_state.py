"""The state of torch's rendezvous on the job's store, as JSON.

torch hands a state over pickled, and takes it back so. What lies on the store has come from another machine, so it is
JSON there, and checked field by field: this process unpickles only what it has pickled itself.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from datetime import datetime

from torch.distributed import DistError, Store
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    Token,
    _NodeDesc,
    _RendezvousState,
)

from windlass.untrusted import Malformed, convert, parse_json

KEY = "rendezvous"


@dataclass(frozen=True)
class Node:
    """A launcher: its address, its process, and its number there."""

    addr: str
    pid: int
    local_id: int


@dataclass(frozen=True)
class Member:
    node: Node
    rank: int


@dataclass(frozen=True)
class Heartbeat:
    node: Node
    time: str
    """ISO 8601."""


@dataclass(frozen=True)
class State:
    """The fields of torch's."""

    round: int
    complete: bool
    deadline: str | None
    closed: bool
    participants: tuple[Member, ...]
    wait_list: tuple[Node, ...]
    redundancy_list: tuple[Node, ...]
    last_heartbeats: tuple[Heartbeat, ...]


def to_text(state: _RendezvousState) -> str:
    """Equal states have equal texts."""
    plain = State(
        state.round,
        state.complete,
        None if state.deadline is None else state.deadline.isoformat(),
        state.closed,
        tuple(Member(_node(node), rank) for node, rank in sorted(state.participants.items())),
        tuple(_node(node) for node in sorted(state.wait_list)),
        tuple(_node(node) for node in sorted(state.redundancy_list)),
        tuple(Heartbeat(_node(node), at.isoformat()) for node, at in sorted(state.last_heartbeats.items())),
    )
    return json.dumps(asdict(plain), separators=(",", ":"))


def from_text(text: bytes) -> _RendezvousState:
    """Raises RendezvousStateError."""
    try:
        plain = convert(parse_json(text), State)
        state = _RendezvousState()
        state.round, state.complete, state.closed = plain.round, plain.complete, plain.closed
        state.deadline = None if plain.deadline is None else _time(plain.deadline)
        state.participants = {_NodeDesc(*astuple(member.node)): member.rank for member in plain.participants}
        state.wait_list = {_NodeDesc(*astuple(node)) for node in plain.wait_list}
        state.redundancy_list = {_NodeDesc(*astuple(node)) for node in plain.redundancy_list}
        state.last_heartbeats = {_NodeDesc(*astuple(beat.node)): _time(beat.time) for beat in plain.last_heartbeats}
        return state
    except (Malformed, ValueError) as error:
        raise RendezvousStateError(f"what another node has written is no state of a rendezvous: {error}") from error


def _node(node: _NodeDesc) -> Node:
    return Node(node.addr, node.pid, node.local_id)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return time


class JsonBackend(RendezvousBackend):
    """Args:
    store: of this job alone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def name(self) -> str:
        return "windlass"

    def get_state(self) -> tuple[bytes, Token] | None:
        with _torchs_errors():
            text = self._store.get(KEY) if self._store.check([KEY]) else None
        return None if text is None else (pickle.dumps(from_text(text)), text)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool]:
        """Writes `state` unless another node was faster since `token` was read. Returns what is there then."""
        mine = to_text(pickle.loads(state)).encode()  # noqa: S301  torch has pickled it, in this process
        expected = token if isinstance(token, bytes) else b""
        with _torchs_errors():
            text = self._store.compare_set(KEY, expected.decode(), mine.decode())
        is_mine = text == mine
        return state if is_mine else pickle.dumps(from_text(text)), text, is_mine


@contextmanager
def _torchs_errors() -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise RendezvousConnectionError(str(error)) from error
