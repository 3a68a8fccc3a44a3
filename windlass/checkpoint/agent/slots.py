"""The files of a snapshot slot, in a folder of shared memory: they outlive trainers, and the agent that made them.

    0.data      the node's data: a region a local rank
    0.parity    the parity that this node keeps of other nodes' data
    0.table     a CRC32C a block: of the data, then of the parity
    0.head      what the slot holds and how far it is (`Header`): replaced as a whole, after what it speaks of

A slot whose head or table is not as it was written holds nothing. A block with another checksum is an erasure.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from windlass.checkpoint.agent.header import Header
from windlass.checkpoint.agent.ledger import WHOLE
from windlass.checkpoint.agent.stripes import BLOCK_BYTES, Stripes
from windlass.checkpoint.image import PAGE_BYTES
from windlass.checksum import crc32c
from windlass.os_errors import MISSING

OWNER_ONLY = 0o600


class SharedFile:
    """A file of shared memory, mapped whole, and made or grown so that it cannot fail to be written later.

    Raises:
        OSError: ENOSPC where the memory is not there. A map of a file without its memory would end a writer by SIGBUS.
    """

    def __init__(self, path: Path, size: int, may_make: bool = True) -> None:
        self.path, self.size = path, size
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if may_make else 0)
        descriptor = os.open(path, flags, OWNER_ONLY)
        try:
            if may_make:
                if os.fstat(descriptor).st_size > size:
                    os.ftruncate(descriptor, size)
                if size:
                    os.posix_fallocate(descriptor, 0, size)
            elif os.fstat(descriptor).st_size < size:
                raise ValueError(f"{path.name} is shorter than its slot")
            self.inode = os.fstat(descriptor).st_ino
            # Unmapped with the last view of it: an encoder may still be at work on a slot that is given up.
            self.view = memoryview(_mapped(descriptor, size) if size else b"")
        finally:
            os.close(descriptor)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """The whole file, its pages in place: else the first copy into each of them stops for it."""
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


@dataclass(frozen=True)
class SlotMemory:
    """The memory of a slot as it is now, for who works on it beside the threads that begin and empty slots.

    It stays mapped while it is used, and then says nothing any more: the slot may hold another snapshot, which has a
    table of its own.
    """

    header: Header
    data: memoryview
    parity: memoryview | None
    table: np.ndarray

    def blocks(self, first: int, count: int = 1) -> memoryview:
        """Blocks of the data, or, counted on, of the parity; not of both."""
        view, num_data = self.data, len(self.data) // BLOCK_BYTES
        if first >= num_data:
            assert self.parity is not None
            view, first = self.parity, first - num_data
        return view[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES]

    def damaged_blocks(self) -> Iterator[int]:
        """The numbers of the blocks that are not as they were written."""
        for number, expected in enumerate(self.table.tolist()):
            if crc32c(self.blocks(number)) != expected:
                yield number


@dataclass
class SlotFiles:
    """One slot of a folder."""

    folder: Path
    index: int
    header: Header | None = None
    data: SharedFile | None = None
    parity: SharedFile | None = None
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def num_bytes(self) -> int:
        """The memory that the slot has taken."""
        return sum(file.size for file in (self.data, self.parity) if file)

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.index}.{suffix}"

    def begin(self, header: Header) -> None:
        """Makes room for what `header` describes and says that it is being written.

        Raises:
            OSError: there is not enough memory; the slot is empty then.
        """
        self.path("head").unlink(missing_ok=True)
        self.header = None
        stripes = header.stripes
        self.reserve(stripes)
        self.table = np.zeros((stripes.data_bytes + stripes.parity_bytes) // BLOCK_BYTES, np.uint32)
        self.write_header(header)

    def reserve(self, stripes: Stripes) -> None:
        """Takes the memory that a snapshot will need. Raises OSError if it is not there; the slot is empty then."""
        try:
            self.data = self._sized(self.data, "data", stripes.data_bytes)
            self.parity = self._sized(self.parity, "parity", stripes.parity_bytes)
        except OSError:
            self.empty()
            raise

    def _sized(self, file: SharedFile | None, suffix: str, size: int) -> SharedFile:
        if file is not None and file.size == size:
            return file
        return SharedFile(self.path(suffix), size)

    def seal(self, header: Header) -> Header:
        """Writes the checksums of the blocks, and then `header` with the sum of them, which it returns."""
        write_shared(self.path("table"), self.table.tobytes())
        self.write_header(replace(header, table_crc=crc32c(self.table)))
        assert self.header is not None
        return self.header

    def write_header(self, header: Header) -> None:
        write_shared(self.path("head"), header.to_bytes())
        self.header = header

    def empty(self) -> None:
        """Forgets what the slot holds, and gives its memory back."""
        self.path("head").unlink(missing_ok=True)
        for suffix in ("data", "parity", "table"):
            # A new file next time: a writer of an older generation may have this one mapped, and go on writing into it.
            self.path(suffix).unlink(missing_ok=True)
        self.header = self.data = self.parity = None

    def adopt(self) -> None:
        """Opens what an earlier agent left; what is not as it was written is emptied.

        Raises:
            OSError: the system does not give it, which says nothing of what is in it.
        """
        try:
            self.open()
        except (ValueError, *MISSING):
            self.empty()

    def open(self, with_parity: bool = True) -> None:
        """Opens a slot that is prepared or committed, or being written.

        Raises:
            OSError: a file is missing, or the system does not give it.
            ValueError: the header or the table is not as it was written, or a file is too short.
        """
        header = Header.from_bytes(self.path("head").read_bytes())
        stripes = header.stripes
        self.data = SharedFile(self.path("data"), stripes.data_bytes, may_make=False)
        if with_parity:
            self.parity = SharedFile(self.path("parity"), stripes.parity_bytes, may_make=False)
        if header.phase in WHOLE:
            table = np.frombuffer(self.path("table").read_bytes(), np.uint32)
            if table.size * BLOCK_BYTES != stripes.data_bytes + stripes.parity_bytes:
                raise ValueError("the table has another length")
            if crc32c(table) != header.table_crc:
                raise ValueError("the table's bytes have changed")
            self.table = table.copy()
        self.header = header

    @property
    def memory(self) -> SlotMemory:
        """The memory of a slot that is begun or open."""
        assert self.header is not None and self.data is not None
        return SlotMemory(self.header, self.data.view, None if self.parity is None else self.parity.view, self.table)


def write_shared(path: Path, data: bytes) -> None:
    """Renamed into place: a killed process leaves the old file or the new one. Shared memory needs no sync.

    Where the memory is full what fits into the page of the old file is written there: one write of a page is not cut
    off by a kill.

    Raises:
        OSError: there is no room for it.
    """
    temporary = path.with_name(f"{path.name}.new")
    try:
        _write(temporary, data, os.O_CREAT | os.O_TRUNC)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC or len(data) > PAGE_BYTES or not path.exists() or path.stat().st_size == 0:
            raise
        _write(path, data, 0)


def _write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, OWNER_ONLY)
    try:
        num_written = os.write(descriptor, data)
        if num_written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
