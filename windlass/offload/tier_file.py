"""State on a disk: files of exact size in a folder of this process, checked by checksums, whose versions can be kept.

A checkpoint pins a version and links or reads its file, while the next step writes to another: nothing is copied. The
files die with the process: what they hold is worth nothing without the rest of its state, and checkpoints hold both.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from windlass import isal
from windlass.checksum import crc32c
from windlass.errors import DoesNotFit, OffloadError
from windlass.offload.direct_io import (
    PAGE_BYTES,
    DirectFile,
    Engine,
    Transfer,
    disk_error,
    round_to_pages,
    why_not_direct,
)
from windlass.offload.process_scratch import ProcessScratch, remove_leftovers

BLOCK_BYTES = 4 << 20
"""The unit of transfers by a thread, and of checksums."""
HEADER_BYTES = 64 << 10
"""The room before the data of a file, for the header of a checkpoint that pins it."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)

logger = logging.getLogger(__name__)


def file_bytes(num_bytes: int) -> int:
    """The room on the disk of a file of `num_bytes`."""
    return HEADER_BYTES + round_to_pages(num_bytes)


class TierFolder:
    """A folder of this process's own, below one that other processes and runs may use too.

    Args:
        folder: below which it is made; what dead processes have left there is removed first.
        engine: carries out the transfers.
        name: what its name begins with, for people who look.

    Raises:
        OffloadError: it cannot be made, or files in it cannot be written or locked.
    """

    def __init__(self, folder: Path, engine: Engine, name: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            self._scratch = ProcessScratch(folder, name)
        except OSError as error:
            fix = "set offload.dir to a folder on a local disk" if error.errno in _NO_FOLDER else None
            raise disk_error(folder, "cannot be used", error, fix) from error
        self.path, self.engine = self._scratch.path, engine
        self._files: list[TierFile] = []
        self._numbers = itertools.count()
        self.reason_not_direct = why_not_direct(self.path)
        if self.reason_not_direct is not None:
            logger.warning(
                "offload.dir=%s is read and written through the page cache: %s", folder, self.reason_not_direct
            )

    def reserve(self, num_bytes: int) -> None:
        """Checks that there is room for files of `num_bytes` together. It takes no room: `create` does.

        Raises:
            DoesNotFit: there is not.
        """
        if num_bytes > self._free_bytes():
            raise self._does_not_fit(num_bytes)

    def create(self, num_bytes: int) -> TierFile:
        """A file for `num_bytes` of data, whose space is taken now.

        Raises:
            DoesNotFit: the disk is full.
            OffloadError: the file cannot be made for another reason.
        """
        file = TierFile(self, num_bytes)
        self._files.append(file)
        return file

    def close(self) -> None:
        """Removes the files and the folder, when what is under way has ended."""
        if self._scratch.is_held:
            for file in self._files:
                file._close()
            self._scratch.remove()

    def _make_file(self, num_bytes: int) -> DirectFile:
        length = file_bytes(num_bytes)
        path = self.path / f"{next(self._numbers)}.tier"
        try:
            return DirectFile(path, length, self.reason_not_direct is None, self.engine.figures)
        except OSError as error:
            if error.errno in _FULL:
                raise self._does_not_fit(length) from error
            raise disk_error(path, f"a file of {length:,} bytes cannot be made", error) from error

    def _free_bytes(self) -> int:
        try:
            status = os.statvfs(self.path)
        except OSError as error:
            raise disk_error(self.path, "cannot be used", error) from error
        return status.f_bavail * status.f_frsize

    def _does_not_fit(self, num_bytes: int) -> DoesNotFit:
        rule = f"needs {num_bytes:,} bytes more there, and {self._free_bytes():,} are free"
        return DoesNotFit("offload.dir", self.path, rule, "free space there, or set offload.dir to a disk with more")


@dataclass(eq=False)
class _Version:
    """A file, and what was written to it."""

    file: DirectFile
    checksums: list[int]
    header: bytes = b""
    is_header_written: bool = True
    num_pins: int = 0
    _header_writing: threading.Lock = field(default_factory=threading.Lock)

    def write_block(self, data: memoryview, index: int) -> None:
        self.checksums[index] = crc32c(data)
        self.file.write_from(data, HEADER_BYTES + index * BLOCK_BYTES)

    def read_block(self, into: memoryview, index: int) -> None:
        begin = index * BLOCK_BYTES
        self.file.read_into(into, HEADER_BYTES + begin)
        if crc32c(into) != self.checksums[index]:
            raise OffloadError(
                "offload.dir",
                self.file.path,
                f"bytes {begin} to {begin + into.nbytes} of the data are not those that were written",
                "see what the system says about the disk (`dmesg`), and resume from the last checkpoint",
            )

    def write_header(self) -> None:
        with self._header_writing:
            if not self.is_header_written:
                pages = mmap.mmap(-1, len(self.header))
                pages[:] = self.header
                self.file.write_from(memoryview(pages), HEADER_BYTES - len(self.header))
                self.is_header_written = True


@dataclass(frozen=True)
class Pin:
    """A version that stays as it is: from `offset` on the file at `path` is the header, the data of `num_bytes`, zeros.

    A link to the file that is made before the release keeps the version for good. What was written is in the file after
    `read`, and on the disk only after an fsync of the file.
    """

    path: Path
    offset: int
    num_bytes: int
    _owner: TierFile = field(repr=False)
    _version: _Version = field(repr=False)
    _written: Transfer = field(repr=False)

    def read(self) -> Iterator[memoryview]:
        """The bytes from `offset` to the end of the file, checked, as soon as they are written. From any thread.

        The next part replaces the one before in memory.

        Raises:
            OffloadError: the disk failed, or gave back other bytes than were written.
        """
        self._written.wait()
        self._version.write_header()
        yield memoryview(self._version.header)
        buffer = memoryview(mmap.mmap(-1, min(BLOCK_BYTES, round_to_pages(self.num_bytes)) or 1))
        for index, begin in enumerate(range(0, self.num_bytes, BLOCK_BYTES)):
            block = buffer[: min(BLOCK_BYTES, self.num_bytes - begin)]
            self._version.read_block(block, index)
            yield block
        yield memoryview(bytes(round_to_pages(self.num_bytes) - self.num_bytes))

    def release(self) -> None:
        """Lets the file be written again. To be called once."""
        self._owner._unpin(self._version)


class TierFile:
    """`num_bytes` of data on the disk, of which the newest version can be read.

    `has_data` says whether there is one yet. To be used by one thread at a time; pins may be released by any.
    """

    def __init__(self, folder: TierFolder, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.has_data = False
        self._folder = folder
        self._versions: set[_Version] = set()
        self._spares: list[_Version] = []
        """Files that were pinned once, and are to be written next."""
        self._pins = threading.Lock()
        self._current = self._make_version()
        self._write = Transfer(0)
        self._reads: list[Transfer] = []

    @property
    def header_bytes(self) -> int:
        return HEADER_BYTES

    @property
    def file_bytes(self) -> int:
        return file_bytes(self.num_bytes)

    @property
    def more_bytes(self) -> int:
        """The room on the disk that the next write takes more while the present version is kept."""
        return 0 if self._spares else self.file_bytes

    @property
    def folder(self) -> Path:
        """Where its versions lie."""
        return self._folder.path

    def write(self, data: torch.Tensor) -> Transfer:
        """Begins to write the next version; waits for the writing of an earlier one.

        Args:
            data: (num_bytes,) uint8 at a page's address. It must stay as it is until the transfer is done.

        Raises:
            DoesNotFit: the present version is pinned, and there is no room for another.
            OffloadError: somebody has removed the file.
        """
        view = self._view(data, "data")
        assert all(transfer.is_done for transfer in self._reads), "a version is being read that is to be written over"
        self._write.settle()
        version = self._writable_version()
        version.header, version.is_header_written = b"", True
        self.has_data = True
        self._write = self._folder.engine.submit(
            *(functools.partial(version.write_block, block, index) for index, block in enumerate(_blocks(view)))
        )
        return self._write

    def read(self, into: torch.Tensor) -> Transfer:
        """Begins to read the newest version; waits for its writing.

        Args:
            into: (num_bytes,) uint8 at a page's address; what it holds is undefined until the transfer is done.

        Raises:
            OffloadError: its writing failed. The transfer raises it where bytes are not those that were written.
        """
        assert self.has_data, "a file is written before it is read"
        view = self._view(into, "into")
        self._write.wait()
        version = self._current
        transfer = self._folder.engine.submit(
            *(functools.partial(version.read_block, block, index) for index, block in enumerate(_blocks(view)))
        )
        self._reads = [*(earlier for earlier in self._reads if not earlier.is_done), transfer]
        return transfer

    def pin(self, header: bytes = b"") -> Pin:
        """Keeps the newest version as it is; the next write goes to another file. Waits for nothing.

        Args:
            header: whole pages, at most `HEADER_BYTES`, which are put right before the data, when the pin is read.

        Raises:
            ValueError: the header is of another length, or the version is kept with another one.
            OffloadError: somebody has removed the file.
        """
        assert self.has_data, "a file is written before it is pinned"
        if len(header) % PAGE_BYTES or len(header) > HEADER_BYTES:
            raise ValueError(f"a header has whole pages, up to {HEADER_BYTES} bytes, and not {len(header)}")
        with self._pins:
            version = self._current
            num_links = _num_links(version.file)
            if header and header != version.header:
                if version.num_pins or num_links > 1:
                    raise ValueError("the version is kept with another header")
                version.header, version.is_header_written = header, False
            version.num_pins += 1
        return Pin(version.file.path, HEADER_BYTES - len(header), self.num_bytes, self, version, self._write)

    def _writable_version(self) -> _Version:
        """The present version if nobody keeps it, or else another file, which becomes the present one."""
        with self._pins:
            version = self._current
            is_linked = _num_links(version.file) > 1
            if version.num_pins == 0 and not is_linked:
                return version
            if self._spares:
                _num_links(self._spares[-1].file)
            self._current = self._spares.pop() if self._spares else self._make_version()
            if version.num_pins == 0:
                self._remove(version)
            return self._current

    def _unpin(self, version: _Version) -> None:
        with self._pins:
            assert version.num_pins > 0, "a pin is released once"
            version.num_pins -= 1
            if version.num_pins == 0 and version not in self._versions:
                version.file.close()  # the folder was closed meanwhile
            if version.num_pins or version is self._current or version not in self._versions:
                return
            if version.file.num_links() == 1:
                self._spares.append(version)
            else:
                self._remove(version)

    def _make_version(self) -> _Version:
        num_blocks = -(-self.num_bytes // BLOCK_BYTES)
        version = _Version(self._folder._make_file(self.num_bytes), [0] * num_blocks)
        self._versions.add(version)
        return version

    def _remove(self, version: _Version) -> None:
        """Removes a version from this folder. Where the file has another name, it stays under that one."""
        self._versions.remove(version)
        version.file.close()
        version.file.path.unlink(missing_ok=True)

    def _view(self, data: torch.Tensor, name: str) -> memoryview:
        if data.dtype != torch.uint8 or data.shape != (self.num_bytes,) or data.data_ptr() % PAGE_BYTES:
            raise ValueError(f"{name} must be {self.num_bytes} uint8 at a page's address")
        return isal.byte_array(data, name).data

    def _close(self) -> None:
        for transfer in (self._write, *self._reads):
            transfer.settle()
        with self._pins:
            for version in self._versions:
                if version.num_pins == 0:  # else a thread may be reading it
                    version.file.close()
            self._versions.clear()


def _blocks(view: memoryview) -> list[memoryview]:
    return [view[begin : begin + BLOCK_BYTES] for begin in range(0, view.nbytes, BLOCK_BYTES)]


def _num_links(file: DirectFile) -> int:
    """The number of names that a file has. Raises OffloadError if none, or if that cannot be told."""
    try:
        num_links = file.num_links()
        if num_links == 0:
            raise FileNotFoundError(errno.ENOENT, "somebody has removed it")
    except OSError as error:
        raise disk_error(file.path, "cannot be used", error) from error
    return num_links
