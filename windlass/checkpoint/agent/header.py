"""The header that stands beside a slot's bytes: what the slot holds, and how far it is. No I/O."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from typing import Any

from windlass.checkpoint.agent.ledger import Phase, SnapshotId
from windlass.checkpoint.agent.stripes import Stripes
from windlass.checksum import crc32c
from windlass.untrusted import Malformed, convert, parse_json

MAX_NODES = 1 << 16
MAX_NODE_BYTES = 1 << 50


@dataclass(frozen=True)
class Region:
    """The place of a rank's part in its node's data."""

    position: int
    """The node's."""
    rank: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Describes a slot."""

    snapshot: SnapshotId
    step: int
    phase: Phase
    position: int
    num_nodes: int
    num_parity_shards: int
    node_bytes: int
    world_size: int
    layout: str
    """Says how the job was cut: what differs in it is never mixed."""
    regions: tuple[Region, ...] = ()
    """Those of all nodes: who restores a lost node's data must know what is in it."""
    persist: bool = False
    """The snapshot is to be written to the durable tier."""
    num_resumes: int = 0
    """How often trainers began to go on from it."""
    table_crc: int = 0

    @property
    def own_regions(self) -> list[Region]:
        return [region for region in self.regions if region.position == self.position]

    @property
    def stripes(self) -> Stripes:
        return Stripes(self.num_nodes, self.num_parity_shards, self.node_bytes)

    def to_bytes(self) -> bytes:
        body = json.dumps(asdict(self), sort_keys=True).encode()
        return b"%08x\n" % crc32c(body) + body

    @staticmethod
    def from_bytes(data: bytes) -> Header:
        """Raises ValueError unless the bytes are as `to_bytes` gave them."""
        body = data[9:]
        if data[:9] != b"%08x\n" % crc32c(body):
            raise ValueError("the header's bytes have changed")
        return Header.from_json(parse_json(body))

    @staticmethod
    def from_json(document: Any) -> Header:
        """Raises Malformed unless it describes a slot. Keys that a header has not are passed over."""
        known = {field.name for field in dataclasses.fields(Header)}
        given = {key: value for key, value in document.items() if key in known} if isinstance(document, dict) else {}
        header = convert(given, Header)
        counts = (*header.snapshot, header.step, header.position, header.num_resumes, header.table_crc)
        if min(counts) < 0 or not 0 <= header.num_parity_shards < header.num_nodes <= MAX_NODES:
            raise Malformed("it has impossible numbers")
        if not (0 <= header.node_bytes <= MAX_NODE_BYTES and header.position < header.num_nodes):
            raise Malformed("it has impossible numbers")
        for region in header.regions:
            if min(region.offset, region.nbytes) < 0 or region.offset + region.nbytes > header.node_bytes:
                raise Malformed("it has a region outside of its data")
        return header
