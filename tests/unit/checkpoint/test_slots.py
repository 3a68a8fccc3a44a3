"""The files of a slot: what is not as it was written holds nothing, and room that is taken is there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.agents import shared_memory, small_tmpfs
from support.files import disk_full_after, flip
from support.stored import noise

from windlass.checkpoint.agent.header import Header, Region
from windlass.checkpoint.agent.ledger import Phase, SnapshotId
from windlass.checkpoint.agent.slots import SharedFile, SlotFiles
from windlass.checkpoint.agent.stripes import BLOCK_BYTES
from windlass.checksum import crc32c

HEADER = Header(
    snapshot=SnapshotId(3, 17),
    step=170,
    phase=Phase.writing,
    position=1,
    num_nodes=3,
    num_parity_shards=1,
    node_bytes=3 * BLOCK_BYTES,
    world_size=4,
    layout="0123456789abcdef",
    regions=(Region(0, 0, 0, 100), Region(1, 1, 0, 200), Region(1, 2, BLOCK_BYTES, 300), Region(2, 3, 0, 400)),
    persist=True,
    num_resumes=1,
    table_crc=4_000_000_000,
)


@pytest.fixture
def shm() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


def whole_slot(folder: Path, phase: Phase = Phase.committed) -> SlotFiles:
    """A slot as an agent leaves it: 4 blocks of data, 2 of parity."""
    files = SlotFiles(folder, 0)
    files.begin(HEADER)
    for number in range(6):
        files.memory.blocks(number)[:] = noise(str(number), BLOCK_BYTES)
        files.table[number] = crc32c(files.memory.blocks(number))
    files.seal(replace(HEADER, phase=phase))
    return files


def adopted(folder: Path) -> SlotFiles:
    files = SlotFiles(folder, 0)
    files.adopt()
    return files


def test_a_header_comes_back_as_it_was() -> None:
    assert Header.from_bytes(HEADER.to_bytes()) == HEADER
    assert Header.from_json(json.loads(HEADER.to_bytes()[9:])) == HEADER
    assert HEADER.own_regions == list(HEADER.regions[1:3])


def test_every_flipped_bit_of_a_header_is_found() -> None:
    data = HEADER.to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="have changed"):
            Header.from_bytes(bytes(damaged))


@pytest.mark.parametrize("size", [0, 1, 8, 9, 10, 100])
def test_a_header_that_is_cut_off_is_found(size: int) -> None:
    with pytest.raises(ValueError, match="have changed"):
        Header.from_bytes(HEADER.to_bytes()[:size])


def test_a_whole_slot_is_adopted_with_its_bytes(shm: Path) -> None:
    files = whole_slot(shm)
    found = adopted(shm)
    assert found.header == files.header
    assert found.header is not None and found.header.phase == Phase.committed
    assert (found.table == files.table).all()
    assert all(bytes(found.memory.blocks(number)) == noise(str(number), BLOCK_BYTES) for number in range(6))
    assert list(found.memory.damaged_blocks()) == []
    assert bytes(found.memory.blocks(1, 3)) == b"".join(noise(str(number), BLOCK_BYTES) for number in (1, 2, 3))


@pytest.mark.parametrize("is_taken", [False, True], ids=["emptied", "taken by another"])
def test_memory_is_what_it_was_when_the_slot_is_not(is_taken: bool, shm: Path) -> None:
    files = whole_slot(shm)
    memory = files.memory
    if is_taken:
        files.begin(replace(HEADER, snapshot=SnapshotId(3, 18)))
        assert files.memory.header != memory.header
    else:
        files.empty()
    assert list(memory.damaged_blocks()) == []


@pytest.mark.parametrize("phase", [Phase.writing, Phase.local])
def test_a_slot_that_is_being_written_is_adopted_without_a_table(phase: Phase, shm: Path) -> None:
    files = SlotFiles(shm, 0)
    files.begin(HEADER)
    files.write_header(replace(HEADER, phase=phase))
    found = adopted(shm)
    assert found.header is not None and found.header.phase == phase
    assert found.data is not None and found.data.size == 4 * BLOCK_BYTES


@pytest.mark.parametrize("suffix", ["head", "table"])
def test_a_slot_with_a_flipped_bit_in_head_or_table_holds_nothing(suffix: str, shm: Path) -> None:
    files = whole_slot(shm)
    flip(files.path(suffix), files.path(suffix).stat().st_size // 2, 0x10)
    assert adopted(shm).header is None
    assert list(shm.iterdir()) == [], "it gives its memory back"


@pytest.mark.parametrize("suffix", ["data", "parity", "table", "head"])
def test_a_slot_that_lacks_a_file_or_a_part_of_it_holds_nothing(suffix: str, shm: Path) -> None:
    path = whole_slot(shm).path(suffix)
    os.truncate(path, path.stat().st_size - 4)
    assert adopted(shm).header is None
    path = whole_slot(shm).path(suffix)
    path.unlink()
    assert adopted(shm).header is None


def test_a_table_of_another_snapshot_is_refused(shm: Path) -> None:
    """The same length, and sound in itself."""
    files = whole_slot(shm)
    files.path("table").write_bytes(files.table[::-1].tobytes())
    with pytest.raises(ValueError, match="the table's bytes have changed"):
        SlotFiles(shm, 0).open()


def test_a_table_of_another_length_is_refused(shm: Path) -> None:
    files = whole_slot(shm)
    table = files.table[:-1].tobytes()
    files.path("table").write_bytes(table)
    assert files.header is not None
    files.write_header(replace(files.header, table_crc=crc32c(table)))
    with pytest.raises(ValueError, match="another length"):
        SlotFiles(shm, 0).open()


@pytest.mark.parametrize("number", range(6))
def test_the_damaged_block_is_found_and_no_other(number: int, shm: Path) -> None:
    files = whole_slot(shm)
    path, place = (files.path("data"), number) if number < 4 else (files.path("parity"), number - 4)
    flip(path, place * BLOCK_BYTES + 12345, 0x80)
    assert list(adopted(shm).memory.damaged_blocks()) == [number]
    assert list(files.memory.damaged_blocks()) == [number], "the agent has the same memory mapped"


def test_an_emptied_slot_gets_new_files(shm: Path) -> None:
    """An old writer that has the old ones mapped writes into nothing."""
    files = whole_slot(shm)
    assert files.data is not None
    old = files.data
    files.empty()
    assert list(shm.iterdir()) == []
    files.begin(HEADER)
    assert files.data is not None and files.data.inode != old.inode
    old.view[:4] = b"late"
    assert bytes(files.memory.blocks(0)[:4]) == bytes(4)


def test_a_slot_that_is_begun_again_keeps_its_memory(shm: Path) -> None:
    """To take new memory for every snapshot would cost as much as to copy into it."""
    files = whole_slot(shm)
    assert files.data is not None and files.parity is not None
    before = files.data.inode, files.parity.inode
    files.begin(replace(HEADER, snapshot=SnapshotId(3, 18)))
    assert (files.data.inode, files.parity.inode) == before
    found = adopted(shm)
    assert found.header is not None and found.header.phase == Phase.writing


def test_a_file_is_made_for_its_owner_alone(shm: Path) -> None:
    whole_slot(shm)
    assert {oct(path.stat().st_mode & 0o777) for path in shm.iterdir()} == {"0o600"}


def test_room_that_is_not_there_is_missed_before_anything_is_written(shm: Path) -> None:
    with small_tmpfs(shm, 5 * BLOCK_BYTES) as folder:
        files = SlotFiles(folder, 0)
        with pytest.raises(OSError) as raised:
            files.begin(HEADER)
        assert raised.value.errno == errno.ENOSPC
        assert files.header is None
        assert list(folder.iterdir()) == [], "what was taken is given back"
        files.begin(replace(HEADER, node_bytes=2 * BLOCK_BYTES))  # 2 blocks of data and 1 of parity
        for number in range(3):
            files.memory.blocks(number)[:] = b"x" * BLOCK_BYTES  # SIGBUS if the memory were not there


def test_a_limit_on_file_sizes_is_a_lack_of_room(shm: Path) -> None:
    with disk_full_after(3 * BLOCK_BYTES), pytest.raises(OSError) as raised:
        SlotFiles(shm, 0).begin(HEADER)
    assert raised.value.errno == errno.EFBIG
    assert list(shm.iterdir()) == []


def test_a_file_that_is_too_short_is_not_mapped(shm: Path) -> None:
    (shm / "file").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="shorter than its slot"):
        SharedFile(shm / "file", 101, may_make=False)
    with pytest.raises(FileNotFoundError):
        SharedFile(shm / "other", 1, may_make=False)
    assert not (shm / "other").exists()


def test_a_file_is_grown_and_cut_to_its_size(shm: Path) -> None:
    assert SharedFile(shm / "file", 10).view.nbytes == 10
    SharedFile(shm / "file", 20).view[:] = b"y" * 20
    assert bytes(SharedFile(shm / "file", 5).view) == b"yyyyy"
    assert (shm / "file").stat().st_size == 5
    assert SharedFile(shm / "file", 0).view.nbytes == 0
