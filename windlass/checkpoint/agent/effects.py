"""Effects: the core of an agent asks its shell to do them, one after the other in the order of their list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import Report, SnapshotId
from windlass.checkpoint.agent.stripes import Stripes

Json = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The agents that protect each other, in one generation."""

    generation: int
    position: int
    addresses: tuple[tuple[str, int], ...]
    secret: bytes
    num_parity_shards: int
    writer: int
    """The position that writes manifests: that of rank 0's node."""

    @property
    def others(self) -> list[int]:
        return [position for position in range(len(self.addresses)) if position != self.position]


# --- Written down, in the folder of the agent. ---


@dataclass(frozen=True, slots=True)
class SaveAborted:
    """Write down what was given up. The agent goes on if it cannot."""

    snapshot: SnapshotId
    why: str


@dataclass(frozen=True, slots=True)
class SaveGeneration:
    generation: int


@dataclass(frozen=True, slots=True)
class ReserveSlot:
    """Take the memory that a snapshot will need."""

    index: int
    stripes: Stripes


@dataclass(frozen=True, slots=True)
class BeginSlot:
    """Make room for what `header` describes, then write it. If that fails the slot is empty."""

    index: int
    header: Header


@dataclass(frozen=True, slots=True)
class SealSlot:
    """Write the slot's checksums, then `header` with the sum of them; answer with `AgentCore.sealed`."""

    index: int
    header: Header


@dataclass(frozen=True, slots=True)
class WriteHeader:
    """Replace a slot's header. If that fails, answer with `AgentCore.header_not_written`, and go on."""

    index: int
    header: Header


@dataclass(frozen=True, slots=True)
class EmptySlot:
    """Delete what a slot holds."""

    index: int


# --- Said to peers. ---


@dataclass(frozen=True, slots=True)
class Connect:
    """Talk to the peers of `group`, and to no others."""

    group: Group


@dataclass(frozen=True, slots=True)
class SendReport:
    """Tell all peers, now and whenever a connection is made again, until the next report."""

    report: Report


@dataclass(frozen=True, slots=True)
class Send:
    """Tell one peer, unless the same is waiting to be sent already."""

    position: int
    message: Json


@dataclass(frozen=True, slots=True)
class SendData:
    """Send this node's data to a peer that keeps parity of it."""

    snapshot: SnapshotId
    position: int
    targets: tuple[tuple[int, int], ...]
    """(chunk, parity row)."""


# --- Written to the durable tier: takes long, one at a time. ---


@dataclass(frozen=True, slots=True)
class WritePart:
    """Put the chunks of this node's ranks; answer with `AgentCore.part_written`."""

    snapshot: SnapshotId
    step: int
    group: Group


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Make a checkpoint of all nodes' parts; answer with `AgentCore.checkpoint_written`."""

    step: int
    group: Group
    parts: tuple[Json, ...]


# --- The rest. ---


@dataclass(frozen=True, slots=True)
class Announce:
    """Keep an event for trainers to collect."""

    kind: str
    fields: Json


@dataclass(frozen=True, slots=True)
class End:
    """Leave, and leave nothing behind unless another agent takes the folder over."""

    keeps_folder: bool = False
    after_sends: bool = False
    """Peers wait to hear how the last write went: give what is to be sent a moment."""


Effect = (
    SaveAborted
    | SaveGeneration
    | ReserveSlot
    | BeginSlot
    | SealSlot
    | WriteHeader
    | EmptySlot
    | Connect
    | SendReport
    | Send
    | SendData
    | WritePart
    | WriteCheckpoint
    | Announce
    | End
)
